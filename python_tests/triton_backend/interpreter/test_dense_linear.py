"""dense_linear's Triton kernels against float64: the same named cases as every other backend, and their own corners."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend, _triton_conv
from dnl_kernels._triton_conv import operand
from dnl_kernels.testing import ACTIVATIONS, assert_within_budget, cotangent, exactly
from dnl_kernels.testing.dense_linear import CASES, Case, inputs
from dnl_kernels.testing.triton_interpreter import traffic

every_dtype = pytest.mark.parametrize("dtype", _backend.TRITON.dtypes, ids=str)
OWN_CASES = {
    "several-tiles": Case((150,), (70, 3, 40), 67, norm=True, activation="relu", scale=0.5),
    "wide-output": Case((20,), (16, 16), 130, norm=True, activation="silu"),
    "no-outputs": Case((4,), (2, 3), 0),
    "no-channels-at-all": Case((4,), (0, 0), 3),
}


def run(case, tensors, backend):
    """The output, and the gradient of every tensor by name."""
    states = [s.detach().requires_grad_() for s in tensors["states"]]
    others = {n: t.detach().requires_grad_() for n, t in tensors.items() if n != "states" and t is not None}
    y = dnl.dense_linear(states, **others, activation=case.activation, scale=case.scale, backend=backend)
    dy = cotangent(y)
    names = [*others, *(f"states[{j}]" for j in range(len(states)))]
    return y, dict(zip(names, torch.autograd.grad(y, [*others.values(), *states], dy), strict=True))


def check(case, tensors):
    wide = {n: [s.double() for s in t] if n == "states" else t if t is None else t.double() for n, t in tensors.items()}
    y, grads = run(case, tensors, "triton")
    exact, exact_grads = exactly(lambda: run(case, wide, "reference"), y.dtype, y.dtype)
    assert_within_budget("y", y, exact)
    for name, grad in grads.items():
        assert_within_budget(f"d{name}", grad, exact_grads[name])


@pytest.mark.parametrize("case", {**CASES, **OWN_CASES}.values(), ids={**CASES, **OWN_CASES})
@every_dtype
def test_against_float64(case, dtype):
    check(case, inputs(case, dtype))


def test_a_weight_gradient_over_several_steps(monkeypatch):
    """Of one program, as where there are more tiles of positions than programs."""
    monkeypatch.setattr(_triton_conv, "SPLITS", 1)
    check(OWN_CASES["several-tiles"], inputs(OWN_CASES["several-tiles"], torch.float32))


def test_more_states_than_one_launch_writes_pointers():
    case = Case((3,), (1,) * 66, 2, norm=True)
    check(case, inputs(case, torch.float32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 30.0])
def test_every_activation_near_zero_and_far_out(activation, magnitude):
    case = Case((24,), (5,), 3, activation=activation, bias=False)
    tensors = inputs(case, torch.float32)
    check(case, {**tensors, "states": [magnitude * s for s in tensors["states"]]})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_zero_at_nan_and_at_infinity(activation):
    """Values and derivatives at zero are torch's, NaN stays NaN, and infinity goes to the limit, which torch's gelu
    reaches on some processors only (elsewhere it is inf * 0 = NaN)."""
    x = torch.tensor([[0.0], [float("nan")], [float("inf")]])
    found = []
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        y = dnl.dense_linear([leaf], torch.ones(1, 1), activation=activation, backend=backend)
        found.append((y, torch.autograd.grad(y[:1].sum(), leaf)[0][:1]))
    (y, slope), (expected, expected_slope) = found
    torch.testing.assert_close((y[:2], slope), (expected[:2], expected_slope), equal_nan=True)
    assert y[1].isnan() and y[2].item() == (1.0 if activation == "tanh" else float("inf"))


@every_dtype
def test_strided_states(dtype):
    case = CASES["preactivation"]
    tensors = inputs(case, dtype)
    wide = torch.randn(3, 6, 16, dtype=dtype)
    tensors["states"] = [wide[..., ::2], wide[..., 12:].flip(1), wide.transpose(0, 1)[:, :, :4].transpose(0, 1)]
    check(case, tensors)
    check(case, {**tensors, "weight": tensors["weight"].T.contiguous().T})


def test_neighbours_in_a_buffer_are_read_in_place_as_one_state(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a state was copied"))
    buffer = torch.randn(3, 7, 20)
    a, b, c, d = buffer.split([4, 0, 6, 10], -1)
    found = operand([a, b, c, d], True, merge=True)
    assert (found.channels, found.firsts, found.tensors[0].data_ptr()) == ([20], [0], buffer.data_ptr())
    assert operand([a, c, a], True, merge=True).channels == [10, 4]
    assert operand([a, d, c], True, merge=True).firsts == [0, 4, 14]
    assert operand([a, c], True).channels == [4, 6]
    assert operand([torch.randn(3, 7, 4), a], True, merge=True).channels == [4, 4]


@every_dtype
def test_slices_of_a_buffer(dtype):
    case = CASES["preactivation"]
    tensors = inputs(case, dtype)
    buffer = torch.randn(3, 6, 20, dtype=dtype)
    check(case, {**tensors, "states": list(buffer[..., 2:18].split([8, 4, 4], -1))})


def test_an_expanded_output_gradient():
    x, w = torch.randn(2, 6, 3, requires_grad=True), torch.randn(4, 3)
    grads = [torch.autograd.grad(dnl.dense_linear([x], w, backend=b).sum(), x)[0] for b in ("triton", "reference")]
    torch.testing.assert_close(*grads)


LEAVES = ("weight", "bias", "norm_scale", "norm_shift", "states[0]")


@pytest.mark.parametrize("wanted", LEAVES)
def test_only_the_wanted_gradient_is_computed(wanted):
    case = Case((4,), (3,), 2, norm=True)
    tensors = inputs(case, torch.float32)
    leaves = dict(zip(LEAVES, [*(tensors[n] for n in LEAVES[:-1]), tensors["states"][0]], strict=True))
    leaves[wanted].requires_grad_()
    *others, state = leaves.values()
    y = dnl.dense_linear([state], others[0], others[1], norm_scale=others[2], norm_shift=others[3], backend="triton")
    with traffic() as count:
        gradient = torch.autograd.grad(y.sum(), leaves[wanted])[0]
    assert gradient.shape == leaves[wanted].shape and gradient.isfinite().all()
    written = {name for name, bytes_ in count.by_tensor.items() if bytes_["store"]} - {"TABLE"}
    expected = {"bias": set(), "states[0]": {"DX"}}.get(wanted, {"PARTIAL"})
    assert written == expected


def test_tf32_only_where_torch_allows_it():
    case = Case((40,), (32,), 16, bias=False)
    tensors = inputs(case, torch.float32)
    exact = tensors["states"][0].double() @ tensors["weight"].double().T
    error = {}
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        y = dnl.dense_linear(tensors["states"], tensors["weight"], backend="triton")
        error[precision] = (y - exact).abs().max().item()
    torch.set_float32_matmul_precision(before)
    assert error["highest"] < 1e-5 < 1e-4 < error["high"] < 1e-1


def test_results_do_not_depend_on_the_run():
    case = Case((150,), (20, 3), 5, norm=True, activation="relu")
    tensors = inputs(case, torch.float32)
    (a, da), (b, db) = run(case, tensors, "triton"), run(case, tensors, "triton")
    assert torch.equal(a, b) and all(torch.equal(da[name], db[name]) for name in da)


def test_offsets_beyond_32_bits(sparse_memory):
    stride = 2**31 + 64
    x = sparse_memory(stride + 8, torch.float16).as_strided((2, 8), (stride, 1))
    x.copy_(torch.arange(16).view(2, 8))
    case = Case((2,), (8,), 1)
    weight = torch.ones(1, 8, dtype=torch.float16)
    y, grads = run(case, {"states": [x], "weight": weight}, "triton")
    assert y.flatten().tolist() == [28.0, 92.0]
    assert grads["weight"].tolist() == (cotangent(y).T @ x).tolist()
