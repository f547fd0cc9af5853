"""The CUDA source of dense_conv2d, run by the emulator: every case against float64, schedules, reasons, traffic."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.ops.dense_conv2d.api import CUDA_SIZES, _cuda_limit
from dnl_kernels.testing import ACTIVATIONS, assert_within_budget, cotangent, cuda_traffic, exactly
from dnl_kernels.testing.cuda_emulator import BACKEND, SCHEDULES
from dnl_kernels.testing.dense_conv2d import CASES, NAMES, Case, inputs

every_dtype = pytest.mark.parametrize("dtype", _backend.CUDA_DTYPES, ids=str)


def limit(case: Case) -> str | None:
    return _cuda_limit(len(case.channels), case.outputs, case.size, case.width)


TAKEN = {name: case for name, case in CASES.items() if limit(case) is None}
MORE = {  # every octet of outputs, 16-byte accesses, several tiles and chunks, images that share a tile
    "growth-8": Case(2, (8, 8, 8), 8, 16, 8),
    "growth-12": Case(1, (16, 12), 9, 8, 12, activation="silu"),
    "growth-24": Case(1, (5, 24), 6, 8, 24),
    "growth-32": Case(1, (20,), 5, 9, 32, size=1, activation="gelu"),
    "bands": Case(1, (4, 3), 70, 40, 6),
    "seven-images": Case(7, (3, 3), 8, 8, 6, activation="leaky_relu"),
    "widest": Case(1, (2,), 3, 128, 17),
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
    y, grads = run(parameters, states, BACKEND, activation, scale)
    exact, exact_grads = exactly(lambda: run(*double, "reference", activation, scale), y.dtype, y.dtype)
    assert_within_budget("y", y, exact)
    names = [n for n, p in zip(NAMES, parameters, strict=True) if p is not None]
    names += [f"states[{j}]" for j in range(len(states))]
    for name, a, e in zip(names, grads, exact_grads, strict=True):
        assert_within_budget("d" + name, a, e)


@pytest.mark.parametrize("case", [*TAKEN.values(), *MORE.values()], ids=[*TAKEN, *MORE])
@every_dtype
def test_against_float64(emulated, case, dtype):
    check(*inputs(case, dtype), case.activation, case.scale)


def test_the_cases_that_are_not_taken_say_why(emulated):
    assert {name: limit(CASES[name]) for name in CASES if name not in TAKEN} == {
        "five-by-five": "takes filters of 1x1 and 3x3, not 5x5",
        "filter-larger-than-image": "takes filters of 1x1 and 3x3, not 7x7",
        "wide-rows": "takes at most 128 pixels in a row, not 1500",
    }
    x = torch.zeros(1, 1, 1, 1)
    for states, weight, message in [
        ([x] * 97, torch.zeros(1, 97, 1, 1), "takes at most 96 states, not 97"),
        ([x], torch.zeros(33, 1, 1, 1), "takes at most 32 outputs, not 33"),
        ([x.double()], torch.zeros(1, 1, 1, 1).double(), "supports float32, bfloat16, float16, not torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            dnl.dense_conv2d(states, weight, backend=BACKEND)
    assert dnl.dense_conv2d([x + 1] * 96, torch.ones(32, 96, 1, 1), backend=BACKEND).unique().tolist() == [96]
    assert CUDA_SIZES == (1, 3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("magnitude", [1e-4, 30.0])
def test_every_activation_near_zero_and_far_out(emulated, activation, magnitude):
    parameters, states = inputs(Case(1, (5,), 4, 7, 3, norm=False), torch.float32)
    check(parameters, [magnitude * s for s in states], activation)


@pytest.mark.parametrize("schedule", SCHEDULES[::3], ids=lambda s: f"{s.order}-{s.seed}", indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_schedule_gives_the_same_bits(emulated, schedule, dtype):
    case = Case(2, (12, 7), 8, 8, 9)
    parameters, states = inputs(case, dtype)
    y, grads = run(parameters, states, BACKEND, "silu", 1.0)
    emulated.configure()
    y0, grads0 = run(parameters, states, BACKEND, "silu", 1.0)
    assert all(map(torch.equal, (y, *grads), (y0, *grads0)))


@every_dtype
def test_slices_of_a_prefix_buffer_and_other_strides(emulated, dtype):
    parameters, _ = inputs(Case(2, (3, 5, 2, 2), 4, 8, 3), dtype)
    buffer = torch.randn(2, 11, 4, 8, dtype=dtype)
    states = [
        buffer[:, :3],
        buffer[:, 3:8],
        buffer[:, 8:10].contiguous(memory_format=torch.channels_last),
        torch.randn(2, 4, 4, 17, dtype=dtype)[:, ::2, :, 1:9].flip(2),
    ]
    check(parameters, states)


def test_pieces_of_a_buffer_are_read_in_place(emulated):
    """Slices of channels are no copies: the kernel's loads are in the buffer itself."""
    buffer = torch.randn(1, 9, 8, 8)
    with emulated.tracing():
        dnl.dense_conv2d([buffer[:, :4], buffer[:, 4:9]], torch.zeros(3, 9, 3, 3), backend=BACKEND)
    assert emulated.traffic(buffer)[0].requested == buffer.numel() * 4


def test_misaligned_states(emulated):
    for dtype in (torch.bfloat16, torch.float32):
        parameters, _ = inputs(Case(1, (4,), 8, 8, 3), dtype)
        check(parameters, [torch.randn(257, dtype=dtype)[1:].view(1, 4, 8, 8)])


@pytest.mark.parametrize("wanted", range(6))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_only_the_wanted_gradient_is_computed(emulated, wanted, dtype):
    parameters, states = inputs(Case(2, (3, 2), 4, 5, 3), dtype)

    def gradient(tensors, backend):
        leaves = [t.detach() for t in tensors]
        leaves[wanted].requires_grad_()
        w, b, s, h, *x = leaves
        y = dnl.dense_conv2d(x, w, b, norm_scale=s, norm_shift=h, activation="silu", backend=backend)
        return torch.autograd.grad(y.sum(), leaves[wanted])[0]

    tensors = (*parameters, *states)
    exact = exactly(lambda: gradient([t.double() for t in tensors], "reference"), dtype, dtype)
    assert_within_budget("gradient", gradient(tensors, BACKEND), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_tiles_than_rows_of_partial_sums(emulated, dtype):
    """264 blocks of threads share 266 tiles: two of them add a second tile to their sums."""
    parameters, states = inputs(Case(266, (2,), 31, 22, 1, size=1), dtype)
    emulated.counts()
    torch.ops.dnl_emulated.dense_conv2d_bwd(
        states[0][:, :1], states, parameters[0], None, None, "relu", 1.0, True, True, True, True
    )
    assert emulated.counts()["blocks"] == 264 + 1  # the second launch adds the rows up
    check(parameters, states)


def test_only_one_half_of_the_normalisation(emulated):
    (weight, bias, scale, shift), states = inputs(Case(1, (3, 2), 4, 5, 3), torch.float16)
    check([weight, bias, scale, None], states)
    check([weight, bias, None, shift], states)


def test_nothing_to_do(emulated):
    for shape, outputs in (((2, 3, 0, 4), 2), ((2, 3, 4, 4), 0), ((2, 0, 3, 3), 2), ((0, 2, 3, 3), 2)):
        x, weight = torch.zeros(shape, requires_grad=True), torch.zeros(outputs, shape[1], 3, 3, requires_grad=True)
        bias = torch.ones(outputs, requires_grad=True)
        y = dnl.dense_conv2d([x], weight, bias, backend=BACKEND)
        assert y.shape == (shape[0], outputs, *shape[2:]) and (y == 1).all()
        for gradient, leaf in zip(torch.autograd.grad(y.sum(), (x, weight)), (x, weight), strict=True):
            assert gradient.shape == leaf.shape and (gradient == 0).all()


def test_nan_stays_in_its_neighbourhood(emulated):
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(1, 2, 6, 6, dtype=dtype)
        x[0, 1, 5, 5] = torch.nan
        y = dnl.dense_conv2d([x, x], torch.ones(1, 4, 3, 3, dtype=dtype), activation="relu", backend=BACKEND)
        assert y.isnan().nonzero()[:, 2:].tolist() == [[4, 4], [4, 5], [5, 4], [5, 5]]


@every_dtype
def test_sums_for_the_next_normalisation(emulated, dtype):
    """[sum y, sum y^2] of what was stored, of each output, over several tiles."""
    (weight, bias, scale, shift), states = inputs(Case(3, (5,), 33, 40, 11), dtype)
    y, sums = torch.ops.dnl_emulated.dense_conv2d_moments_fwd(states, weight, bias, scale, shift, "relu", 0.5)
    plain = torch.ops.dnl_emulated.dense_conv2d_fwd(states, weight, bias, scale, shift, "relu", 0.5)
    assert torch.equal(y, plain) and sums.dtype == torch.float32
    exact = torch.stack([y.double().sum((0, 2, 3)), y.double().square().sum((0, 2, 3))])
    size = torch.stack([y.double().abs().sum((0, 2, 3)), exact[1]])
    assert ((sums - exact).abs() <= 1e-5 * size).all()


@every_dtype
def test_traffic_and_bank_conflicts(emulated, dtype):
    rows = cuda_traffic.conv_rows(emulated, dtype)
    assert len(rows) == 6
    for row in rows:
        assert 1 <= row.ratio <= row.bar, row
        assert row.conflicts == 0, row
