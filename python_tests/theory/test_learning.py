"""Cosine coordinates, L-BFGS, the learning problems and Theorem 1's statements on them."""

import math

import pytest
import torch

from dnl_kernels import theory
from dnl_kernels.theory.lbfgs import minimize_lbfgs
from dnl_kernels.theory.spectral import SobolevPreconditioner


def random_parameters(layers, dim=2, vartheta=1):
    z = theory.DiscreteParameters.zeros(layers, dim, vartheta)
    return z.map(torch.randn_like)


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_coordinates_are_an_isometry_of_the_sobolev_norm(layers):
    """R_L with p = 2 is |z|^2 exactly: the cosines diagonalise the differences with copied boundaries."""
    P = random_parameters(layers)
    S = SobolevPreconditioner.of(P)
    z = S.to_coordinates(P)
    assert z.numel() == S.size == sum(value.numel() for _, value in P.items())
    assert z.square().sum().item() == pytest.approx(theory.regularizer(P, 2).item(), rel=1e-13)
    for name, value in S.to_parameters(z).items():
        assert (value - getattr(P, name)).abs().max() < 1e-13


def test_dct_matrix_is_orthogonal():
    C = theory.dct_matrix(9)
    assert (C @ C.T - torch.eye(9, dtype=torch.float64)).abs().max() < 1e-14
    from scipy.fft import dct

    u = torch.randn(9, dtype=torch.float64)
    assert torch.allclose(C @ u, torch.tensor(dct(u.numpy(), type=2, norm="ortho")), atol=1e-14)


def test_sobolev_gradient_represents_the_derivative():
    """<g, h> = dJ(h) with the inner product of R_L (p = 2), for random directions h."""
    P = random_parameters(6)
    partial = random_parameters(6)  # any linear functional
    g = theory.sobolev_gradient(P, partial)

    def inner(u, v):
        plus, minus = u.zip_map(torch.add, v), u.zip_map(torch.sub, v)
        return (theory.regularizer(plus, 2) - theory.regularizer(minus, 2)) / 4

    for _ in range(3):
        h = random_parameters(6)
        derivative = sum((value * getattr(h, name)).sum() for name, value in partial.items())
        assert inner(g, h).item() == pytest.approx(derivative.item(), rel=1e-11)


def test_sobolev_step_is_a_step_in_the_coordinates():
    P, partial = random_parameters(5), random_parameters(5)
    S = SobolevPreconditioner.of(P)
    z = S.to_coordinates(P).requires_grad_()
    linear = sum((value * getattr(S.to_parameters(z), name)).sum() for name, value in partial.items())
    (dz,) = torch.autograd.grad(linear, z)
    for name, value in S.to_parameters(dz).items():
        assert (value - getattr(S.sobolev_gradient(partial), name)).abs().max() < 1e-12


def test_smooth_starts_are_the_same_function_on_every_grid():
    starts = {}
    for layers in (3, 8, 32, 64):
        S = SobolevPreconditioner(layers, 1, 1)
        starts[layers] = S.to_parameters(S.smooth_start(torch.Generator().manual_seed(3), 1.0))
    gaps = [theory.distance(starts[n], starts[64]).item() for n in (8, 32)]
    assert gaps[1] < 0.5 * gaps[0] < 0.5
    assert theory.distance(starts[8], starts[64]).item() > 0


def test_lbfgs_on_rosenbrock_and_at_rounding():
    def oracle(z):
        z = z.detach().requires_grad_()
        value = (100 * (z[1:] - z[:-1] ** 2) ** 2 + (1 - z[:-1]) ** 2).sum()
        return value.item(), torch.autograd.grad(value, z)[0]

    result = minimize_lbfgs(oracle, -torch.ones(8, dtype=torch.float64), tolerance=1e-10)
    assert result.converged
    assert (result.point - 1).abs().max() < 1e-9 or result.value > 1  # the other stationary point has value 3.99
    assert result.iterations < 200
    quadratic = minimize_lbfgs(
        lambda z: (1.0 + (z.square() * 1e3 ** torch.arange(4) / 2).sum().item(), z * 1e3 ** torch.arange(4)),
        torch.ones(4, dtype=torch.float64),
        tolerance=1e-11,
    )
    assert quadratic.converged  # far below the point where the value 1 + f stops changing
    stuck = minimize_lbfgs(lambda z: (math.nan, torch.ones_like(z)), torch.ones(2, dtype=torch.float64))
    assert not stuck.converged


def test_data_loss_and_objective():
    problem = theory.problem_b()
    P = random_parameters(4)
    final = theory.forward(P, problem.inputs, problem.phi).final
    loss = ((final - problem.targets) ** 2).sum(1).mean() / 2
    assert problem.data_loss(P).item() == pytest.approx(loss.item(), rel=1e-14)
    penalty = 1e-2 * theory.regularizer(P, 2)
    assert problem.objective(P).item() == pytest.approx((loss + penalty).item(), rel=1e-14)


@pytest.fixture(scope="module")
def lifted():
    """Problem A, lifted, p = 2, by continuation from L = 8."""
    problem = theory.problem_a(2, "lifted")
    start = problem.minimize(8, restarts=3)
    return problem, start, problem.continuation((8, 16, 32), start.parameters)


def test_all_starts_of_problem_a_agree(lifted):
    problem, start, results = lifted
    assert start.agreeing == 3
    assert len(start.branches) == 1
    assert start.gradient < 1e-8
    fresh = problem.minimize(16, restarts=2, seed=5)
    assert fresh.value == pytest.approx(results[16].value, abs=1e-8)
    assert theory.distance(fresh.parameters, results[16].parameters).item() < 1e-5


def test_theorem_1_on_problem_a(lifted):
    """Optimal values and interpolated minimisers converge. Nothing is said about monotone values."""
    _, _, results = lifted
    levels = sorted(results)
    pairs = list(zip(levels[:-1], levels[1:], strict=True))
    values = [abs(results[a].value - results[b].value) for a, b in pairs]
    gaps = [theory.distance(results[a].parameters, results[b].parameters).item() for a, b in pairs]
    assert 0.9 < theory.observed_order(values, levels[:-1])[-1] < 1.4
    assert 0.8 < theory.observed_order(gaps, levels[:-1])[-1] < 1.2


def test_minimiser_is_stationary_and_locally_best(lifted):
    problem, start, _ = lifted
    for scale in (1e-3, 1e-1):
        moved = start.parameters.zip_map(lambda u, v, s=scale: u + s * v, random_parameters(8, 1, 0))
        assert problem.objective(moved) > start.value


def test_continuation_reaches_coarser_levels(lifted):
    problem, start, _ = lifted
    down = problem.continuation((4, 8), start.parameters)
    assert list(down) == [4, 8]
    assert down[4].value == pytest.approx(problem.minimize(4, restarts=1).value, abs=1e-9)


def test_p_4_with_input_start():
    problem = theory.problem_a(4, "input")
    first, second = (problem.minimize(4, restarts=1, seed=seed) for seed in (0, 1))
    assert first.value == pytest.approx(second.value, abs=1e-10)
    assert first.value == pytest.approx(first.data + first.penalty, rel=1e-14)


@pytest.mark.slow
def test_theorem_1_inside_its_hypotheses():
    """p = 4 > 2: differences of minimisers shrink up to L = 64 at first order."""
    problem = theory.problem_a(4, "input")
    results = problem.continuation((8, 16, 32, 64), problem.minimize(8, restarts=2).parameters)
    gaps = [theory.distance(results[n].parameters, results[2 * n].parameters).item() for n in (8, 16, 32)]
    values = [abs(results[n].value - results[2 * n].value) for n in (8, 16, 32)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert values[0] > values[1] > values[2]
    assert theory.observed_order(gaps, (8, 16, 32))[-1] == pytest.approx(1, abs=0.15)


@pytest.mark.slow
def test_problem_b_is_not_convex_and_its_branches_converge():
    problem = theory.problem_b()
    pool = problem.minimize(8, restarts=6)
    assert len(pool.branches) > 1
    results = problem.continuation((8, 16, 32), pool.parameters)
    values = [abs(results[n].value - results[2 * n].value) for n in (8, 16)]
    gaps = [theory.distance(results[n].parameters, results[2 * n].parameters).item() for n in (8, 16)]
    assert theory.observed_order(values, (8, 16))[0] > 0.7
    assert theory.observed_order(gaps, (8, 16))[0] > 0.7


def test_gamma_functional():
    """F_L is finite on I_1 Theta_L only; F of I_1 Theta is near F_L for large L."""
    problem = theory.problem_a(4)
    smooth = theory.ParameterCurves.random_smooth(1, 2, scale=0.5)
    P = theory.sample_pointwise(smooth, 8)
    extended = theory.extended_curves(P)
    F_8 = theory.GammaFunctional(problem, 8)
    assert F_8(extended) == pytest.approx(problem.objective(P).item(), rel=1e-12)
    assert F_8(smooth) == math.inf
    assert theory.GammaFunctional(problem, 5)(extended) == math.inf
    F = theory.GammaFunctional(problem)
    limit = F(smooth)
    assert limit == pytest.approx(problem.objective_continuous(smooth).item())
    errors = [
        abs(theory.GammaFunctional(problem, n)(theory.extended_curves(theory.sample_pointwise(smooth, n))) - limit)
        for n in (16, 32, 64)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert theory.observed_order(errors, (16, 32, 64))[-1] == pytest.approx(1, abs=0.3)


def test_bad_input_is_named():
    points = torch.zeros(3, 1, dtype=torch.float64)
    cases = [
        (lambda: theory.LearningProblem(points, points[:2], theory.LayerMap()), ValueError, r"shape \[S, d\]"),
        (lambda: theory.LearningProblem(points / 0, points, theory.LayerMap()), ValueError, "inputs must be finite"),
        (lambda: theory.LearningProblem(points, points, theory.LayerMap(), p=1), ValueError, "2 <= p"),
        (lambda: theory.LearningProblem(points, points, theory.LayerMap(), first="last"), ValueError, "first"),
        (lambda: theory.problem_a().minimize(0), ValueError, "layers must be >= 1"),
        (lambda: theory.problem_a().minimize(4, restarts=0), ValueError, "restarts must be >= 1"),
        (lambda: theory.GammaFunctional(theory.problem_a(), 0), ValueError, "layers must be >= 1"),
        (lambda: SobolevPreconditioner(3, 1).to_parameters(torch.zeros(2)), ValueError, "z must have shape"),
    ]
    for call, error, says in cases:
        with pytest.raises(error, match=says):
            call()
