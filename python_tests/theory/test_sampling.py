"""Samplings, extensions and regularizers against numpy loops, closed forms and the inequalities of section 7."""

import math

import numpy as np
import pytest
import torch

from dnl_kernels import theory
from dnl_kernels.theory.quadrature import composite_rule, duffy_rule, gauss_legendre, triangle_rule
from dnl_kernels.theory.regularization import one_index_terms

LEVELS = (8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def curves():
    return theory.ParameterCurves.random_smooth(3, 3, vartheta=1)


@pytest.fixture(scope="module")
def sampled(curves):
    return {
        "point": {n: theory.sample_pointwise(curves, n) for n in LEVELS},
        "average": {n: theory.sample_cell_average(curves, n) for n in LEVELS},
    }


def rough(layers, dim=2, vartheta=1):
    size = layers * (layers + 1) // 2
    shapes = ((layers, dim, dim), (layers, dim), (size, dim, dim), (size, dim), (layers, vartheta))
    return theory.DiscreteParameters(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))


def test_gauss_rules_integrate_polynomials_exactly():
    nodes, weights = gauss_legendre(5)
    expected, _ = np.polynomial.legendre.leggauss(5)
    assert np.allclose(nodes.numpy(), (expected + 1) / 2, atol=1e-15)
    for degree in range(10):
        assert (weights @ nodes**degree).item() == pytest.approx(1 / (degree + 1), rel=1e-14)
    u, v, w = duffy_rule(4)
    t, s, ww = triangle_rule(3, 4)
    for i in range(3):
        for j in range(3):
            exact = 1 / ((j + 1) * (i + j + 2))
            assert (w @ (u**i * v**j)).item() == pytest.approx(exact, rel=1e-13)
            assert (ww @ (t**i * s**j)).item() == pytest.approx(exact, rel=1e-13)
    assert bool((s <= t).all())
    assert composite_rule(7, 3)[1].sum().item() == pytest.approx(1, rel=1e-14)


def test_averages_of_polynomials_and_of_the_diagonal_cell():
    """K = t: the symmetric K is max(t, s), whose mean over the diagonal cell is t_l + 2 tau / 3, not t_l + tau / 2."""
    ones = torch.ones(1, 1, dtype=torch.float64)
    curves = theory.ParameterCurves(
        lambda t: (t**2)[..., None, None], lambda t: t[..., None], lambda t, s: t[..., None, None] * ones, dim=1
    )
    layers = 5
    parameters, left = theory.sample_cell_average(curves, layers), torch.arange(5, dtype=torch.float64) / 5
    assert torch.allclose(parameters.A[:, 0, 0], ((left + 0.2) ** 3 - left**3) / 0.6, atol=1e-15)
    K = parameters.square("K")[..., 0, 0]
    assert torch.allclose(K.diagonal(), left + 2 / 15, atol=1e-14)
    assert torch.allclose(K[4, :4], torch.full((4,), 0.9, dtype=torch.float64), atol=1e-14)


def test_average_matches_a_dense_mean_of_the_symmetric_kernel(curves):
    layers, fine = 4, 400
    t = (torch.arange(layers * fine, dtype=torch.float64) + 0.5) / (layers * fine)
    K = curves.K(t[:, None], t[None])[..., 0, 1].reshape(layers, fine, layers, fine).mean((1, 3))
    ours = theory.sample_cell_average(curves, layers).square("K")[..., 0, 1]
    assert torch.allclose(ours, K, atol=2e-6)


@pytest.mark.parametrize("p", [2, 3, 4])
def test_triangle_only_regularizer_equals_the_full_square(p):
    layers = 9
    parameters, tau = rough(layers), 1 / layers
    terms = theory.regularizer_terms(parameters, p)
    for name in ("K", "b"):
        U = parameters.square(name).flatten(2).numpy()
        size = lambda z: (np.linalg.norm(z, axis=-1) ** p).sum()  # noqa: E731
        value = tau**2 * size(U)
        slope = tau**2 * (size(np.diff(U, axis=0) / tau) + size(np.diff(U, axis=1) / tau))
        assert terms[f"{name} value"].item() == pytest.approx(value, rel=1e-13)
        assert terms[f"{name} derivative"].item() == pytest.approx(slope, rel=1e-13)
    A = parameters.A.flatten(1).numpy()
    assert terms["A value"].item() == pytest.approx(tau * (A**2).sum(), rel=1e-13)
    assert terms["A derivative"].item() == pytest.approx((np.diff(A, axis=0) ** 2).sum() / tau, rel=1e-13)


def test_weights_anchor_and_gradient():
    parameters = rough(5)
    terms = theory.regularizer_terms(parameters)
    only = theory.regularizer(parameters, weights={"K": 2.0})
    assert only.item() == pytest.approx(2 * (terms["K value"] + terms["K derivative"]).item(), rel=1e-14)
    initial = theory.regularizer_terms(parameters, anchor="initial")["A value"]
    assert initial.item() == pytest.approx(parameters.A[0].square().sum().item(), rel=1e-14)
    free = rough(3, 1).requires_grad_()
    names = [name for name, _ in free.items()]

    def value(*tensors):
        return theory.regularizer(theory.DiscreteParameters(**dict(zip(names, tensors, strict=True))), 4)

    assert torch.autograd.gradcheck(value, tuple(v for _, v in free.items()))


@pytest.mark.parametrize("p", [2, 4])
def test_limsup_inequality_for_averages_holds_for_every_level(curves, sampled, p):
    """R_L(averages) <= R term by term (Jensen and difference quotients): the recovery sequence of Theorem 1."""
    exact = theory.regularizer_continuous_terms(curves, p)
    for parameters in sampled["average"].values():
        for name, value in theory.regularizer_terms(parameters, p).items():
            assert value <= exact[name] * (1 + 1e-12), name
    point = theory.regularizer_terms(sampled["point"][8], p)
    assert any(point[name] > exact[name] for name in exact)  # it is a property of averages, not of sampling


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("how", ["point", "average"])
def test_regularizer_converges_at_rate_tau(curves, sampled, p, how):
    exact = theory.regularizer_continuous(curves, p)
    scaled = [abs((theory.regularizer(sampled[how][n], p) - exact).item()) * n for n in LEVELS]
    assert max(scaled) < 2.5 * scaled[-1]  # |R_L - R| L is bounded ..
    orders = theory.observed_order([e / n for e, n in zip(scaled, LEVELS, strict=True)], LEVELS)
    assert 0.9 < orders[-1] < 1.25  # .. and does not vanish


def test_one_dimensional_constants():
    """Point: value -(|A(1)|^2 - |A(0)|^2) / 2, derivative -|A'(1)|^2; averages: 0 and -(|A'(0)|^2 + |A'(1)|^2) / 2."""
    curves, layers = theory.ParameterCurves.random_smooth(3, 3), 256
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    value = curves.A(ends).square().sum((1, 2))
    slope = torch.func.jvp(curves.A, (ends,), (torch.ones_like(ends),))[1].square().sum((1, 2))
    exact = theory.regularizer_continuous_terms(curves, 2)
    predicted = {
        "point": (-(value[1] - value[0]) / 2, -slope[1]),
        "average": (torch.zeros(()), -(slope[0] + slope[1]) / 2),
    }
    for how, sample in (("point", theory.sample_pointwise), ("average", theory.sample_cell_average)):
        found = one_index_terms(sample(curves, layers).A)
        for ours, name, constant in zip(found, ("A value", "A derivative"), predicted[how], strict=True):
            measured = (ours - exact[name]).item() * layers
            assert measured == pytest.approx(constant.item(), rel=0.15, abs=5e-3)


def test_why_p_exceeds_two():
    """K = log(1 + log(1 + 1/r)) is in H^1 but unbounded: R2 stays bounded for p = 2 and explodes for p = 4."""
    ratio = {}
    for p in (2, 4):
        values = []
        for layers in (32, 128):
            t = (torch.arange(layers, dtype=torch.float64) + 0.5) / layers
            r = torch.hypot(t[:, None] - 0.75, t[None] - 0.25)
            K = torch.log(1 + torch.log(1 + 1 / r))[..., None, None]
            zeros = theory.DiscreteParameters.zeros(layers, 1)
            parameters = theory.DiscreteParameters(zeros.A, zeros.a, theory.pack(K), zeros.b, zeros.vartheta)
            values.append(theory.regularizer_terms(parameters, p)["K derivative"].item())
        ratio[p] = values[1] / values[0]
    assert ratio[2] < 1.5
    assert ratio[4] > 5


@pytest.mark.parametrize("p", [2, 3, 4, 6])
def test_lemma_8_inequalities_for_rough_parameters(p):
    """||I_1 u||_p^p <= 1.5 value, ||(I_1 u)'||_p^p = derivative exactly, 2.25 and 1.5 for I_1 U."""
    for layers in (2, 3, 7, 12):
        parameters = rough(layers)
        exact = theory.regularizer_continuous_terms(theory.extended_curves(parameters), p, panels=layers, order=6)
        ours = theory.regularizer_terms(parameters, p)
        for name in ("A", "a", "vartheta"):
            assert exact[f"{name} value"] <= 1.5 * ours[f"{name} value"]
            assert exact[f"{name} derivative"].item() == pytest.approx(ours[f"{name} derivative"].item(), rel=1e-12)
        for name in ("K", "b"):
            assert exact[f"{name} value"] <= 2.25 * ours[f"{name} value"]
            assert exact[f"{name} derivative"] <= 1.5 * ours[f"{name} derivative"]


def test_extensions_at_nodes_and_between():
    u = torch.randn(5, 2, dtype=torch.float64)
    U = torch.randn(5, 5, 2, dtype=torch.float64)
    t = torch.arange(5, dtype=torch.float64) / 5
    linear, constant = theory.piecewise_linear(u), theory.piecewise_constant(u)
    bilinear, flat = theory.piecewise_bilinear(U), theory.PiecewiseConstant2d(U)
    assert torch.equal(linear(t), u)
    assert torch.equal(constant(t + 0.1), u)
    assert torch.allclose(linear(t[:4] + 0.05), 0.75 * u[:-1] + 0.25 * u[1:], atol=1e-14)
    assert torch.allclose(linear(torch.tensor([0.81, 0.93, 1.0], dtype=torch.float64)), u[-1:].expand(3, 2))
    assert torch.equal(bilinear(t[:, None], t[None]), theory.flip(U))
    assert torch.equal(flat(t[:, None] + 0.1, t[None] + 0.1), theory.flip(U))
    middle = bilinear(t[:, None] + 0.1, t[None] + 0.1)[1, 3]
    V = theory.flip(U)
    assert torch.allclose(middle, (V[1, 3] + V[2, 3] + V[1, 4] + V[2, 4]) / 4, atol=1e-14)
    assert torch.allclose(bilinear(t[:, None] + 0.03, t[None]), bilinear(t[None], t[:, None] + 0.03), atol=1e-14)


def test_extension_errors_have_their_orders():
    curves = theory.ParameterCurves.random_smooth(2, 9)
    constant, interior, square = [], [], []
    t = (torch.arange(4000, dtype=torch.float64) + 0.37) / 4000
    for layers in LEVELS:
        A = curves.A(torch.arange(layers, dtype=torch.float64) / layers)
        constant.append((theory.piecewise_constant(A)(t) - curves.A(t)).abs().max().item())
        inside = t[t <= 1 - 1 / layers]
        interior.append((theory.piecewise_linear(A)(inside) - curves.A(inside)).abs().max().item())
        K = theory.sample_pointwise(curves, layers).square("K")
        square.append(theory.piecewise_bilinear(K).l2_distance(curves.K, cells=2 * layers).item())
    assert theory.observed_order(constant, LEVELS)[-1] == pytest.approx(1, abs=0.1)
    assert theory.observed_order(interior, LEVELS)[-1] == pytest.approx(2, abs=0.1)
    assert theory.observed_order(square, LEVELS)[-1] == pytest.approx(1.5, abs=0.1)


def test_distances_are_exact_between_extensions():
    """Against a brute-force mean on a grid that resolves both, and a hand-computed case."""
    u = theory.piecewise_linear(torch.tensor([[0.0], [1.0]], dtype=torch.float64))  # rises on [0, 1/2], then 1
    zero = theory.piecewise_linear(torch.zeros(1, 1, dtype=torch.float64))
    assert u.l2_distance(zero).item() == pytest.approx(math.sqrt(1 / 6 + 1 / 2), rel=1e-14)
    assert u.sup_distance(zero).item() == 1
    first = theory.piecewise_bilinear(torch.randn(3, 3, 1, dtype=torch.float64))
    second = theory.piecewise_bilinear(torch.randn(4, 4, 1, dtype=torch.float64))
    t = (torch.arange(1200, dtype=torch.float64) + 0.5) / 1200
    gap = first(t[:, None], t[None]) - second(t[:, None], t[None])
    assert first.l2_distance(second).item() == pytest.approx(gap.square().mean().sqrt().item(), rel=1e-5)
    assert first.sup_distance(second) >= gap.abs().max()
    assert first.sup_distance(second).item() == pytest.approx(gap.abs().max().item(), rel=1e-2)


def test_prolong_and_restrict():
    coarse = rough(4)
    fine = theory.prolong(coarse, 8)
    for name, value in theory.restrict(fine, 4).items():
        assert torch.equal(value, getattr(coarse, name)), name
    assert torch.allclose(fine.A[1::2][:3], (coarse.A[:-1] + coarse.A[1:]) / 2, atol=1e-15)
    assert torch.equal(fine.A[7], coarse.A[3])  # the copied last interval
    square = coarse.square("K")
    assert torch.allclose(fine.square("K")[3, 2], (square[1, 1] + square[2, 1]) / 2, atol=1e-15)
    assert theory.distance(coarse, coarse) == 0
    assert theory.distance(coarse, fine, "sup") > 0
    with pytest.raises(ValueError, match="divide 8"):
        theory.restrict(fine, 3)
    with pytest.raises(ValueError, match="kind"):
        theory.distance(coarse, fine, "h1")


def test_bad_exponents_and_weights():
    parameters = rough(2)
    for p in (1.5, math.inf):
        with pytest.raises(ValueError, match="2 <= p"):
            theory.regularizer(parameters, p)
    with pytest.raises(ValueError, match="weights must name"):
        theory.regularizer(parameters, weights={"Q": 1.0})
    with pytest.raises(ValueError, match=">= 0"):
        theory.regularizer(parameters, weights=-1.0)
    with pytest.raises(ValueError, match="anchor"):
        theory.regularizer(parameters, anchor="end")
    with pytest.raises(TypeError, match="DiscreteParameters or a DNLBlock"):
        theory.regularizer([1.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("p", [2, 2.01, 2.5, 3, 3.5, 4, 5])
def test_hessian_vector_products_at_zero(p, dtype):
    """At 0 the two-index part has value, gradient and Hessian 0 for p > 2; the one-index part is quadratic."""
    for tiny in (0.0, 1e-160 if dtype == torch.float64 else 1e-20):
        point = theory.DiscreteParameters.zeros(4, 2, 1, dtype=dtype).map(
            lambda u, tiny=tiny: (u + tiny).requires_grad_()
        )
        tensors = [value for _, value in point.items()]
        generator = torch.Generator().manual_seed(0)
        directions = [torch.randn(z.shape, generator=generator, dtype=dtype) for z in tensors]
        gradients = torch.autograd.grad(theory.regularizer(point, p), tensors, create_graph=True)
        products = torch.autograd.grad(gradients, tensors, directions)
        for (name, _), product, direction in zip(point.items(), products, directions, strict=True):
            assert torch.isfinite(product).all(), name
            if name in ("A", "a", "vartheta"):
                rise = torch.diff(direction, dim=0) * 16  # 2 tau (v + D^T D v), D = differences over tau
                expected = direction / 4
                expected[1:] += rise / 4
                expected[:-1] -= rise / 4
                assert torch.allclose(product, 2 * expected, rtol=1e-5)
            elif p > 2.4:
                assert product.abs().max() <= 1e-3, name


def test_hessian_vector_products_away_from_zero_are_unchanged():
    point = rough(3, 1).requires_grad_()
    names = [name for name, _ in point.items()]

    def value(*tensors):
        return theory.regularizer(theory.DiscreteParameters(**dict(zip(names, tensors, strict=True))), 2.5)

    assert torch.autograd.gradgradcheck(value, tuple(v for _, v in point.items()))


def test_distances_have_a_subgradient_at_zero():
    """||u - v|| at u = v: 0, as torch's norms have it, where the root of a sum of squares gives nan."""
    point = rough(3).requires_grad_()
    gap = theory.distance(point, rough(3).map(torch.zeros_like).zip_map(lambda _, u: u.detach(), point))
    found = torch.autograd.grad(gap, [point.A, point.K])
    assert gap == 0
    assert all(bool((g == 0).all()) for g in found)
