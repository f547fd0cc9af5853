"""The CUDA source of dense_sum, run by the emulator: every case against float64, schedules, access widths, traffic."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.testing import assert_within_budget, cotangent, exactly
from dnl_kernels.testing.cuda_emulator import BACKEND, SCHEDULES
from dnl_kernels.testing.dense_sum import CASES, Case, inputs

every_dtype = pytest.mark.parametrize("dtype", _backend.CUDA_DTYPES, ids=str)
WIDE = {  # shapes whose rows allow 16-byte accesses, and sizes beyond one tile
    "wide-scalar": Case((5, 512), 3),
    "wide-images": Case((3, 2, 8, 8), 4, 1),
    "wide-tokens": Case((70, 24), 3, -1),
    "many-tiles": Case((9, 1, 32, 32), 2, 1),
    "many-states": Case((16,), 65),
}


def run(weight, states, channel_dim, backend):
    weight, states = weight.detach().requires_grad_(), [s.detach().requires_grad_() for s in states]
    y = dnl.dense_sum(states, weight, channel_dim=channel_dim, backend=backend)
    dy = cotangent(y)
    return y, torch.autograd.grad(y, [weight, *states], dy)


def check(weight, states, channel_dim):
    y, grads = run(weight, states, channel_dim, BACKEND)
    wide = weight.double(), [s.double() for s in states]
    exact, exact_grads = exactly(lambda: run(*wide, channel_dim, "reference"), weight.dtype)
    assert_within_budget("y", y, exact)
    names = ["dweight", *(f"dstates[{j}]" for j in range(len(states)))]
    for name, a, e in zip(names, grads, exact_grads, strict=True):
        assert_within_budget(name, a, e)


@pytest.mark.parametrize("case", [*CASES.values(), *WIDE.values()], ids=[*CASES, *WIDE])
@every_dtype
def test_against_float64(emulated, case, dtype):
    weight, states = inputs(case, dtype)
    check(weight, states, 0 if case.channel_dim is None else case.channel_dim)


@pytest.mark.parametrize("schedule", SCHEDULES[::3], ids=lambda s: s.order, indirect=True)
@pytest.mark.parametrize("name", ["wide-images", "wide-tokens"])
def test_every_schedule_gives_the_same_bits(emulated, schedule, name):
    case = WIDE[name]
    weight, states = inputs(case, torch.bfloat16)
    y, grads = run(weight, states, case.channel_dim, BACKEND)
    emulated.configure()
    y0, grads0 = run(weight, states, case.channel_dim, BACKEND)
    assert all(map(torch.equal, (y, *grads), (y0, *grads0)))


@every_dtype
def test_strided_and_misaligned_states(emulated, dtype):
    weight = torch.randn(3, 8, dtype=dtype)
    flat = torch.randn(3 * 8 * 16 + 1, dtype=dtype)
    odd = flat[1:].view(3, 8, 16)  # contiguous, not on a 16-byte boundary
    check(weight, [odd, odd.flip(0), odd.mT.contiguous().mT], 1)


def test_only_the_wanted_gradients_are_computed(emulated):
    x, w = torch.randn(4), torch.randn(1, requires_grad=True)
    y = dnl.dense_sum([x], w, backend=BACKEND)
    emulated.counts()
    assert torch.autograd.grad(y.sum(), w)[0].shape == (1,)
    assert emulated.counts()["launches"] == 2  # the tiles, their sum
    x.requires_grad_()
    y = dnl.dense_sum([x], w.detach(), backend=BACKEND)
    emulated.counts()
    assert torch.autograd.grad(y.sum(), x)[0].shape == (4,)
    assert emulated.counts()["launches"] == 1


def test_too_many_states_and_float64_are_refused_with_the_reason(emulated):
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="takes at most 256 states, not 257"):
        dnl.dense_sum([x] * 257, torch.zeros(257), backend=BACKEND)
    assert dnl.dense_sum([x + 1] * 256, torch.ones(256), backend=BACKEND).tolist() == [256, 256]
    with pytest.raises(ValueError, match="supports float32, bfloat16, float16, not torch.float64"):
        dnl.dense_sum([x.double()], torch.zeros(1).double(), backend=BACKEND)


@pytest.mark.parametrize("channel_dim, shape", [(None, (4, 6, 16, 16)), (1, (4, 6, 16, 16)), (-1, (256, 96))])
def test_each_state_is_read_once(emulated, channel_dim, shape):
    """Traffic against the compulsory bytes: 1.02 forward, 1.10 backward; the weights come on top."""
    weight, states = inputs(Case(shape, 5, channel_dim), torch.bfloat16)
    size = states[0].numel() * 2
    with emulated.tracing():
        y = dnl.dense_sum(states, weight, channel_dim=channel_dim or 0, backend=BACKEND)
    for tensor, wanted in [*((s, (size, 0)) for s in states), (y, (0, size))]:
        for traffic, bytes_ in zip(emulated.traffic(tensor), wanted, strict=True):
            assert traffic.requested == bytes_ and traffic.by_blocks <= 1.02 * bytes_ + 32
    dy = torch.ones_like(y)
    with emulated.tracing():
        dstates, _ = torch.ops.dnl_emulated.dense_sum_bwd(
            dy, states, weight, (channel_dim or 0) % len(shape), True, True
        )
    for tensor, wanted in [*((s, (size, 0)) for s in states), *((d, (0, size)) for d in dstates), (dy, (size, 0))]:
        for traffic, bytes_ in zip(emulated.traffic(tensor), wanted, strict=True):
            assert traffic.requested == bytes_ and traffic.by_blocks <= 1.10 * bytes_ + 32
