"""The continuous problem solved by Galerkin's method, and Theorem 1 against its solution."""

import functools

import pytest
import torch

from dnl_kernels import theory
from dnl_kernels.theory.galerkin import GalerkinProblem, SobolevPolynomials
from dnl_kernels.theory.limit import FAULTS, Ruler, limit_study


@pytest.mark.parametrize("arguments", [1, 2])
def test_polynomials_are_orthonormal_in_the_sobolev_norm_and_nested(arguments):
    small, large = SobolevPolynomials(5, arguments), SobolevPolynomials(8, arguments)
    assert len(large) == (9 if arguments == 1 else 45)
    flat = (large.table * large.weights.sqrt()[:, None]).flatten(0, 1)
    assert (flat.T @ flat - torch.eye(len(large), dtype=torch.float64)).abs().max() < 1e-13
    points = torch.rand(arguments, 7, dtype=torch.float64).sort(0, descending=True).values
    assert (small(*points) - large(*points)[:, : len(small)]).abs().max() < 1e-11
    # They span: t^i s^j is reproduced, with its derivative in t, by its projection.
    t = large.nodes[0]
    power = torch.stack([t**5, 5 * t**4, *[torch.zeros_like(t)] * (arguments - 1)])
    c = torch.einsum("jqk,jq,q->k", large.table, power, large.weights)
    assert (large(*points) @ c - points[0] ** 5).abs().max() < 1e-12
    assert (torch.func.jvp(lambda z: large(z, *points[1:]) @ c, (points[0],), (torch.ones(7).double(),))[1]
            - 5 * points[0] ** 4).abs().max() < 1e-10  # fmt: skip


@pytest.mark.parametrize(("build", "p"), [(theory.problem_a, 2), (theory.problem_a, 4), (theory.problem_b, 2)])
def test_the_objective_is_that_of_the_curves(build, p):
    """Against the adaptive solver and the composite quadrature, which share no code with it."""
    problem = build(p=p)
    space = GalerkinProblem(problem, 4, points=32)
    z = 0.4 * torch.randn(space.size, dtype=torch.float64)
    value = space.objective(z).item()
    assert value == pytest.approx(problem.objective_continuous(space.curves(z), rtol=1e-11, panels=4).item(), rel=1e-10)
    direction = torch.randn_like(z)
    slope = space.oracle(z)[1] @ direction
    values = [space.objective(z + h * direction) for h in (1e-5, -1e-5)]
    assert slope.item() == pytest.approx(((values[0] - values[1]) / 2e-5).item(), rel=1e-5)


@pytest.fixture(scope="module")
def minima():
    problem = theory.problem_a(2, "lifted")
    found = [theory.minimize_continuous(problem, 4)]
    for degree in (6, 8):
        found.append(theory.minimize_continuous(problem, degree, start=found[-1]))
    return problem, found


def test_minima_decrease_and_the_certificate_says_by_how_much(minima):
    problem, found = minima
    values = [m.value for m in found]
    assert values[0] > values[1] > values[2]
    certificate = theory.certify(problem, found[1], extra=2)
    fall = values[1] - values[2]
    assert certificate.curvature > 0
    assert fall <= certificate.value_error
    assert certificate.decrement == pytest.approx(fall, rel=0.05)
    assert values[2] == pytest.approx(0.0197536409, abs=1e-7)  # docs/theory/limit-a-p2.json
    gap = torch.linalg.vector_norm(
        GalerkinProblem(problem, 6).embed(found[1].coordinates, GalerkinProblem(problem, 8)) - found[2].coordinates
    )
    assert gap <= certificate.distance_error


def test_another_start_finds_the_same_minimum(minima):
    problem, found = minima
    other = theory.minimize_continuous(problem, 6, start=theory.sample_pointwise(found[0].curves, 4))
    assert other.value == pytest.approx(found[1].value, rel=1e-10)
    with pytest.raises(ValueError, match="start must have at most degree 4"):
        theory.minimize_continuous(problem, 4, start=found[1])
    with pytest.raises(RuntimeError, match="after 2 iterations"):
        theory.minimize_continuous(problem, 4, max_iterations=2)


def test_the_ruler_measures_as_the_extensions_do(minima):
    _, found = minima
    P = theory.sample_pointwise(found[0].curves, 4)
    zero = theory.DiscreteParameters.zeros(4, 1)
    other = theory.sample_cell_average(found[0].curves, 8)
    l2, sup = Ruler(theory.extended_curves(other), 8)(P)
    assert l2 == pytest.approx(theory.distance(P, other).item(), rel=1e-12)
    assert 0 < sup <= theory.distance(P, other, "sup").item() * (1 + 1e-12)
    assert Ruler(theory.extended_curves(P), 8)(P) == (0, 0)
    assert Ruler(theory.extended_curves(zero), 8)(P)[0] > 0


def test_the_study_tells_right_from_wrong():
    """Right: |J_L - J*| and the distance of minimisers halve with the doubling. With a fault they stay."""
    build = functools.partial(theory.problem_a, 2)
    options = {"firsts": ("lifted",), "base": 4, "restarts": 1, "certified": 0, "patience": 40}
    study = limit_study(build, "a", [4, 8], [6], **options)
    errors = {table.name: table.errors for table in study.tables}
    for what in ("|J_L - J*|", "L2 distance to theta*"):
        coarse, fine = errors[f"x0 lifted, {what}"]
        assert fine < 0.6 * coarse
        assert errors[f"fault: penalty on A only, {what}"][1] > 5 * fine
    coarse, fine = errors["fault: boundary weight 1, |J_L - J*|"]
    assert fine > coarse
    assert len(study.facts["continuous"]) == 1
    assert set(study.facts["values"]) == {"x0 lifted", *(f"fault: {name}" for name in FAULTS)}
