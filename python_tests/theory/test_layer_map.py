"""The layer map sigma o N: closed-form backward of every kernel and normalisation, stability, identities."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dnl_kernels import theory
from dnl_kernels.theory import (
    EmbeddedGaussianKernel,
    GaussianKernel,
    LayerMap,
    LocalKernel,
    NonLocalOperator,
    RBFKernel,
)

n, c = 6, 3
PAIRS = [(kernel, norm) for kernel in ("dot", "rbf") for norm in ("row", "const", "none", "sym")]


def operator(kernel, norm, **options):
    record = EmbeddedGaussianKernel() if kernel == "dot" else RBFKernel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NonLocalOperator(record, norm, positions=n, value="curve", **options)


def closed_form(y, V, M, h, G, kernel, norm):
    """dJ/dy, dJ/dV, dJ/dM, dJ/dlog h of J = <G, N(y)> by the formulas of section 3.2, in numpy."""
    gaps = ((y[:, None] - y[None]) ** 2).sum(-1)
    s = y @ M @ y.T if kernel == "dot" else -gaps / (2 * h * h)
    kappa = np.exp(s)
    C = kappa.sum(1)
    w = {"row": kappa / C[:, None], "const": kappa / n, "none": kappa, "sym": kappa / np.sqrt(np.outer(C, C))}[norm]
    v = y @ V.T
    gamma = G @ v.T
    if norm == "row":
        delta = w * (gamma - (G * (w @ v)).sum(1, keepdims=True))
    elif norm == "sym":
        r = (gamma * w).sum(1) + (gamma * w).sum(0)
        delta = w * gamma - kappa * (r / C)[:, None] / 2
    else:
        delta = w * gamma
    dv = w.T @ G
    dy = dv @ V
    if kernel == "dot":
        dy = dy + delta @ y @ M.T + delta.T @ y @ M
        return dy, dv.T @ y, y.T @ delta @ y
    D = delta + delta.T
    dy = dy - (D.sum(1)[:, None] * y - D @ y) / h**2
    return dy, dv.T @ y, -2 * (delta * s).sum()


@pytest.mark.parametrize(("kernel", "norm"), PAIRS)
def test_backward_equals_the_closed_form(kernel, norm):
    y = torch.randn(n, c, dtype=torch.float64, requires_grad=True)
    V = torch.randn(c, c, dtype=torch.float64, requires_grad=True)
    shape = (
        torch.randn(c, c, dtype=torch.float64) / 2
        if kernel == "dot"
        else torch.tensor(math.log(0.8), dtype=torch.float64)
    )
    shape.requires_grad_()
    G = torch.randn(n, c, dtype=torch.float64)
    vartheta = torch.cat([shape.reshape(-1), (V - torch.eye(c, dtype=torch.float64)).reshape(-1)])
    out = operator(kernel, norm)(y.reshape(-1), vartheta)
    found = torch.autograd.grad((out.reshape(n, c) * G).sum(), (y, V, shape))
    M = shape.detach().numpy() if kernel == "dot" else None
    expected = closed_form(y.detach().numpy(), V.detach().numpy(), M, 0.8, G.numpy(), kernel, norm)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours.numpy() - theirs).max() <= 1e-12 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize(("kernel", "norm"), PAIRS)
def test_gradcheck_and_gradgradcheck(kernel, norm):
    N = operator(kernel, norm)
    y = (torch.randn(n * c, dtype=torch.float64) / 2).requires_grad_()
    v = (torch.randn(N.parameter_count(n * c), dtype=torch.float64) / 3).requires_grad_()
    assert torch.autograd.gradcheck(N, (y, v))
    assert torch.autograd.gradgradcheck(lambda z: N(z, v.detach())[:3], (y,))


def test_rbf_is_attention_with_an_augmented_key():
    y, h = torch.randn(2, 5, 4, dtype=torch.float64), 0.7
    q = torch.cat([y / h, torch.ones(2, 5, 1, dtype=torch.float64)], -1)
    k = torch.cat([y / h, -y.square().sum(-1, keepdim=True) / (2 * h * h)], -1)
    expected = F.scaled_dot_product_attention(q, k, y, scale=1.0)
    ours = NonLocalOperator(RBFKernel(h), positions=5)(y.flatten(1)).reshape(2, 5, 4)
    assert (ours - expected).abs().max() < 1e-14


def test_softmax_is_scaled_dot_product_attention():
    Wq, Wk = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    y = torch.randn(5, 4, dtype=torch.float64)
    expected = F.scaled_dot_product_attention((y @ Wq.T)[None], (y @ Wk.T)[None], y[None])[0]
    ours = NonLocalOperator(EmbeddedGaussianKernel.from_projections(Wq, Wk), positions=5)(y.reshape(-1))
    assert (ours.reshape(5, 4) - expected).abs().max() < 1e-14


def test_outputs_are_finite_for_extreme_scores():
    y = torch.randn(6, 3, dtype=torch.float64)
    assert torch.isfinite(NonLocalOperator(GaussianKernel(), positions=6)(100 * y.reshape(-1))).all()
    for norm in ("row", "sym", "const", "none"):
        tiny = NonLocalOperator(RBFKernel(1e-6), norm, positions=6)(y.reshape(-1))
        expected = y.reshape(-1) / (6 if norm == "const" else 1)  # the kernel is the identity then
        assert torch.allclose(tiny, expected, atol=1e-12)


def test_an_offset_costs_no_accuracy_in_float32():
    y = torch.randn(5, 4)
    shifted = (y + 1000).float()
    exact = torch.softmax(-(torch.cdist(shifted.double(), shifted.double()) ** 2) / (2 * 0.49), -1)
    N = NonLocalOperator(RBFKernel(0.7), positions=5)
    ours = N.weights(shifted, torch.tensor(0.7))
    assert ours.dtype == torch.float32
    assert (ours.double() - exact).abs().max() < 1e-5


def test_local_and_identity():
    y = torch.randn(4, 6, dtype=torch.float64)
    V = torch.randn(3, 3, dtype=torch.float64)
    assert torch.equal(LayerMap(None, "identity")(y), y)
    assert torch.allclose(
        NonLocalOperator(LocalKernel(), positions=2, value=V)(y), (y.reshape(4, 2, 3) @ V.T).flatten(1), atol=1e-14
    )
    assert torch.equal(LayerMap.of("local", "relu")(y), y.clamp_min(0))


def test_aggregate_first_equals_transform_first():
    """z^l = A x + a + tau (K^{l,0} x + b^{l,0}) + tau sum_i (K^{l,i+1} phi_i(z^i) + b^{l,i+1}): (1') is (1)."""
    phi = LayerMap.of("rbf", positions=3)
    curves = theory.ParameterCurves.random_smooth(6, 4, vartheta=1)
    P, x = theory.sample_pointwise(curves, 12), torch.randn(6, dtype=torch.float64)
    states = theory.forward(P, x, phi).states
    K, b, z = P.square("K"), P.square("b"), []
    for row in range(12):
        value = P.A[row] @ x + P.a[row] + (K[row, 0] @ x + b[row, 0]) / 12
        for i in range(row):
            value = value + (K[row, i + 1] @ phi(z[i], P.vartheta[i]) + b[row, i + 1]) / 12
        z.append(value)
    for row in range(12):
        assert (phi(z[row], P.vartheta[row]) - states[row + 1]).abs().max() < 1e-13


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("kernel", [LocalKernel(), GaussianKernel(), EmbeddedGaussianKernel(), RBFKernel()])
def test_the_package_operator_is_the_same_map(kernel, backend):
    """Values and gradients through `nonlocal_attention`, one state or a batch."""
    options = {"positions": 5, "value": "curve"}
    ours = NonLocalOperator(kernel, **options)
    v = torch.randn(ours.parameter_count(15), dtype=torch.float64, requires_grad=True)
    for shape in ((15,), (2, 3, 15)):
        y = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        found, expected = [], []
        for operator_, into in ((NonLocalOperator(kernel, **options, backend=backend), found), (ours, expected)):
            try:
                out = operator_(y, v)
            except (RuntimeError, ValueError) as error:
                if backend != "cpu" or "cpu" not in str(error):
                    raise
                pytest.skip(f"this installation has no CPU kernels: {error}")
            into += [out, *torch.autograd.grad(out.square().sum(), (y, v))]
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max().item())


def test_the_recursion_runs_through_the_package_operator():
    curves = theory.ParameterCurves.random_smooth(6, 4, vartheta=1)
    x = torch.randn(2, 6, dtype=torch.float64)
    states = [
        theory.forward(curves, x, LayerMap.of("rbf", positions=3, backend=backend), layers=20).states
        for backend in (None, "auto")
    ]
    assert (states[0] - states[1]).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: RBFKernel(0.0), ValueError, "bandwidth must be > 0"),
        (lambda: NonLocalOperator("rbf"), TypeError, "kernel must be"),
        (lambda: NonLocalOperator(RBFKernel(1.0), "column"), ValueError, "'row', 'const', 'none', 'sym'"),
        (
            lambda: NonLocalOperator(RBFKernel(1.0), positions=4)(torch.zeros(6)),
            ValueError,
            "multiple of positions = 4",
        ),
        (lambda: NonLocalOperator(RBFKernel(), positions=2)(torch.zeros(6)), ValueError, "at least 1 entries"),
        (lambda: NonLocalOperator(RBFKernel(1.0), "sym", backend="auto"), ValueError, "needs normalization 'row'"),
        (lambda: LayerMap.of("laplace"), ValueError, "'local', 'gaussian', 'softmax', 'rbf'"),
        (lambda: LayerMap(None, "gelu"), ValueError, "activation must be one of"),
        (lambda: LayerMap(torch.tanh), TypeError, "NonLocalOperator or None"),
    ],
)
def test_bad_input_is_named(build, error, says):
    with pytest.raises(error, match=says):
        build()


def test_exponential_growth_is_announced():
    with pytest.warns(UserWarning, match="violates \\(A2\\)"):
        NonLocalOperator(GaussianKernel(), "none", positions=2)
