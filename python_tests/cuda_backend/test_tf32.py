"""float32 multiplied as tf32 by the CUDA source of dense_conv2d: where torch's setting allows it and nowhere else, with
the error that 10 bits of mantissa explain."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.testing import assert_within_budget, cotangent, cuda_traffic, exactly
from dnl_kernels.testing.cuda_emulator import BACKEND, SCHEDULES
from dnl_kernels.testing.dense_conv2d import NAMES, Case, inputs, tf32_bounds

from .test_dense_conv2d import MORE, TAKEN, run

CASES = {**TAKEN, **MORE}


@pytest.fixture
def tf32(emulated):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield emulated
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def named(parameters, states, backend, activation, scale):
    y, grads = run(parameters, states, backend, activation, scale)
    names = [name for name, p in zip(NAMES, parameters, strict=True) if p is not None]
    names += [f"states[{j}]" for j in range(len(states))]
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def check(parameters, states, activation="relu", scale=1.0):
    double = [p if p is None else p.double() for p in parameters], [s.double() for s in states]
    found = named(parameters, states, BACKEND, activation, scale)
    exact = exactly(lambda: named(*double, "reference", activation, scale), torch.float32)
    most = tf32_bounds(parameters, states, activation, scale, cotangent(found["y"]))
    if "bias" in found:
        assert_within_budget("dbias", found["bias"], exact["bias"])
    for name in found.keys() - {"bias"}:
        error, size = (found[name] - exact[name].value).abs(), exact[name].value.abs()
        assert (error <= most[name] + 1e-5 * size + 1e-6).all(), (name, (error - most[name]).max())
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(tf32, case):
    tf32.counts()
    check(*inputs(case, torch.float32), case.activation, case.scale)
    assert (tf32.counts()["mma"] > 0) == (case.batch > 0)


def test_the_error_is_that_of_tf32_and_float32_is_the_default(emulated):
    """Known by the products that 10 bits cannot hold: 1 + 2^-11 squared."""
    x, weight = torch.full((1, 1, 1, 1), 1 + 2.0**-12), torch.full((1, 1, 1, 1), 1 + 2.0**-11)
    assert dnl.dense_conv2d([x], weight, backend=BACKEND).item() == x.item() * weight.item()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:  # 2^-12 is rounded off, 2^-11 is a tie and goes away from zero
        assert dnl.dense_conv2d([x], weight, backend=BACKEND).item() == 1 + 2.0**-10
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_every_setting_of_torch_is_obeyed():
    """The two older interfaces, after each other; the tests beside this one use the newer one."""
    assert not _backend.allows_tf32(torch.float32)
    try:
        for precision, allowed in (("high", True), ("highest", False), ("medium", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            assert _backend.allows_tf32(torch.float32) == allowed
        torch.backends.cuda.matmul.allow_tf32 = True
        assert _backend.allows_tf32(torch.float32) and not _backend.allows_tf32(torch.bfloat16)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = True  # the default, and of cudnn only
        assert not _backend.allows_tf32(torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("schedule", SCHEDULES[::3], ids=lambda s: f"{s.order}-{s.seed}", indirect=True)
@pytest.mark.parametrize("outputs", [5, 9])
def test_every_schedule_gives_the_same_bits(tf32, schedule, outputs):
    """Sums of the weight gradient in the place of the activations, and, of several octets, beside them."""
    parameters, states = inputs(Case(2, (12, 7), 12, 16, outputs), torch.float32)
    y, grads = run(parameters, states, BACKEND, "silu", 1.0)
    tf32.configure()
    y0, grads0 = run(parameters, states, BACKEND, "silu", 1.0)
    assert all(map(torch.equal, (y, *grads), (y0, *grads0)))


def test_other_types_do_not_change(tf32):
    parameters, states = inputs(Case(1, (5,), 4, 6, 3), torch.bfloat16)
    y, grads = run(parameters, states, BACKEND, "relu", 1.0)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    y0, grads0 = run(parameters, states, BACKEND, "relu", 1.0)
    assert all(map(torch.equal, (y, *grads), (y0, *grads0)))


def test_nan_stays_in_its_neighbourhood(tf32):
    x = torch.zeros(1, 2, 6, 6)
    x[0, 1, 5, 5] = torch.nan
    y = dnl.dense_conv2d([x, x], torch.ones(1, 4, 3, 3), activation="relu", backend=BACKEND)
    assert y.isnan().nonzero()[:, 2:].tolist() == [[4, 4], [4, 5], [5, 4], [5, 5]]


def test_traffic(tf32):
    for row in cuda_traffic.conv_rows(tf32, torch.float32, tf32=True):
        assert 1 <= row.ratio <= row.bar, row


def test_compiled_code_follows_the_setting(emulated):
    """Chosen while tracing, without a graph break, and compiled anew after a change."""
    (weight, *_), states = inputs(Case(1, (3, 4), 5, 6, 3), torch.float32)
    call = lambda x, w: dnl.dense_conv2d(x, w, activation="tanh", backend=BACKEND)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    try:
        for allowed in (False, True, False):
            torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
            emulated.counts()
            y = compiled(states, weight)
            assert (emulated.counts()["mma"] > 0) == allowed
            assert torch.equal(y, call(states, weight))
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
