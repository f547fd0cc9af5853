"""dense_linear against float64: every case, dtype and gradient, what it keeps for backward, and every error."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.testing import assert_within_budget, cotangent, exactly
from dnl_kernels.testing.dense_linear import CASES, inputs

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", _backend.ALL_DTYPES, ids=str)


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
    y, grads = run(case, tensors, "cpu")
    exact, exact_grads = exactly(lambda: run(case, wide, "reference"), y.dtype)
    assert_within_budget("y", y, exact)
    for name, grad in grads.items():
        assert_within_budget(f"d{name}", grad, exact_grads[name])


@every_case
@every_dtype
def test_against_float64(case, dtype):
    check(case, inputs(case, dtype))


def test_the_reference_is_the_formula():
    case = CASES["preactivation"]
    t = inputs(case, torch.float64)
    expected = torch.zeros(3, 6, 4, dtype=torch.float64)
    start = 0
    for x in t["states"]:
        end = start + x.shape[-1]
        z = torch.relu(x * t["norm_scale"][start:end] + t["norm_shift"][start:end])
        expected += case.scale * torch.einsum("bnc,dc->bnd", z, t["weight"][:, start:end])
        start = end
    torch.testing.assert_close(run(case, t, "reference")[0], expected)


@every_dtype
def test_strided_states(dtype):
    case = CASES["preactivation"]
    tensors = inputs(case, dtype)
    wide = torch.randn(3, 6, 16, dtype=dtype)
    tensors["states"] = [wide[..., ::2], wide[..., 12:].flip(1), wide.transpose(0, 1)[:, :, :4].transpose(0, 1)]
    check(case, tensors)


def test_only_the_states_are_kept_for_backward():
    states = [torch.randn(64, 8, requires_grad=True) for _ in range(3)]
    weight, scale = torch.randn(4, 24, requires_grad=True), torch.ones(24, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        dnl.dense_linear(states, weight, norm_scale=scale, activation="gelu", backend="cpu")
    allowed = {t.data_ptr() for t in (*states, weight, scale)}
    assert kept and set(kept) <= allowed


def test_only_the_wanted_gradients_are_computed():
    x, w = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)
    y = dnl.dense_linear([x, x[:, :0]], w)
    assert torch.autograd.grad(y.sum(), w)[0].shape == w.shape
    b = torch.zeros(2, requires_grad=True)
    y = dnl.dense_linear([x], w.detach(), b)
    assert torch.autograd.grad(y.sum(), b)[0].tolist() == [4.0, 4.0]


def test_a_state_given_twice_gets_both_gradients():
    x = torch.randn(1, 1, dtype=torch.float64, requires_grad=True)
    y = dnl.dense_linear([x, x], torch.tensor([[2.0, 3.0]], dtype=torch.float64), scale=2.0)
    assert torch.autograd.grad(y, x)[0].item() == 10.0


X, W = torch.zeros(2, 3), torch.zeros(4, 3)
ERRORS = [
    ([], W, {}, ValueError, "states is empty"),
    ([X[0, 0]], W, {}, ValueError, r"states\[0\] is of shape \[\]; expected \[..., C_0\]"),
    ([X, X[:1]], W, {}, ValueError, r"states\[1\] is of shape \[1, 3\]; expected \[2, 'C_j'\]"),
    ([X, X.double()], W, {}, TypeError, r"states\[1\] is of torch.float64"),
    ([X, X], W, {}, ValueError, r"weight is of shape \[4, 3\]; expected \[4, 6\] \(D, sum C_j\)"),
    ([X], W[0], {}, ValueError, r"weight is of shape \[3\]; expected"),
    ([X], W.double(), {}, TypeError, "weight is of torch.float64; expected torch.float32"),
    ([X], [1.0], {}, TypeError, "weight is of type list"),
    ([X], W, {"bias": torch.zeros(3)}, ValueError, r"bias is of shape \[3\]; expected \[4\] \(D\)"),
    ([X], W, {"bias": torch.zeros(4).double()}, TypeError, "bias is of torch.float64"),
    ([X], W, {"norm_scale": torch.zeros(2)}, ValueError, r"norm_scale is of shape \[2\]; expected \[3\] \(sum C_j\)"),
    ([X], W, {"norm_shift": torch.zeros(1, 3)}, ValueError, r"norm_shift is of shape \[1, 3\]"),
    ([X], W, {"norm_shift": 1.0}, TypeError, "norm_shift is of type float; expected a tensor"),
    ([X], W, {"activation": "swish"}, ValueError, "activation is 'swish'; expected one of identity, relu, leaky_relu"),
    ([X], W, {"scale": "1"}, TypeError, "scale is of type str; expected a number"),
    ([X], W.to("meta"), {}, ValueError, "weight is on meta; expected cpu"),
]


@pytest.mark.parametrize("states, weight, keywords, error, message", ERRORS, ids=[e[-1][:40] for e in ERRORS])
def test_bad_input_is_named(states, weight, keywords, error, message):
    with pytest.raises(error, match=message):
        dnl.dense_linear(states, weight, **keywords)


def test_good_input_next_to_each_error_passes():
    every = {"bias": torch.zeros(4), "norm_scale": torch.ones(3), "norm_shift": torch.zeros(3), "scale": 2}
    assert dnl.dense_linear([X], W, **every, activation="silu").shape == (2, 4)
    assert dnl.dense_linear((X, X[:, :1]), torch.zeros(4, 4)).shape == (2, 4)
    assert dnl.dense_linear([X[0]], W).shape == (4,)
