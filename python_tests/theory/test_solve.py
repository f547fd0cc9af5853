"""`theory.solve` from functions to a solution, weakly singular kernels, and the scheme of order 4."""

import math

import pytest
import torch
from scipy import special

from dnl_kernels import theory
from dnl_kernels.theory.quadrature import gauss_jacobi

T = torch.rand(501, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
def test_gauss_jacobi_is_exact(alpha):
    v, w = gauss_jacobi(6, alpha)
    ours, theirs = v.numpy(), special.roots_jacobi(6, -alpha, 0)[0]
    assert abs(ours - (theirs + 1) / 2).max() < 1e-13
    for k in range(12):
        exact = special.beta(k + 1, 1 - alpha)
        assert (w @ v**k).item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("rate", [-3.0, 1.0])
@pytest.mark.parametrize("rtol", [1e-5, 1e-9])
def test_abel_equation_of_the_second_kind(rate, rtol):
    """x = 1 + rate int (t - s)^(-1/2) x ds is exp(z^2) erfc(-z), z = rate sqrt(pi t): steep at 0 like sqrt(t)."""
    problem = theory.IntegralProblem(lambda t, s: rate * torch.ones_like(t - s), torch.ones(1), alpha=0.5)
    solution = theory.solve(problem, rtol=rtol)
    exact = torch.tensor(special.erfcx(-rate * (math.pi * T.numpy()) ** 0.5))
    near = torch.tensor([0.0, 1e-12, 1e-8], dtype=torch.float64)
    at_0 = torch.tensor(special.erfcx(-rate * (math.pi * near.numpy()) ** 0.5))
    scale = exact.abs().max()
    assert solution.info["converged"]
    assert (solution(T)[:, 0] - exact).abs().max() <= 10 * rtol * scale
    assert (solution(near)[:, 0] - at_0).abs().max() <= 10 * rtol * scale


@pytest.mark.parametrize("alpha", [0.2, 0.6])
def test_a_singular_equation_with_a_known_solution(alpha):
    """x(t) = t is the solution for f = t - int (t - s)^(-alpha) tanh.. made for it, nonlinear and with d = 2."""
    matrix = torch.tensor([[0.5, -1.0], [2.0, 0.3]], dtype=torch.float64)
    direction = torch.tensor([1.0, -0.5], dtype=torch.float64)

    def forcing(t):  # phi^-1(x) - int (t - s)^(-alpha) (1 + t) M s v ds
        moment = t ** (2 - alpha) * special.beta(2, 1 - alpha) * (1 + t)
        return torch.atanh(0.9 * t[..., None] * direction) - 0.9 * moment[..., None] * (matrix @ direction)

    problem = theory.IntegralProblem(
        lambda t, s: (1 + t + 0 * s)[..., None, None] * matrix, forcing, torch.tanh, alpha=alpha, dim=2
    )
    solution = theory.solve(problem, rtol=1e-7)
    assert solution.info["converged"]
    assert (solution(T) - 0.9 * T[:, None] * direction).abs().max() < 1e-6


def test_solve_is_the_solver_of_curves_and_differentiable():
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    problem = theory.IntegralProblem(lambda t, s: -weight * torch.cos(3 * (t - s)), torch.sin, torch.tanh)
    solution = theory.solve(problem, rtol=1e-10)
    assert solution.info["error"] <= 1e-10
    (slope,) = torch.autograd.grad(solution(torch.tensor(0.8))[0], weight)
    values = []
    for w in (0.7 + 1e-4, 0.7 - 1e-4):
        moved = theory.IntegralProblem(lambda t, s, w=w: -w * torch.cos(3 * (t - s)), torch.sin, torch.tanh)
        values.append(theory.solve(moved, rtol=1e-12)(torch.tensor(0.8)).item())
    assert slope.item() == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-6)
    single = theory.solve(problem, rtol=1e-5, dtype=torch.float32)
    assert single.states.dtype == torch.float32
    assert (single(T.float()).double() - solution(T)).abs().max() < 1e-5


def test_panels_carry_their_own_estimates():
    problem = theory.IntegralProblem(lambda t, s: torch.exp(-20 * (t - s)), lambda t: torch.cos(30 * t))
    info = theory.solve(problem, rtol=1e-6).info
    assert len(info["panel_errors"]) == info["panels"]
    assert max(info["panel_errors"]) == pytest.approx(info["error"], rel=1e-12)


def test_order_4():
    curves = theory.ParameterCurves.random_smooth(3, 4, vartheta=1)
    phi = theory.LayerMap.of("rbf", positions=3)
    x = torch.randn(2, 3, dtype=torch.float64)
    exact = theory.solve_integral_equation(curves, x, phi, rtol=1e-12)
    levels = (4, 8, 16)
    errors = [theory.forward(curves, x, phi, layers=n, scheme="collocation").distance(exact, first=0) for n in levels]
    assert theory.observed_order(errors, levels)[-1] == pytest.approx(4, abs=0.2)
    assert errors[-1] < 1e-6
    with pytest.raises(ValueError, match="needs curves"):
        theory.forward(theory.sample_pointwise(curves, 4), x, phi, scheme="collocation")
    with pytest.raises(ValueError, match="first must be 'lifted'"):
        theory.forward(curves, x, phi, layers=4, scheme="collocation", first="input")


def test_bad_problems_are_named():
    K = theory.WeaklySingularKernel(lambda t, s: torch.ones_like(t)[..., None, None], 0.5, (1, 1))
    with pytest.raises(ValueError, match="alpha must be 0 with a DepthKernel"):
        theory.solve(theory.IntegralProblem(K, torch.zeros(1), alpha=0.5))
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\)"):
        theory.solve(theory.IntegralProblem(lambda t, s: t - s, torch.zeros(1), alpha=1.0))
    with pytest.raises(TypeError, match="problem must be an IntegralProblem"):
        theory.solve(K)
    curves = theory.IntegralProblem(K, torch.zeros(1)).curves()
    with pytest.raises(ValueError, match="weakly singular"):
        theory.forward(curves, torch.zeros(1, dtype=torch.float64), theory.LayerMap(None, "identity"), layers=4)
