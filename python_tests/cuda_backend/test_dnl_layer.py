"""The CUDA source of dnl_layer, run by the emulator: every case that it takes against float64, each gradient by name,
schedules, strides, traffic, and the reason of every refusal."""

import re

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.ops.dnl_layer import fused
from dnl_kernels.testing import assert_within_budget, cotangent, exactly
from dnl_kernels.testing.cuda_emulator import BACKEND, SCHEDULES
from dnl_kernels.testing.dnl_layer import CASES, Case, call, inputs

every_dtype = pytest.mark.parametrize("dtype", _backend.CUDA_DTYPES, ids=str)
# The named cases with a non-local kernel, as 1x1 convolutions; and more channels than a chunk, rows of 16 bytes.
TAKEN = {name: case._replace(size=1) for name, case in CASES.items() if case.kernel != "local"} | {
    "wide-images": Case((4, 8), (8, 16, 3), 6, 1, "softmax", 2, 0.5, True, True, True, True, "gelu"),
    "wide-tokens": Case((34,), (24, 8, 5), 8, 1, "gaussian", 1, 0.5, True, True, True, True, "leaky_relu"),
    "many-positions": Case((9, 31), (5, 2), 3, 1, "gaussian", 1, activation="tanh", batch=1),
    "no-positions": Case((0,), (3,), kernel="dot"),
    "one-position": Case((1,), (3,), kernel="softmax", residual=True),
}
every_case = pytest.mark.parametrize("case", TAKEN.values(), ids=TAKEN)


def run(case, states, tensors, backend):
    states = [s.detach().requires_grad_() for s in states]
    tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = call(case, states, tensors, backend)
    dy = cotangent(y)
    names = [*tensors, *(f"states[{j}]" for j in range(len(states)))]
    grads = torch.autograd.grad(y, [*tensors.values(), *states], dy)
    return y.detach(), dict(zip(names, grads, strict=True))


def check(case, states, tensors):
    y, grads = run(case, states, tensors, BACKEND)
    wide = [s.double() for s in states], {n: t.double() for n, t in tensors.items()}
    exact, exact_grads = exactly(lambda: run(case, *wide, "reference"), y.dtype, y.dtype)
    assert_within_budget("y", y, exact)
    for name, exact_grad in exact_grads.items():
        assert_within_budget(f"d{name}", grads[name], exact_grad)
    return y, grads


@every_case
@every_dtype
def test_against_float64(emulated, case, dtype):
    check(case, *inputs(case, dtype))


@pytest.mark.parametrize("kernel", ["softmax", "gaussian", "dot"])
@pytest.mark.parametrize("query, value, width, result", [(17, 32, 40, 21), (32, 9, 16, 33)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_heads(emulated, kernel, query, value, width, result, dtype):
    """On tensor cores: two tiles of 16 across a head's queries or values, several across y and the result."""
    case = Case((50,), (20, 13), width, kernel=kernel, heads=2, preactivation=True, activation="silu", batch=1)
    states, tensors = inputs(case, dtype)

    def draw(*shape):
        return (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    for name, rows in {"query": query, "key": query, "value": value}.items():
        if f"theta.{name}_weight" in tensors:
            tensors[f"theta.{name}_weight"] = draw(2 * rows, width) / query**0.25
            tensors[f"theta.{name}_bias"] = draw(2 * rows)
    tensors["theta.output_weight"] = draw(result, 2 * value)
    emulated.counts()
    check(case, states, tensors)
    assert emulated.counts()["mma"] > 0


@pytest.mark.parametrize("schedule", SCHEDULES[::3], ids=lambda s: f"{s.order}-{s.seed}", indirect=True)
@pytest.mark.parametrize("name", ["softmax", "gaussian-tokens"])
def test_every_schedule_gives_the_same_bits(emulated, schedule, name):
    case = TAKEN[name]._replace(positions=(5, 14) if name == "softmax" else (70,), batch=1)
    states, tensors = inputs(case, torch.float16)
    y, grads = run(case, states, tensors, BACKEND)
    emulated.configure()
    y0, grads0 = run(case, states, tensors, BACKEND)
    assert torch.equal(y, y0)
    for name, grad in grads.items():
        assert torch.equal(grad, grads0[name]), name


def test_states_are_read_where_they_lie(emulated):
    """Channels last, slices of a buffer, odd addresses; images whose rows are apart are copied."""
    case = TAKEN["wide-images"]
    states, tensors = inputs(case, torch.bfloat16)
    expected, expected_grads = run(case, states, tensors, BACKEND)
    buffer = torch.cat(states, 1)
    flat = torch.empty(states[0].numel() + 1, dtype=torch.bfloat16)
    flat[1:] = states[0].flatten()
    for given in (
        [s.to(memory_format=torch.channels_last) for s in states],
        buffer.split([s.shape[1] for s in states], 1),
        [flat[1:].view_as(states[0]), *states[1:]],
        [s.mT.contiguous().mT for s in states],
    ):
        y, grads = run(case, given, tensors, BACKEND)
        assert torch.equal(y, expected)
        for name, grad in grads.items():
            assert torch.equal(grad, expected_grads[name]), name


def test_distances_far_from_the_origin_keep_their_digits(emulated):
    case = TAKEN["gaussian-tokens"]._replace(residual=False)
    states, tensors = inputs(case, torch.float32)
    tensors["theta.query_bias"] = torch.full_like(tensors["theta.query_bias"], 1000.0)
    wide = [s.double() for s in states], {n: t.double() for n, t in tensors.items()}
    exact = exactly(lambda: call(case, *wide, "reference"), torch.float32)
    assert_within_budget("y", call(case, states, tensors, BACKEND), exact)


def test_only_the_wanted_gradients_are_computed(emulated):
    case = TAKEN["softmax"]
    states, tensors = inputs(case, torch.float32)
    y = call(case, [states[0].requires_grad_(), states[1]], tensors, BACKEND)
    emulated.counts()
    torch.autograd.grad(y.sum(), states[0])
    assert emulated.counts()["launches"] == 1  # no parameters, no sum over the samples
    tensors["theta.value_weight"].requires_grad_()
    y = call(case, [s.detach() for s in states], tensors, BACKEND)
    emulated.counts()
    assert torch.autograd.grad(y.sum(), tensors["theta.value_weight"])[0].abs().sum() > 0
    assert emulated.counts()["launches"] == 2


def test_derivatives_of_gradients_come_from_the_reference(emulated):
    case = TAKEN["gaussian"]._replace(batch=1)
    states, tensors = inputs(case, torch.float32)
    found = []
    for backend in (BACKEND, "reference"):
        x = states[0].detach().requires_grad_()
        (g,) = torch.autograd.grad(call(case, [x, states[1]], tensors, backend).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["wide-images", "wide-tokens"])
def test_each_state_is_read_once_and_the_output_written_once(emulated, name):
    case = TAKEN[name]._replace(positions=(8, 8) if name == "wide-images" else (64,))
    states, tensors = inputs(case, torch.bfloat16)
    emulated.counts()
    with emulated.tracing():
        y = call(case, states, tensors, BACKEND)
    assert emulated.counts()["launches"] == 1
    for tensor, wanted in [*((t, (1, 0)) for t in (*states, tensors["skip_input"])), (y, (0, 1))]:
        size = tensor.numel() * 2
        for traffic, times in zip(emulated.traffic(tensor), wanted, strict=True):
            assert traffic.requested == times * size and traffic.distinct <= times * (size + 64)
    for name_, t in tensors.items():  # each block reads each parameter's sectors once
        if name_.endswith("weight"):
            loads, _ = emulated.traffic(t)
            assert t.numel() * 2 * case.batch <= loads.by_blocks <= (t.numel() * 2 + 64) * case.batch, name_
    with emulated.tracing():
        _, grads = run(case, states, tensors, BACKEND)
    for j, state in enumerate(states):  # the forward pass, its second run in the backward pass, the gradients
        size = state.numel() * 2
        assert emulated.traffic(state)[0].requested == 3 * size
        assert emulated.traffic(grads[f"states[{j}]"])[1].requested == size


def refused(message, case, **options):
    states, tensors = inputs(case, torch.float32)
    with pytest.raises(ValueError, match=f"dnl_layer: backend='{BACKEND}' cannot run this call: .*{message}"):
        call(case, states, {**tensors, **options}, BACKEND)


def test_every_refusal_says_its_reason_and_the_next_smaller_call_runs(emulated):
    refused("has a non-local kernel, not 'local'", CASES["tokens"])
    refused("tokens or 1x1 convolutions, not 3x3", CASES["softmax"])
    refused("at most 128 states, not 129", Case((2,), (1,) * 129, kernel="dot"))
    most = Case((2,), (1,) * 128, kernel="dot", activation="tanh")
    check(most, *inputs(most, torch.float32))
    states, t = inputs(Case((2,), kernel="dot"), torch.float32)
    for width in (33, 32):
        weights = {n: torch.randn(width, 4) for n in ("query_weight", "key_weight", "value_weight")}
        weights["output_weight"] = torch.randn(4, width) / width
        arguments = (states, t["affine_weight"], None, weights)
        if width == 33:
            with pytest.raises(ValueError, match="heads of width 32 at most, not 33"):
                dnl.dnl_layer(*arguments, kernel="softmax", backend=BACKEND)
        else:
            y = dnl.dnl_layer(*arguments, kernel="softmax", backend=BACKEND)
            torch.testing.assert_close(y, dnl.dnl_layer(*arguments, kernel="softmax", backend="reference"))
    with pytest.raises(ValueError, match=r"supports float32, bfloat16, float16, not torch.float64"):
        call(TAKEN["dot"], *inputs(TAKEN["dot"], torch.float64), BACKEND)
    refused(r"a sample of 2000 positions needs \d+ bytes of shared memory, of which a block has 101376",
            Case((2000,), (3,), kernel="dot"))  # fmt: skip
    states, tensors = inputs(Case((1000,), (3,), kernel="dot", batch=0), torch.float32)  # fits forwards only
    assert call(Case((1000,), kernel="dot"), states, tensors, BACKEND).shape == (0, 1000, 4)
    tensors["affine_weight"].requires_grad_()
    with pytest.raises(ValueError, match=r"a sample of 1000 positions needs \d+ bytes of shared memory for backward"):
        call(Case((1000,), kernel="dot"), states, tensors, BACKEND)


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("options", [{}, {"preactivation": True, "output_norm": True}], ids=["plain", "norms"])
@pytest.mark.parametrize("width", [5, 20])
@every_dtype
def test_the_stated_shared_memory_is_what_the_kernels_ask_for(emulated, kernel, options, width, dtype, monkeypatch):
    """The emulator refuses 227 KiB and says how much it was: `limit` counts that and 2 KiB for tables of channels."""
    monkeypatch.setattr(_backend, "SMALLEST_SHARED_MEMORY", 1 << 30)
    case = Case((9001,), (3,), width, kernel=kernel, heads=2, batch=1, **options)
    states, tensors = inputs(case, dtype)

    def asked(call, *arguments):
        with pytest.raises(RuntimeError, match="dynamic shared memory") as error:
            call(*arguments)
        return int(re.search(r"(\d+) of dynamic shared memory", str(error.value)).group(1))

    norm = bool(options)
    half = dtype != torch.float32
    stated = [fused.shared_bytes(9001, width, width, 3, 3, kernel, back, norm, norm, half) for back in (False, True)]
    assert asked(call, case, states, tensors, BACKEND) + 2048 == stated[0]
    named = {name.removeprefix("theta."): t for name, t in tensors.items()}
    parameters = [named.get(name) for name in fused.PARAMETERS]
    dout = torch.zeros(1, 9001, width, dtype=dtype)
    static = (kernel, "identity", 1.0, "identity", 2, False)
    backward = torch.ops.dnl_emulated.dnl_layer_bwd
    assert asked(backward, dout, states, None, *parameters, *static, True, True) + 2048 == stated[1]
