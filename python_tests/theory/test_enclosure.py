"""Certified suprema: never below what the curve attains, and the bounds built from them hold between grid points."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnl_kernels import theory
from dnl_kernels.theory import LayerMap, ParameterCurves, forward, solve_integral_equation
from dnl_kernels.theory.enclosure import Interval

T = torch.linspace(0, 1, 4001, dtype=torch.float64)


def vector(*parts):
    return torch.stack(torch.broadcast_tensors(*parts), -1)


FUNCTIONS = {
    "trigonometric": lambda t: vector(torch.sin(7 * t), 0.3 * torch.cos(11 * t + 1)),
    "exponential": lambda t: vector(torch.exp(-3 * t), 1 / (1 + torch.exp(-20 * (t - 0.3)))),
    "polynomial": lambda t: vector(t**3 - t, (2 * t - 1) ** 2, 1 / (1 + t)),
    "bounded": lambda t: vector(torch.tanh(9 * (t - 0.4)), (t - 0.77).abs(), torch.relu(t - 0.5)),
    "roots": lambda t: vector(torch.sqrt(1 + t), torch.log(2 + t), (1 + t) ** -1.5, torch.sigmoid(-t)),
    "bump": lambda t: vector(1 + 10 * torch.exp(-(((t - 0.30517) / 0.001) ** 2)), 0 * t),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_suprema_lie_just_above_what_is_attained(name):
    function = FUNCTIONS[name]
    fine = torch.cat([T, 0.30517 + torch.linspace(-3e-3, 3e-3, 2001, dtype=torch.float64)])
    values = function(fine).norm(dim=-1).max().item()
    slopes = torch.func.jvp(function, (fine,), (torch.ones_like(fine),))[1].norm(dim=-1).max().item()
    sup, lipschitz = theory.enclosure.suprema(function, 1, False)
    assert values * (1 - 1e-12) <= sup <= values * 1.01
    assert slopes * (1 - 1e-12) <= lipschitz <= slopes * 1.01


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(FUNCTIONS)), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)), at=st.floats(0, 1))
def test_every_value_lies_in_its_interval(name, ends, at):
    lo, hi = (torch.tensor([z], dtype=torch.float64) for z in sorted(ends))
    one = torch.ones(1, dtype=torch.float64)
    t = lo + at * (hi - lo)
    found = FUNCTIONS[name](Interval(lo, hi, [Interval(one, one)]))
    value = FUNCTIONS[name](t)
    slack = 1e-12 * (1 + value.abs())
    assert bool(((found.lo - slack <= value) & (value <= found.hi + slack)).all())
    slope = torch.func.jvp(FUNCTIONS[name], (t,), (one,))[1]
    slack = 1e-12 * (1 + slope.abs())
    assert bool(((found.slopes[0].lo - slack <= slope) & (slope <= found.slopes[0].hi + slack)).all())


@pytest.mark.parametrize("seed", [0, 1])
def test_bounds_of_all_curves_cover_a_fine_grid(seed):
    curves = ParameterCurves.random_smooth(3, seed, vartheta=2)
    bounds = curves.bounds()
    assert bounds.certified
    fine, slopes = curves.sup_norms(301), curves.lipschitz_constants(301)
    for name in fine:
        assert fine[name] * (1 - 1e-12) <= bounds.sup[name] <= fine[name] * 1.02, name
        assert slopes[name] * (1 - 1e-12) <= bounds.lipschitz[name] <= slopes[name] * 1.05, name


def test_samples_and_extensions_are_exact():
    P = theory.sample_pointwise(ParameterCurves.random_smooth(2, 5), 7)
    bounds = theory.extended_curves(P).bounds()
    assert bounds.sup["A"] == pytest.approx(torch.linalg.matrix_norm(P.A, 2).max().item(), rel=1e-14)
    rise = torch.linalg.matrix_norm(torch.diff(P.A, dim=0) * 7, 2).max().item()
    assert bounds.lipschitz["A"] == pytest.approx(rise, rel=1e-12)
    assert bounds.sup["K"] == pytest.approx(torch.linalg.matrix_norm(P.K, 2).max().item(), rel=1e-14)
    values = torch.tensor([[1.0], [-3.0], [2.0]], dtype=torch.float64)
    ones = torch.ones(3, 3, 1, 1, dtype=torch.float64)
    sampled = ParameterCurves(values[..., None], values, ones, dim=1).bounds()
    assert (sampled.sup["a"], sampled.lipschitz["a"]) == (3, 10)


def bump(height, center, width, dim=1):
    """A narrow bump of a between the points of any coarse grid."""
    one = torch.ones(dim, dim, dtype=torch.float64)
    return ParameterCurves(
        lambda t: 0 * t[..., None, None] * one,
        lambda t: (1 + height * torch.exp(-(((t - center) / width) ** 2)))[..., None].expand(*t.shape, dim),
        lambda t, s: (0.5 + 0 * t)[..., None, None] * one,
        dim=dim,
    )


def test_a_bump_between_sample_points_does_not_break_proposition_3():
    """The solution reaches more than 11 between two of 129 points, whose maxima would bound it by 2."""
    curves, x, phi = bump(10, 0.5 / 128 + 0.25, 2e-4), torch.zeros(1, dtype=torch.float64), LayerMap(None, "identity")
    t = torch.linspace(0.25, 0.26, 4001, dtype=torch.float64)
    solution = solve_integral_equation(curves, x, phi, rtol=1e-6, panels=64, max_points=4096)
    reached = solution(t).abs().max().item()
    assert reached > 10.9
    sampled = theory.trajectory_bound(curves, x, phi, points=129)
    assert not sampled.certified
    assert sampled.sup < 2  # what used to be called a bound
    bound = theory.trajectory_bound(curves, x, phi)
    assert bound.certified
    assert (solution(t).abs()[:, 0] <= bound(t)).all()
    assert not theory.convergence_constant(curves, x, phi, points=129).certified


def test_a_bump_does_not_break_corollary_5():
    curves, x, phi = bump(3, 0.5 / 128 + 0.25, 1e-3), torch.zeros(1, dtype=torch.float64), LayerMap(None, "identity")
    solution = solve_integral_equation(curves, x, phi, rtol=1e-6, panels=64, max_points=4096)
    constant = theory.convergence_constant(curves, x, phi)
    sampled = theory.convergence_constant(curves, x, phi, points=129)
    worst = 0.0
    for layers in (100, 256, 257, 500):
        path = forward(curves, x, phi, layers=layers)
        worst = max(worst, (path.states[1:] - solution(path.times)[1:]).abs().max().item() * layers)
    assert worst <= constant.C
    assert worst > sampled.C  # the sampled number is no bound


def test_vartheta_is_enclosed_too():
    """log h dips between the points: the Lipschitz constant is that of the smallest bandwidth."""
    phi = LayerMap.of("rbf", positions=2)
    one = torch.eye(2, dtype=torch.float64)

    def curves(rho):
        return ParameterCurves(
            lambda t: 0.1 * torch.ones_like(t)[..., None, None] * one,
            lambda t: 0 * t[..., None].expand(*t.shape, 2),
            lambda t, s: 0.1 * torch.ones_like(t)[..., None, None] * one,
            vartheta=rho,
            dim=2,
        )

    x = torch.ones(2, dtype=torch.float64)
    dip = curves(lambda t: (3 - 2 * torch.exp(-(((t - 0.5 / 128 - 0.25) / 1e-3) ** 2)))[..., None])
    at_least = theory.convergence_constant(curves(lambda t: (1 + 0 * t)[..., None]), x, phi, sup_state=1.0)
    assert theory.convergence_constant(dip, x, phi, sup_state=1.0).lipschitz >= at_least.lipschitz * (1 - 1e-12)
    assert theory.convergence_constant(dip, x, phi, sup_state=1.0, points=129).lipschitz < at_least.lipschitz


def test_curves_without_an_interval_form_are_named():
    curves = ParameterCurves(
        lambda t: torch.special.bessel_j0(t)[..., None, None],
        lambda t: t[..., None],
        lambda t, s: (t - s)[..., None, None],
        dim=1,
    )
    x = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="the curve A cannot be enclosed: it uses 'special_bessel_j0'.* give points"):
        theory.trajectory_bound(curves, x, LayerMap())
    assert not theory.trajectory_bound(curves, x, LayerMap(), points=65).certified


def test_large_logits_have_a_finite_logarithm():
    """Softmax attention with ||M|| = 50: C overflows, since e^(Lam ||K||) does; its logarithm is finite and says so."""
    M = 50 * torch.eye(2, dtype=torch.float64)
    phi = LayerMap(theory.NonLocalOperator(theory.EmbeddedGaussianKernel(M), positions=3), "tanh")
    curves = ParameterCurves.random_smooth(6, 2, scale=2.0)
    x = torch.ones(6, dtype=torch.float64)
    found = theory.convergence_constant(curves, x, phi)
    assert math.isinf(found.C)
    assert math.isfinite(found.log_C)
    assert found.log_C > 700
    assert found.trajectory == pytest.approx(math.sqrt(6))  # tanh: no state is larger
    small = theory.convergence_constant(curves, x, LayerMap.of("local"))
    assert small.log_C == pytest.approx(math.log(small.C), rel=1e-12)
    with pytest.raises(ValueError, match="sup_state must be given"):
        wild = ParameterCurves(
            lambda t: t[..., None, None], lambda t: t[..., None], lambda t, s: 1e4 + 0 * t[..., None, None], dim=1
        )
        theory.convergence_constant(wild, torch.ones(1).double(), LayerMap(None, "relu"))
