"""The integral equation's solution object: its values are good to the tolerance everywhere, and its error says so."""

import math

import pytest
import torch

from dnl_kernels import theory
from dnl_kernels.theory import LayerMap, ParameterCurves, solve_integral_equation

IDENTITY = LayerMap(None, "identity")
POINTS = torch.rand(2001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def oscillator(w):
    """x(t) = 1 - w^2 int_0^t (t - s) x(s) ds = cos(w t)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return ParameterCurves(
        lambda t: one.to(t) + 0 * t[..., None, None],
        lambda t: 0 * t[..., None],
        lambda t, s: -(w**2) * (t - s)[..., None, None],
        dim=1,
    )


@pytest.mark.parametrize("w", [2, 5, 10, 20, 40])
@pytest.mark.parametrize("layers", [8, 16])
def test_dense_output_of_oscillations(w, layers):
    """The bar: within 10 times the tolerance at 2,001 random points, for every tolerance; found: within it."""
    x = torch.ones(1, dtype=torch.float64)
    for rtol in (1e-4, 1e-7, 1e-10, 1e-12):
        solution = solve_integral_equation(oscillator(w), x, IDENTITY, rtol=rtol, layers=layers)
        worst = (solution(POINTS)[:, 0] - torch.cos(w * POINTS)).abs().max().item()
        assert solution.info["converged"]
        assert worst <= max(rtol, 1e-12 * w), (rtol, worst)
        assert solution.info["error"] <= rtol
        assert (solution.states[:, 0] - torch.cos(w * solution.times)).abs().max() <= max(rtol, 1e-12 * w)


@pytest.mark.parametrize("w", [2, 10])
def test_dense_output_in_float32(w):
    """K = w^2 (t - s) multiplies rounding by w^2 at most."""
    x = torch.ones(1)
    solution = solve_integral_equation(oscillator(w), x, IDENTITY, rtol=1e-4, layers=8)
    t = POINTS.float()
    assert solution.states.dtype == solution(t).dtype == torch.float32
    assert (solution(t)[:, 0] - torch.cos(w * t)).abs().max() <= 1e-4


def test_the_estimate_covers_what_lies_between_the_nodes():
    """Too few points allowed: the reported error is of the size of the true one, never far below it."""
    x = torch.ones(1, dtype=torch.float64)
    for w in (60, 100):
        with pytest.warns(UserWarning, match="error estimate"):
            solution = solve_integral_equation(oscillator(w), x, IDENTITY, rtol=1e-12, layers=8, max_points=96)
        worst = (solution(POINTS)[:, 0] - torch.cos(w * POINTS)).abs().max().item()
        assert not solution.info["converged"]
        assert solution.info["error"] * solution.states.abs().max() >= worst / 10 or math.isinf(solution.info["error"])


def test_nonlinear_solutions_satisfy_the_equation_between_the_points():
    """The residual at random t with an independent quadrature of the integral."""
    phi = LayerMap.of("rbf", positions=2)
    curves = ParameterCurves.random_smooth(4, 3, vartheta=phi.parameter_count(4))
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solution = solve_integral_equation(curves, x, phi, rtol=1e-11)
    u, w = theory.quadrature.composite_rule(40, 5)
    for t in POINTS[:7]:
        s = t * u
        memory = torch.einsum("j,jab,jnb->na", t * w, curves.K.evaluate(t.expand(s.shape), s), solution(s))
        bias = torch.einsum("j,ja->a", t * w, curves.b.evaluate(t.expand(s.shape), s))
        y = x @ curves.A(t).T + curves.a(t) + memory + bias
        assert (solution(t) - phi(y, curves.vartheta(t))).abs().max() < 1e-11


def test_panels_gather_where_the_solution_needs_them():
    """A kink of A at 0.3: only the panels beside it are small, and the tolerance is still met everywhere."""
    eye = torch.ones(1, 1, dtype=torch.float64)
    curves = ParameterCurves(
        lambda t: (t - 0.3).abs()[..., None, None] * eye,
        lambda t: 0 * t[..., None],
        lambda t, s: 1 + 0 * t[..., None, None],
        dim=1,
    )
    x = torch.ones(1, dtype=torch.float64)
    solution = solve_integral_equation(curves, x, IDENTITY, rtol=1e-9)
    t = POINTS
    # x' = A' + x: e^t (1.3) - 1 from x(0) = 0.3 before the kink with A' = -1, then A' = 1.
    before = 1 - 0.7 * torch.exp(t)
    at = 1 - 0.7 * math.exp(0.3)
    after = (at + 1) * torch.exp(t - 0.3) - 1
    exact = torch.where(t < 0.3, before, after)
    assert solution.info["converged"]
    assert (solution(t)[:, 0] - exact).abs().max() < 1e-9 * 10
    widths = torch.diff(solution.edges)
    assert widths.min() < 1e-4 < widths.max()
    near = (solution.edges[widths.argmin()] - 0.3).abs()
    assert near < 1e-3


def test_samples_put_their_nodes_among_the_edges():
    """Piecewise linear parameters on three layers: smooth between the nodes, hence few panels."""
    parameters = theory.sample_pointwise(ParameterCurves.random_smooth(2, 1), 3)
    curves = theory.extended_curves(parameters)
    solution = solve_integral_equation(curves, torch.ones(2, dtype=torch.float64), LayerMap(), rtol=1e-10)
    assert solution.info["converged"]
    assert any(abs(edge - 1 / 3) < 1e-14 for edge in solution.edges.tolist())
    assert solution.info["panels"] <= 32


def test_absolute_tolerance_and_empty_batches():
    x = torch.zeros(1, dtype=torch.float64)
    assert solve_integral_equation(oscillator(3), x, IDENTITY, rtol=0.0, atol=1e-8).info["converged"]
    empty = solve_integral_equation(oscillator(3), torch.zeros(0, 2, 1, dtype=torch.float64), IDENTITY, layers=8)
    assert empty.states.shape == (9, 0, 2, 1)
    assert empty(torch.rand(5, dtype=torch.float64)).shape == (5, 0, 2, 1)


def test_gradients_reach_input_and_parameters():
    C = (torch.randn(1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 2).requires_grad_()
    x = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    one = lambda t: torch.ones_like(t)[..., None]  # noqa: E731

    def final(coefficients, start):
        curves = ParameterCurves(
            theory.BasisCurve(one, torch.eye(2, dtype=torch.float64)[None]),
            theory.BasisCurve(one, torch.zeros(1, 2, dtype=torch.float64)),
            theory.SeparableKernel(one, one, coefficients),
            dim=2,
        )
        return solve_integral_equation(curves, start, LayerMap(), rtol=1e-9).final

    assert torch.autograd.gradcheck(final, (C, x))
