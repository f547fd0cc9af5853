"""The registered operators by themselves: schemas and shape functions, and the kernels that no public function reaches
in every form."""

from typing import Any

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.ops.dnl_block import fused as block_nodes
from dnl_kernels.ops.dnl_block import resident
from dnl_kernels.ops.dnl_layer import fused as layer_nodes
from dnl_kernels.testing import assert_within_budget, dense_conv2d, dnl_block, dnl_layer, exactly

from . import large
from .targets import CUDA, DEVICE, EMULATED, OPERATORS, PAIRS, every_cuda_dtype, every_pair, of_a_device

ON_CUDA = pytest.mark.skipif(("dense_conv2d", CUDA) not in PAIRS, reason="the CUDA kernels are not here")


def _layer(dtype):
    """Arguments of dnl_layer_fwd and _bwd: every parameter is given but those that the kernel excludes."""
    case = dnl_layer.CASES["softmax-tokens"]
    states, named = dnl_layer.inputs(case, dtype)
    named = {name.removeprefix("theta."): t for name, t in named.items()}
    parameters = [named.get(name) for name in layer_nodes.PARAMETERS]
    static = (case.kernel, case.activation, case.tau, "relu", case.heads, case.residual)
    given = (states, named["skip_input"], *parameters, *static)
    dout = torch.ones(case.batch, *case.positions, case.width, dtype=dtype)
    return {"dnl_layer_fwd": given, "dnl_layer_bwd": (dout, *given, True, True)}


def _block(dtype, backend):
    """Of dnl_block_fwd and _bwd in training, or of dnl_block_resident, which has no training."""
    case = dnl_block.CASES["densenet" if backend == "triton" else "densenet-eval"]
    x0, layers = dnl_block.inputs(case, dtype)
    packed = block_nodes.pack(case.config, x0, [dnl.LayerParameters(**layer) for layer in layers], torch.float32)
    static = block_nodes.static_arguments(case.config)
    if backend != "triton":
        return {"dnl_block_resident": (x0, packed._replace(weight=packed.weight.to(dtype)), static)}
    states = torch.randn(case.batch, 9, *case.positions).to(dtype)
    outputs = states.new_empty(case.batch, 0, *case.positions)
    statistics = packed._replace(mean=torch.zeros(9), var=torch.ones(9))
    return {
        "dnl_block_fwd": (x0, packed, static),
        "dnl_block_bwd": (torch.ones_like(states), states, outputs, statistics, static),
    }


def registered(op, backend, dtype):
    if op == "dnl_layer":
        return _layer(dtype)
    if op == "dnl_block":
        flat = torch.utils._pytree.tree_leaves
        return {
            name: tuple(x for part in arguments for x in (part if isinstance(part, tuple) else (part,)))
            for name, arguments in _block(dtype, backend).items()
            if flat(arguments)
        }
    found = dict(OPERATORS[op].registered(*(leaf.detach() for leaf in OPERATORS[op].leaves(dtype, 2))))
    if op == "dense_conv2d" and backend == CUDA:
        names = ["moments_fwd"] + ["tf32_fwd", "tf32_bwd"] * (dtype == torch.float32)
        found |= {f"{op}_{name}": found[f"{op}_{name.rpartition('_')[2]}"] for name in names}
    return found


def test_every_operator_has_something_to_check():
    for op, backend in PAIRS:
        assert registered(op, backend, torch.float32), (op, backend)


@every_cuda_dtype
@every_pair
def test_opcheck(op, backend, dtype):
    for name, arguments in registered(op, backend, dtype).items():
        there = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), arguments)
        run: Any = _backend.kernel(backend, name)
        torch.library.opcheck(run, there)


@ON_CUDA
@every_cuda_dtype
@pytest.mark.parametrize("name", ["densenet-layer", "seven", "many-small-images", "cut-into-bands", "pointwise"])
def test_moments_of_a_convolution(name, dtype):
    """y as the plain operator gives it, bit by bit; sums over all pixels of y and y^2, as y is stored, in float32."""
    case = dense_conv2d.CASES[name]
    parameters, states = dense_conv2d.inputs(case, dtype, DEVICE)
    given = (states, *parameters, case.activation, case.scale)
    y, sums = _backend.kernel(CUDA, "dense_conv2d_moments_fwd")(*given)
    assert torch.equal(y, _backend.kernel(CUDA, "dense_conv2d_fwd")(*given))
    stored = y.cpu().double()
    exact = exactly(lambda: [stored.pow(power).sum((0, 2, 3)) for power in (1, 2)], torch.float32)
    for power, found, expected in zip((1, 2), sums.cpu(), exact, strict=True):
        assert_within_budget(f"sum of y^{power}", found, expected)


SMALL = ("8x8", "wide")  # what the emulator has the time for, with fewer samples


@ON_CUDA
@every_cuda_dtype
@pytest.mark.parametrize("name", large.RESIDENT)
def test_the_resident_block_against_float64(name, dtype):
    case = large.RESIDENT[name]
    if EMULATED:
        if name not in SMALL:
            pytest.skip("a rehearsal: too large for the emulator")
        case = case._replace(batch=3)
    x0, layers = dnl_block.inputs(case, dtype)

    def run(device, backend, to=None):
        there = [{n: t.to(device, to) for n, t in layer.items()} for layer in layers]
        given = [dnl.LayerParameters(**layer) for layer in there]
        x = x0.to(device, to)
        if backend == CUDA and (why := resident.limit(x, given, case.config, CUDA)):
            pytest.skip(why)
        with torch.no_grad():
            return dnl.dnl_block(x, given, case.config, backend=backend)

    y = run(DEVICE, CUDA)
    assert torch.equal(y[:, : x0.shape[1]].cpu(), x0)
    assert torch.equal(y, run(DEVICE, CUDA))
    assert_within_budget("states", y.cpu(), exactly(lambda: run("cpu", "reference", torch.float64), dtype, dtype))


@of_a_device
@ON_CUDA
def test_host_threads_launch_a_kernel_with_different_amounts_of_shared_memory():
    """Leave for more than 48 KiB is a kernel's, for all threads: a small launch must not take it from a large one."""
    import threading

    case = large.CONVOLUTIONS["above-48-KiB"]
    cases = [dense_conv2d.inputs(c, torch.float32, DEVICE) for c in (case, case._replace(height=8, width=8))]
    run = _backend.kernel(CUDA, "dense_conv2d_fwd")
    expected = [run(states, *p, "relu", 1.0) for p, states in cases]
    failures = []

    def repeat(case, y):
        (p, states) = case
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(200):
                    if not torch.equal(run(states, *p, "relu", 1.0), y):
                        raise AssertionError("another result")
        except Exception as error:
            failures.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(cases, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
