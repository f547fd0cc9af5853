"""Every operator with a GPU backend, on the GPU: named cases and large ones against float64, and what a GPU adds."""

import pytest
import torch

from dnl_kernels import _backend
from dnl_kernels.testing import cotangent, dense_conv2d, dnl_block, named
from dnl_kernels.testing.precision import float32_products

from . import large
from .refusals import refused, skipped_where_refused
from .targets import (
    CUDA,
    DEVICE,
    EMULATED,
    OPERATORS,
    PAIRS,
    every_pair,
    of_a_device,
    on_device,
    parameters,
)


@parameters(named.CASES)
def test_named_cases_against_float64(make, backend, dtype):
    with skipped_where_refused():
        named.check(make(dtype), backend, DEVICE)


@of_a_device
@parameters(large.CALLS)
def test_large_cases_against_float64(make, backend, dtype):
    """On the device: a bound by repeated float64 runs would take the processors minutes for each."""
    with skipped_where_refused():
        named.check_once(make(dtype), backend, DEVICE)


@every_pair
def test_compiled_equals_eager(op, backend):
    leaves = on_device(op)

    def call(*leaves):
        return OPERATORS[op].call(*leaves, backend=backend)

    with skipped_where_refused():
        call(*leaves)
    results = [f(*leaves) for f in (torch.compile(call, fullgraph=True), call)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in results]
    torch.testing.assert_close(*gradients)


def _repeats(call, backend, reasons):
    """Whether the call ran, and then gave the same twice, bit by bit; else the reason is noted."""
    leaves = {name: t.to(DEVICE) for name, t in call.leaves.items()}
    if why := refused(lambda: call.run(leaves, backend)):
        reasons.append(why)
        return False
    first, second = (named.gradients(call, leaves, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    return True


@every_pair
def test_results_do_not_depend_on_the_run(op, backend):
    """Three named cases that the backend takes, and on a device a large one."""
    reasons: list[str] = []
    ran = 0
    named_cases = iter(named.CASES[op].values())
    while ran < 3 and (make := next(named_cases, None)):
        ran += _repeats(make(torch.float32), backend, reasons)
    for make in list(large.CALLS[op].values())[: not EMULATED]:
        ran += _repeats(make(torch.float32), backend, reasons)
    if not ran:
        pytest.skip("; ".join(reasons))


@of_a_device
@every_pair
def test_another_stream_and_a_cuda_graph(op, backend):
    leaves = [leaf.detach() for leaf in on_device(op)]

    def call():
        return OPERATORS[op].call(*leaves, backend=backend)

    with skipped_where_refused():
        expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = call()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for leaf in leaves:
        leaf.mul_(0.5)
    graph.replay()
    assert torch.equal(captured, call()) and not torch.equal(captured, expected)


@of_a_device
@pytest.mark.parametrize("name", ["densenet", "equation-1-batch-norm", "conv1x1-softmax"])
def test_a_training_step_of_a_block_in_a_cuda_graph(name):
    """Forward and backward, captured once and replayed on other values of the same tensors."""
    case = dnl_block.CASES[name]
    x0, layers = dnl_block.inputs(case, torch.float32)
    x0 = x0.cuda().requires_grad_()
    layers = [{n: t.cuda() for n, t in layer.items()} for layer in layers]
    leaves = [x0, *(layers[i][n].requires_grad_() for i, n in dnl_block.trainable(layers))]

    def step():
        parameters = [dnl_block.LayerParameters(**layer) for layer in layers]
        y = dnl_block.dnl_block(x0, parameters, case.config, backend="triton")
        return y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected)


@of_a_device
@pytest.mark.parametrize("op", dict(PAIRS))
def test_the_default_backend_is_the_best_one_that_runs(op, monkeypatch):
    """By the result; and by what is chosen, but for operators that also run as a composition of the others."""
    leaves, chosen, select = on_device(op), [], _backend.select

    def recorded(name, *rest, **facts):
        found = select(name, *rest, **facts)
        if name == op:
            chosen.append(found)
        return found

    monkeypatch.setattr(_backend, "select", recorded)
    result = OPERATORS[op].call(*leaves)
    torch.testing.assert_close(result, OPERATORS[op].call(*leaves, backend="reference"))
    asked = [b for b in _backend.PREFERENCE if (op, b) in PAIRS or b == "reference"]
    best = next(b for b in asked if refused(lambda b=b: OPERATORS[op].call(*leaves, backend=b)) is None)
    assert op in ("dnl_layer", "dnl_block") or chosen[0] == best


@pytest.mark.parametrize("name", ["densenet-layer", "seven", "pointwise", "cut-into-bands"])
def test_tf32_where_the_setting_allows_it(name):
    """Within the error that 10 bits of mantissa explain, and other bits than float32's."""
    case = dense_conv2d.CASES[name]
    call = named.CASES["dense_conv2d"][name](torch.float32)
    parameters = [call.leaves.get(n) for n in dense_conv2d.NAMES]
    states = [t for n, t in call.leaves.items() if n.startswith("states[")]
    exact = named.gradients(call, {n: t.double() for n, t in call.leaves.items()}, "reference")
    there = {n: t.to(DEVICE) for n, t in call.leaves.items()}
    float32 = named.gradients(call, there, CUDA)
    with float32_products(tf32=True):
        found = named.gradients(call, there, CUDA)
    dy = cotangent(exact["output"])
    most = dense_conv2d.tf32_bounds(parameters, states, case.activation, case.scale, dy)
    for n, value in found.items():
        if n == "bias":
            continue
        bound = most["y" if n == "output" else n] + 1e-5 * exact[n].abs() + 1e-6
        assert ((value.cpu() - exact[n]).abs() <= bound).all(), n
    assert not torch.equal(found["output"], float32["output"])
