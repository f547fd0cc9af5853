"""Every operator with a GPU backend, on the GPU: named cases and large ones against float64, and what a GPU adds."""

import contextlib

import pytest
import torch

from dnl_kernels import _backend
from dnl_kernels.testing import cotangent, dense_conv2d, dense_sum, dnl_block, named, nonlocal_attention
from dnl_kernels.testing.operators import operators

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here: nothing in this file was run", allow_module_level=True)

PAIRS = [
    (op, backend)
    for op, supports in _backend.SUPPORTS.items()
    for backend, support in supports.items()
    if "cuda" in support.devices
]
OPERATORS = {op.name: op for op in operators()}


def refused(call):
    """Why a backend that is asked for by name cannot run the call, or None."""
    try:
        call()
    except ValueError as error:
        if "cannot run this call" not in str(error):
            raise
        return str(error)
    return None


@contextlib.contextmanager
def skipped_where_refused():
    """The test is skipped with the backend's reason."""
    try:
        yield
    except ValueError as error:
        if "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))


every_pair = pytest.mark.parametrize("op, backend", PAIRS, ids=["-".join(pair) for pair in PAIRS])
LARGE = {
    "dense_sum": {
        "images": dense_sum.Case((16, 96, 56, 56), 24, 1),
        "tokens": dense_sum.Case((8, 2048, 768), 12, -1),
        "one-weight": dense_sum.Case((8, 2048, 768), 48),
    },
    "nonlocal_attention": {
        "long": nonlocal_attention.Case(2, 2, 4096, 4096, 64, 64),
        "causal": nonlocal_attention.Case(2, 3, 2049, 2049, 128, 96, {"causal": True}),
        "channels-first": nonlocal_attention.Case(4, 1, 56 * 56, 56 * 56, 32, 32, {"layout": "channels_first"}),
        "masked": nonlocal_attention.Case(3, 2, 1000, 1531, 48, 80, mask=0.5),
        "widest": nonlocal_attention.Case(1, 2, 1024, 1024, 256, 256),
    },
}
LARGE_CALLS = {
    "dense_sum": {name: lambda d, c=c: named._dense_sum(c, d) for name, c in LARGE["dense_sum"].items()},
    "nonlocal_attention": {
        f"{kernel}-{name}": lambda d, c=c, k=kernel: named._nonlocal_attention(k)(c, d)
        for kernel in ("softmax", "gaussian", "softmax-unnormalised")
        for name, c in LARGE["nonlocal_attention"].items()
    },
}


def parameters(table):
    found = [
        pytest.param(make, backend, dtype, id=f"{op}-{backend}-{name}-{str(dtype).removeprefix('torch.')}")
        for op, backend in PAIRS
        for name, make in table.get(op, {}).items()
        for dtype in _backend.SUPPORTS[op][backend].dtypes
        if dtype != torch.float64
    ]
    return pytest.mark.parametrize("make, backend, dtype", found)


@parameters(named.CASES)
def test_named_cases_against_float64(make, backend, dtype):
    with skipped_where_refused():
        named.check(make(dtype), backend, "cuda")


@parameters(LARGE_CALLS)
def test_large_cases_against_float64(make, backend, dtype):
    named.check(make(dtype), backend, "cuda")


@every_pair
def test_opcheck(op, backend):
    leaves = [leaf.detach() for leaf in OPERATORS[op].leaves(torch.float32, 2)]
    for name, arguments in OPERATORS[op].registered(*leaves).items():
        there = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), arguments)
        torch.library.opcheck(_backend.kernel(backend, name), there)


def _on_gpu(op, dtype=torch.float32):
    return [leaf.cuda().requires_grad_() for leaf in OPERATORS[op].leaves(dtype, 2)]


@every_pair
def test_compiled_equals_eager(op, backend):
    leaves = _on_gpu(op)

    def call(*leaves):
        return OPERATORS[op].call(*leaves, backend=backend)

    with skipped_where_refused():
        call(*leaves)
    results = [f(*leaves) for f in (torch.compile(call, fullgraph=True), call)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in results]
    torch.testing.assert_close(*gradients)


@every_pair
def test_results_do_not_depend_on_the_run(op, backend):
    reasons, ran = [], 0
    for make in (*list(named.CASES[op].values())[:3], *list(LARGE_CALLS.get(op, {}).values())[:1]):
        call = make(torch.float32)
        leaves = {name: t.cuda() for name, t in call.leaves.items()}
        if why := refused(lambda call=call, leaves=leaves: call.run(leaves, backend)):
            reasons.append(why)
            continue
        ran += 1
        first, second = (named.gradients(call, leaves, backend) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
    if not ran:
        pytest.skip("; ".join(reasons))


@every_pair
def test_another_stream_and_a_cuda_graph(op, backend):
    leaves = [leaf.detach() for leaf in _on_gpu(op)]

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


@pytest.mark.parametrize("op", dict(PAIRS))
def test_the_default_backend_is_the_best_one_that_runs(op, monkeypatch):
    """By the result; and by what is chosen, but for operators that also run as a composition of the others."""
    leaves, chosen, select = _on_gpu(op), [], _backend.select

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
    there = {n: t.cuda() for n, t in call.leaves.items()}
    float32 = named.gradients(call, there, "cuda")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = named.gradients(call, there, "cuda")
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    dy = cotangent(exact["output"])
    most = dense_conv2d.tf32_bounds(parameters, states, case.activation, case.scale, dy)
    for n, value in found.items():
        if n == "bias":
            continue
        bound = most["y" if n == "output" else n] + 1e-5 * exact[n].abs() + 1e-6
        assert ((value.cpu() - exact[n]).abs() <= bound).all(), n
    assert not torch.equal(found["output"], float32["output"])
