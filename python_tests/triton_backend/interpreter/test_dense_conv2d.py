"""dense_conv2d's Triton kernels against float64: the same named cases as every other backend, and their own corners."""

import pytest
import torch
import triton

import dnl_kernels as dnl
from dnl_kernels import _backend, _triton_conv
from dnl_kernels.testing import assert_within_budget, cotangent, exactly
from dnl_kernels.testing.dense_conv2d import CASES, NAMES, Case, inputs
from dnl_kernels.testing.triton_interpreter import traffic

every_dtype = pytest.mark.parametrize("dtype", _backend.TRITON.dtypes, ids=str)
OWN_CASES = {
    "several-tiles": Case(2, (3,), 7, 9, 3),
    "several-output-and-channel-tiles": Case(1, (40, 3), 3, 4, 70, size=1, activation="gelu", scale=0.5),
}


def tall_tiles(case):
    """The interpreter's time is in the number of tiles; OWN_CASES have several of those that are shipped."""
    rows = min(max(64, triton.next_power_of_2(case.batch * case.height * case.width)), 1024)
    return {
        kernel: {size: t._replace(**{"step" if kernel == "weight" else "rows": rows}) for size, t in tiles.items()}
        for kernel, tiles in _triton_conv.TILES.items()
    }


def run(parameters, states, backend, activation, scale):
    parameters = [p if p is None else p.detach().requires_grad_() for p in parameters]
    states = [s.detach().requires_grad_() for s in states]
    weight, bias, norm_scale, norm_shift = parameters
    y = dnl.dense_conv2d(
        states, weight, bias, norm_scale=norm_scale, norm_shift=norm_shift, activation=activation, scale=scale,
        backend=backend,
    )  # fmt: skip
    dy = cotangent(y)
    return y, torch.autograd.grad(y, [p for p in parameters if p is not None] + states, dy)


def check(parameters, states, activation="relu", scale=1.0):
    double = [p if p is None else p.double() for p in parameters], [s.double() for s in states]
    y, grads = run(parameters, states, "triton", activation, scale)
    exact, exact_grads = exactly(lambda: run(*double, "reference", activation, scale), y.dtype, y.dtype)
    assert_within_budget("y", y, exact)
    names = [n for n, p in zip(NAMES, parameters, strict=True) if p is not None]
    names += [f"states[{j}]" for j in range(len(states))]
    for name, a, e in zip(names, grads, exact_grads, strict=True):
        assert_within_budget("d" + name, a, e)


# The large images only in float32: a half type is in every other case, and the interpreter slow.
LARGE = ("cut-into-bands", "wide-rows")
RUNS = [(n, d) for d in _backend.TRITON.dtypes for n in CASES if d == torch.float32 or n not in LARGE]


@pytest.mark.parametrize("name, dtype", RUNS, ids=str)
def test_against_float64(name, dtype, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(_triton_conv, "TILES", tall_tiles(case))
    check(*inputs(case, dtype), case.activation, case.scale)


@pytest.mark.parametrize("case", OWN_CASES.values(), ids=OWN_CASES)
@every_dtype
def test_with_the_shipped_tiles(case, dtype):
    check(*inputs(case, dtype), case.activation, case.scale)


@every_dtype
def test_strided_states(dtype):
    parameters, _ = inputs(Case(2, (2, 3, 4, 2), 5, 6, 3), dtype)
    wide = torch.randn(4, 9, 10, 12, dtype=dtype)
    states = [
        wide[:2, 1:3, :5, :6],
        wide[::2, ::3, ::2, 6:],
        wide[:2, :4, :5, :6].contiguous(memory_format=torch.channels_last),
        wide[:2, 4:8:2, :6, :5].mT.flip(2),
    ]
    check(parameters, states)


@every_dtype
@pytest.mark.parametrize("size", [1, 3])
def test_channels_last_states_are_read_in_place(dtype, size, monkeypatch):
    case = Case(2, (8, 5), 4, 3, 3, size=size)
    parameters, states = inputs(case, dtype)
    states = [s.contiguous(memory_format=torch.channels_last) for s in states]
    check(parameters, states)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a state was copied"))
    assert _triton_conv.reads_last(states)
    read = _triton_conv.operand([s.permute(0, 2, 3, 1) for s in states], True)
    assert [x.data_ptr() for x in read.tensors] == [s.data_ptr() for s in states]


def test_slices_of_a_prefix_buffer_are_one_state():
    buffer = torch.randn(3, 10, 6, 6)
    parameters, _ = inputs(Case(3, (4, 5), 6, 6, 2), torch.float32)
    states = [buffer[:, 1:5], buffer[:, 5:]]
    check(parameters, states)
    assert _triton_conv.operand(states, False, merge=True).channels == [9]


@every_dtype
def test_an_image_that_fills_vectors(dtype):
    """16-byte accesses: planes of a multiple of 16 pixels, 1x1 filters."""
    case = Case(2, (4, 8), 4, 8, 16, size=1, activation="silu")
    parameters, states = inputs(case, dtype)
    assert _triton_conv.operand(states, False).aligned(_triton_conv.Images(2, 4, 8), 1)
    check(parameters, states, "silu")


def test_a_layer_reads_each_state_once_for_a_pointwise_filter():
    case = Case(4, (6, 10), 8, 8, 12, size=1)
    parameters, states = inputs(case, torch.float32)
    with traffic() as count:
        run(parameters, states, "triton", "relu", 1.0)
    states_bytes = sum(s.nbytes for s in states)
    launches = sum(n["load"] for name, n in count.by_tensor.items() if name == "X" or name.startswith("TENSORS"))
    assert launches <= 3 * states_bytes  # forward, data gradient, weight gradient


@pytest.mark.parametrize("wanted", range(6))
def test_only_the_wanted_gradient_is_computed(wanted):
    parameters, states = inputs(Case(2, (3, 2), 4, 5, 3), torch.float32)

    def gradient(backend, dtype):
        leaves = [t.detach().to(dtype) for t in (*parameters, *states)]
        leaves[wanted].requires_grad_()
        weight, bias, scale, shift, *read = leaves
        y = dnl.dense_conv2d(read, weight, bias, norm_scale=scale, norm_shift=shift, activation="tanh", backend=backend)
        return torch.autograd.grad(y.square().sum(), leaves[wanted])[0]

    exact = exactly(lambda: gradient("reference", torch.float64), torch.float32)
    assert_within_budget("gradient", gradient("triton", torch.float32), exact)


@every_dtype
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_of_the_output(dtype, offset):
    """Mean and biased variance of what was stored, in one pass, with a mean that is large against the deviations."""
    parameters, states = inputs(Case(3, (5,), 9, 7, 4, bias=False), dtype)
    weight, _, scale, shift = parameters
    problem = _triton_conv.Problem(_triton_conv.Images(3, 9, 7), weight, scale, shift, "relu", 1.0, False)
    y = torch.empty(3, 4, 9, 7, dtype=dtype)
    bias = torch.full((4,), offset, dtype=dtype)
    mean, var = _triton_conv.accumulate(problem, _triton_conv.operand(states, False), bias, y, 4 * 63, moments=True)
    exact = y.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, exact.mean(1).float(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(var, exact.var(1, correction=0).float(), rtol=2e-5, atol=0)


def test_offsets_beyond_32_bits(sparse_memory):
    stride = 2**31 + 64
    x = sparse_memory(stride + 9, torch.float16).as_strided((2, 1, 3, 3), (stride, 9, 3, 1))
    x.copy_(torch.arange(18).view(2, 1, 3, 3) / 8)
    y, (dweight, dx) = run([torch.ones(1, 1, 3, 3).half(), None, None, None], [x], "triton", "identity", 1.0)
    assert y[:, 0, 1, 1].tolist() == [36 / 8, 117 / 8]
    assert dweight.isfinite().all() and dx.shape == x.shape
