"""dnl_layer against its plain definition: every case and dtype, every gradient, the two orders, and every error."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.testing import assert_within_budget, cotangent, exactly
from dnl_kernels.testing.dnl_layer import CASES, Case, call, inputs

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run(case, states, tensors, backend=None):
    states = [s.detach().requires_grad_() for s in states]
    tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = call(case, states, tensors, backend)
    dy = cotangent(y)
    names = [*tensors, *(f"states[{j}]" for j in range(len(states)))]
    return y, dict(zip(names, torch.autograd.grad(y, [*tensors.values(), *states], dy), strict=True))


@every_case
@pytest.mark.parametrize("dtype", _backend.ALL_DTYPES, ids=str)
def test_against_float64(case, dtype):
    states, tensors = inputs(case, dtype)
    y, grads = run(case, states, tensors)
    wide = [s.double() for s in states], {n: t.double() for n, t in tensors.items()}
    exact, exact_grads = exactly(lambda: run(case, *wide, "reference"), dtype, dtype)
    assert_within_budget("y", y, exact)
    for name, grad in grads.items():
        assert_within_budget(f"d{name}", grad, exact_grads[name])


def test_the_gaussian_kernel_is_the_formula():
    case = Case((5,), kernel="gaussian", residual=True, tau=0.125, biases=False)
    states, t = inputs(case, torch.float64)
    y = case.tau * torch.cat(states, -1) @ t["affine_weight"].mT
    q = y @ t["theta.query_weight"].mT
    v = y @ t["theta.value_weight"].mT
    w = torch.exp(-(q[:, :, None] - q[:, None]).square().sum(-1) / (2 * torch.exp(t["theta.rho"]) ** 2))
    n = (w / w.sum(-1, keepdim=True)) @ v @ t["theta.output_weight"].mT
    for backend in (None, "reference"):
        torch.testing.assert_close(call(case, states, t, backend), y + n)


def test_aggregate_then_transform_equals_transform_then_aggregate():
    """DNL (1) against its change of variables (1'): z^l from phi(z^i) with the column index of K shifted by one."""
    layers, tau, width = 4, 0.25, 3
    x0 = torch.randn(2, 5, width, dtype=torch.float64)
    k = torch.randn(layers, layers, width, width, dtype=torch.float64)
    a, a0 = torch.randn(2, layers, width, dtype=torch.float64), torch.randn(width, width, dtype=torch.float64)
    options = {"tau": tau, "skip_input": x0, "skip_weight": a0}
    aggregated = [x0]
    for layer in range(layers):
        weight = torch.cat(list(k[layer, : layer + 1]), 1)
        aggregated.append(dnl.dnl_layer(aggregated, weight, a[0, layer], activation="tanh", **options))
    z = []
    for layer in range(layers):
        own = tau * x0 @ k[layer, 0].mT + a[0, layer] + x0 @ a0.mT
        old = [torch.tanh(zi) @ k[layer, i + 1].mT for i, zi in enumerate(z)]
        z.append(own + tau * sum(old, torch.zeros_like(own)))
    for x, zl in zip(aggregated[1:], z, strict=True):
        torch.testing.assert_close(x, torch.tanh(zl), rtol=0, atol=1e-13)


def test_views_and_channels_last_are_read_where_they_lie():
    case = CASES["softmax"]
    states, tensors = inputs(case, torch.float64)
    expected = call(case, states, tensors)
    strided = [s.to(memory_format=torch.channels_last) for s in states]
    torch.testing.assert_close(call(case, strided, tensors), expected)


X, W = torch.zeros(2, 3, 4, 4), torch.zeros(4, 3, 3, 3)
T, V = torch.zeros(2, 5, 3), torch.zeros(4, 3)
P = torch.zeros(4, 4)
THETA = {"query_weight": P, "key_weight": P, "value_weight": P, "output_weight": P}
GAUSS = {"query_weight": P, "value_weight": P, "output_weight": P, "rho": torch.zeros(1)}
ERRORS = [
    ([], W, {}, ValueError, "states is empty"),
    ([X], [1], {}, TypeError, "affine_weight is of type list"),
    ([X], W[0], {}, ValueError, r"affine_weight is of shape \[3, 3, 3\]; expected \[G, sum C_j, k, k\]"),
    ([X], W[:, :, :2, :2], {}, ValueError, "affine_weight is .* with k odd"),
    ([X, X], W, {}, ValueError, r"affine_weight is of shape \[4, 3, 3, 3\]; expected \[4, 6, 3, 3\]"),
    ([T], W, {}, ValueError, r"states\[0\] is of shape \[2, 5, 3\]; expected \[B, C_j, H, W\]"),
    ([T[0]], V, {"kernel": "dot", "theta": THETA}, ValueError, r"states\[0\] is of shape \[5, 3\]; expected \[B, N"),
    ([X], W.double(), {}, TypeError, "affine_weight is of torch.float64; expected torch.float32"),
    ([X], W, {"affine_bias": torch.zeros(3)}, ValueError, r"affine_bias is of shape \[3\]; expected \[4\] \(G\)"),
    ([X], W, {"kernel": "rbf"}, ValueError, "kernel is 'rbf'; expected one of local, softmax, gaussian, dot"),
    ([X], W, {"activation": "x"}, ValueError, "activation is 'x'; expected one of identity"),
    ([X], W, {"input_activation": "x"}, ValueError, "input_activation is 'x'"),
    ([X], W, {"tau": 0}, ValueError, "tau is 0; expected a number > 0"),
    ([X], W, {"tau": "1/L"}, TypeError, "tau is of type str"),
    ([X], W, {"heads": 0}, ValueError, "heads is 0; expected an integer >= 1"),
    ([X], W, {"theta": THETA}, ValueError, "theta.query_weight is given; expected None: kernel='local'"),
    ([X], W, {"theta": [1]}, TypeError, "theta is of type list"),
    ([X], W, {"theta": {"query": P}}, ValueError, "theta is a mapping with 'query'; expected keys among query_weight"),
    ([X], W, {"kernel": "dot"}, ValueError, "theta.query_weight is None; expected a tensor, which kernel='dot' needs"),
    ([X], W, {"kernel": "gaussian", "theta": THETA}, ValueError, "theta.key_weight is given; expected None"),
    (
        [X],
        W,
        {"kernel": "gaussian", "theta": GAUSS, "heads": 2},
        ValueError,
        r"theta.rho is of shape \[1\]; expected \[2\]",
    ),
    (
        [X],
        W,
        {"kernel": "dot", "theta": THETA, "heads": 3},
        ValueError,
        r"theta.query_weight is .* expected \[heads \* D",
    ),
    ([X], W, {"kernel": "dot", "theta": {**THETA, "key_weight": V}}, ValueError, "theta.key_weight is of shape"),
    ([X], W, {"kernel": "dot", "theta": {**THETA, "output_weight": V}}, ValueError, "theta.output_weight is of shape"),
    ([X], W, {"kernel": "dot", "theta": {**THETA, "key_bias": V[0]}}, ValueError, r"theta.key_bias is of shape \[3\]"),
    ([X], W, {"residual": True}, ValueError, "residual is True; expected False for kernel='local'"),
    ([X], W, {"norm_scale": torch.ones(2)}, ValueError, r"norm_scale is of shape \[2\]; expected \[3\]"),
    ([X], W, {"output_shift": torch.ones(3)}, ValueError, r"output_shift is of shape \[3\]; expected \[4\]"),
    ([X], W, {"skip_weight": W}, ValueError, "skip_input and skip_weight is given without each other"),
    ([X], W, {"skip_input": X[:1], "skip_weight": W}, ValueError, r"skip_input is of shape \[1, 3, 4, 4\]"),
    ([X], W, {"skip_input": X, "skip_weight": W[:3]}, ValueError, r"skip_weight is of shape \[3, 3, 3, 3\]"),
]


@pytest.mark.parametrize("states, weight, keywords, error, message", ERRORS, ids=[e[-1][:40] for e in ERRORS])
def test_bad_input_is_named(states, weight, keywords, error, message):
    with pytest.raises(error, match="dnl_layer: " + message):
        dnl.dnl_layer(states, weight, **keywords)


def test_good_input_next_to_each_error_passes():
    assert dnl.dnl_layer([X], W, torch.zeros(4), tau=1, heads=1).shape == (2, 4, 4, 4)
    assert dnl.dnl_layer([T, T[..., :1]], torch.zeros(4, 4), theta={"rho": None}).shape == (2, 5, 4)
    assert dnl.dnl_layer([T[0]], V).shape == (5, 4)
    theta = dnl.NonLocalParameters(**GAUSS)
    assert dnl.dnl_layer([X], W, theta=theta, kernel="gaussian", residual=True).shape == (2, 4, 4, 4)
    assert dnl.dnl_layer([T], V, theta=THETA, kernel="dot", heads=2).shape == (2, 5, 4)
    skip = {"skip_input": T, "skip_weight": V, "skip_bias": torch.zeros(4)}
    assert dnl.dnl_layer([T], V, **skip, output_scale=torch.zeros(4)).shape == (2, 5, 4)


def test_a_mapping_and_the_named_tuple_are_the_same_theta():
    case = Case((5,), kernel="dot")
    states, tensors = inputs(case, torch.float32)
    theta = {n.removeprefix("theta."): t for n, t in tensors.items() if n.startswith("theta.")}
    others = {n: t for n, t in tensors.items() if not n.startswith("theta.")}
    y = dnl.dnl_layer(states, **others, theta=dnl.NonLocalParameters(**theta), kernel="dot")
    assert torch.equal(y, call(case, states, tensors))
