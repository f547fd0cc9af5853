"""Constants of Remark 1, Lemma 2, Proposition 3 and Corollary 5 as invariants: observed <= bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnl_kernels import theory
from dnl_kernels.theory import (
    EmbeddedGaussianKernel,
    GaussianKernel,
    LayerMap,
    NonLocalOperator,
    ParameterCurves,
    RBFKernel,
    forward,
    growth_constant,
    lipschitz_constant,
    parameter_lipschitz_constant,
)

n, c = 5, 3
SLACK = 1 + 1e-12


def random_case(kind, norm, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    V, M = normal(c, c), normal(c, c) * math.exp(normal(()).item())
    h = math.exp(normal(()).item())
    kernel = {"gaussian": GaussianKernel(), "softmax": EmbeddedGaussianKernel(M), "rbf": RBFKernel(h)}[kind]
    y = normal(n, c) * math.exp(normal(()).item())
    return NonLocalOperator(kernel, norm, positions=n, value=V), y


CASES = [("gaussian", "row"), ("softmax", "row"), *(("rbf", norm) for norm in ("row", "const", "none", "sym"))]


@settings(max_examples=40, deadline=None)
@given(case=st.sampled_from([*CASES, ("gaussian", "sym")]), seed=st.integers(0, 10**6))
def test_growth(case, seed):
    N, y = random_case(*case, seed)
    assert N(y.reshape(-1)).norm() <= growth_constant(N, n * c) * y.norm() * SLACK


@settings(max_examples=40, deadline=None)
@given(case=st.sampled_from(CASES), seed=st.integers(0, 10**6))
def test_lipschitz_in_y(case, seed):
    N, y = random_case(*case, seed)
    jacobian = torch.autograd.functional.jacobian(N, y.reshape(-1))
    radius = y.norm(dim=1).max().item()
    assert torch.linalg.matrix_norm(jacobian, 2) <= lipschitz_constant(N, n * c, radius) * SLACK


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(["softmax", "rbf"]), value=st.booleans(), seed=st.integers(0, 10**6))
def test_lipschitz_in_the_parameters(kind, value, seed):
    generator = torch.Generator().manual_seed(seed)
    kernel = EmbeddedGaussianKernel() if kind == "softmax" else RBFKernel()
    N = NonLocalOperator(kernel, positions=n, value="curve" if value else None)
    v = torch.randn(N.parameter_count(n * c), generator=generator, dtype=torch.float64) / 2
    y = torch.randn(n * c, generator=generator, dtype=torch.float64) * 2
    jacobian = torch.autograd.functional.jacobian(lambda z: N(y, z), v)
    bound = parameter_lipschitz_constant(N, n * c, y.reshape(n, c).norm(dim=1).max().item(), v)
    assert torch.linalg.matrix_norm(jacobian, 2) <= bound * SLACK


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_constants_are_those_of_the_table():
    """n = 4, c = 2, ||V|| = 3, ||M|| = 2, h = 1/2, R = 2, written out as numbers."""
    V, M = matrix([3.0, 0.0], [0.0, -1.0]), matrix([0.0, 2.0], [1.0, 0.0])

    def N(kernel, norm="row", value=V):
        return NonLocalOperator(kernel, norm, positions=4, value=value)

    rbf, slope = RBFKernel(0.5), 2 / (0.5 * math.sqrt(math.e))
    growth = {
        (theory.LocalKernel(), "row"): 3,
        (GaussianKernel(), "row"): 6,
        (EmbeddedGaussianKernel(M), "row"): 6,
        (GaussianKernel(), "sym"): 3,
        (rbf, "row"): 6,
        (rbf, "const"): 3,
        (rbf, "none"): 12,
        (rbf, "sym"): 3,
    }
    for (kernel, norm), constant in growth.items():
        assert growth_constant(N(kernel, norm), 8) == pytest.approx(constant, rel=1e-14), (kernel, norm)
    lipschitz = {
        (theory.LocalKernel(), "row"): 3,
        (GaussianKernel(), "row"): 3 * (2 + 3 * 4),
        (EmbeddedGaussianKernel(M), "row"): 3 * (2 + 3 * 2 * 4),
        (RBFKernel(10.0), "row"): 3 * (2 + 5 * 0.04),
        (rbf, "row"): 3 * (2 + 21 / math.e),  # the global bound is the smaller one here
        (rbf, "const"): 3 * (1 + 2 * slope),
        (rbf, "none"): 12 * (1 + 2 * slope),
        (rbf, "sym"): 3 * (1 + 15 * slope),
    }
    for (kernel, norm), constant in lipschitz.items():
        assert lipschitz_constant(N(kernel, norm), 8, 2.0) == pytest.approx(constant, rel=1e-14), (kernel, norm)
    v = torch.tensor([math.log(0.5)], dtype=torch.float64)
    assert parameter_lipschitz_constant(N(RBFKernel()), 8, 2.0, v) == pytest.approx(3 * 2 * 64 * 2, rel=1e-14)
    v = M.reshape(-1)
    assert parameter_lipschitz_constant(N(EmbeddedGaussianKernel()), 8, 2.0, v) == pytest.approx(3 * 4 * 4)
    free = N(GaussianKernel(), value="curve")
    assert parameter_lipschitz_constant(free, 8, 2.0, 0 * v) == pytest.approx(2 * 4)
    both = N(EmbeddedGaussianKernel(), value="curve")
    assert parameter_lipschitz_constant(both, 8, 2.0, torch.cat([v, 0 * v])) == pytest.approx(math.hypot(16, 8))


def test_row_growth_is_attained():
    """All weight on one position, which all copy: |N(y)| = sqrt(n) |y|, so no smaller constant holds."""
    y = matrix([1.0, 0.0], *[[0.0, 1e-3]] * 3)
    N = NonLocalOperator(EmbeddedGaussianKernel(matrix([1e3, 0.0], [1e6, 0.0])), positions=4)
    ratio = N(y.reshape(-1)).norm() / y.norm()
    assert ratio > 0.999 * growth_constant(N, 8)
    assert ratio <= growth_constant(N, 8)


def test_corollary_5_and_proposition_3_written_out():
    """Constant A, linear a, b and K = (2 t - s) / 8, local tanh in one dimension: every piece by hand."""
    one = torch.ones_like
    curves = ParameterCurves(
        lambda t: 0.5 * one(t)[..., None, None],
        lambda t: (0.25 + 0.1 * t)[..., None],
        lambda t, s: (2 * t - s)[..., None, None] / 8,
        lambda t, s: (0.1 + 0.025 * t)[..., None],
        dim=1,
    )
    x, phi = torch.tensor([2.0], dtype=torch.float64), LayerMap()
    F, k = 0.5 * 2 + 0.35 + 0.125, 0.25
    bound = theory.trajectory_bound(curves, x, phi)
    assert (bound.F, bound.k, bound.sup) == pytest.approx((F, k, F * math.exp(k)), rel=1e-13)
    found = theory.convergence_constant(curves, x, phi, sup_state=2.0)
    L_K, L_b, X = 0.25, 0.025, 2.0
    L_x = 0.1 + k * X + 0.125 + L_K * X + L_b
    C1 = 0.1 + 2 * L_K * X + 2 * L_b + k * L_x
    gap = 2 - math.tanh(0.5 * 2 + 0.25)
    assert found.trajectory_lipschitz == pytest.approx(L_x, rel=1e-12)
    assert found.start_gap == pytest.approx(gap, rel=1e-12)
    assert pytest.approx((C1 + k * gap) * math.exp(k), rel=1e-12) == found.C


def test_normalised_rbf_is_globally_lipschitz_and_dot_products_are_not():
    """n = 2, c = 1: the Jacobian of the dot-product kernel grows like R^2 / 4, that of RBF stays below its bound."""
    rbf, dot = NonLocalOperator(RBFKernel(1.0), positions=2), NonLocalOperator(GaussianKernel(), positions=2)
    bound = lipschitz_constant(rbf, 2)
    assert bound < 5
    for radius in (1.0, 10.0, 100.0):
        y = torch.tensor([radius, 0.0], dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(rbf, y)
        assert torch.linalg.matrix_norm(jacobian, 2) <= bound
    worst = torch.linalg.matrix_norm(torch.autograd.functional.jacobian(dot, torch.tensor([0.0, 100.0]).double()), 2)
    assert worst > 2000
    with pytest.raises(ValueError, match="radius must be finite"):
        lipschitz_constant(dot, 2)


def test_symmetric_rbf_weights_have_norm_one():
    for _ in range(30):
        y = torch.randn(8, 3, dtype=torch.float64) * math.exp(torch.randn(()).item())
        w = NonLocalOperator(RBFKernel(1.0), "sym", positions=8).weights(y, torch.tensor(1.0).double())
        eigenvalues = torch.linalg.eigvalsh(w)
        assert torch.equal(w, w.T)
        assert eigenvalues.min() > -1e-12
        assert eigenvalues.max() < 1 + 1e-12


@pytest.mark.parametrize("kernel", ["local", "gaussian", "softmax", "rbf"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_lemma_2(kernel, activation):
    phi = LayerMap.of(kernel, activation, positions=2)
    for seed in range(8):
        scale = math.exp(torch.randn(()).item())
        curves = ParameterCurves.random_smooth(4, seed, scale=scale, vartheta=phi.parameter_count(4))
        P, x = theory.sample_pointwise(curves, 2 + 3 * seed), torch.randn(3, 4, dtype=torch.float64)
        bound = theory.state_bound(P, x, phi)
        sizes = forward(P, x, phi).states.norm(dim=-1).max(1).values[1:]
        assert (sizes <= bound.per_layer * SLACK).all()
        assert (bound.per_layer <= bound.uniform * SLACK).all()


def test_lemma_2_of_a_lifted_start():
    """x^0 = phi(A^0 x + a^0) may be larger than x: the bound starts from what bounds it."""
    for seed in range(12):
        phi = LayerMap.of("local", "relu") if seed % 2 else LayerMap.of("rbf", "relu", positions=2)
        curves = ParameterCurves.random_smooth(4, seed, scale=2.0, vartheta=phi.parameter_count(4))
        P = theory.sample_pointwise(curves, 3)
        x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 8
        sizes = forward(P, x, phi, first="lifted").states.norm(dim=-1).max(1).values
        bound = theory.state_bound(P, x, phi, first="lifted")
        assert sizes[0] <= bound.start * SLACK
        assert (sizes[1:] <= bound.per_layer * SLACK).all()
        assert (bound.per_layer <= bound.uniform * SLACK).all()
        plain = theory.state_bound(P, x, phi)
        assert plain.start == x.norm(dim=-1).max()
    one = torch.ones(1, 1, dtype=torch.float64)
    P = theory.DiscreteParameters(2 * one[None], one, 3 * one[None], 0 * one, one[:, :0])
    phi, x = LayerMap(None, "identity"), torch.ones(1, dtype=torch.float64)
    reached = forward(P, x, phi, first="lifted").final  # 2 + 1 + 3 (2 + 1) = 12, not 2 + 1 + 3 = 6
    assert reached > theory.state_bound(P, x, phi).per_layer[-1]
    assert reached.item() == pytest.approx(theory.state_bound(P, x, phi, first="lifted").per_layer[-1].item())
    with pytest.raises(ValueError, match="first must be one of"):
        theory.state_bound(P, x, phi, first="zero")


def test_corollary_5_of_a_lifted_start():
    phi = LayerMap.of("local")
    curves = ParameterCurves.random_smooth(3, 4, scale=0.5)
    x = torch.ones(3, dtype=torch.float64)
    constant = theory.convergence_constant(curves, x, phi, first="lifted")
    assert constant.start_gap == 0
    assert constant.C < theory.convergence_constant(curves, x, phi).C
    solution = theory.solve_integral_equation(curves, x, phi)
    for layers in (4, 16, 64):
        path = forward(curves, x, phi, layers=layers, first="lifted")
        assert path.distance(solution, first=0) * layers <= constant.C * SLACK


def test_lemma_2_is_sharp():
    """Equality: d = 1, b = 0, positive constants, sigma = N = id."""
    layers, ones = 20, torch.ones(1, 1, dtype=torch.float64)
    size = layers * (layers + 1) // 2
    A, K = 1.5 * ones.expand(layers, 1, 1), 0.7 * ones.expand(size, 1, 1)
    P = theory.DiscreteParameters(
        A, 0.3 * ones.expand(layers, 1), K, 0 * ones.expand(size, 1), ones.new_zeros(layers, 0)
    )
    x, phi = torch.tensor([2.0], dtype=torch.float64), LayerMap(None, "identity")
    states = forward(P, x, phi).states[1:, 0]
    assert (states / theory.state_bound(P, x, phi).per_layer - 1).abs().max() < 1e-13


@pytest.mark.parametrize("kernel", ["local", "rbf"])
def test_proposition_3_and_corollary_5(kernel):
    phi = LayerMap.of(kernel, positions=2)
    curves = ParameterCurves.random_smooth(4, 7, scale=0.3, vartheta=phi.parameter_count(4))
    x = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 2
    solution = theory.solve_integral_equation(curves, x, phi)
    sizes = solution.states.norm(dim=-1)
    bound = theory.trajectory_bound(curves, x, phi)
    assert (sizes <= bound(solution.times) * SLACK).all()
    states = [forward(curves, x, phi, layers=layers) for layers in (4, 16, 64)]
    largest = max(path.states.norm(dim=-1).max().item() for path in states)
    for options in ({}, {"sup_state": max(largest, sizes.max().item())}):
        constant = theory.convergence_constant(curves, x, phi, **options)
        slope = (torch.diff(solution.states, dim=0).norm(dim=-1) * solution.layers).max().item()
        assert slope <= constant.trajectory_lipschitz * SLACK
        assert constant.start_gap == pytest.approx((x - solution.states[0]).norm().item(), rel=1e-12)
        for path in states:
            assert path.distance(solution) * path.layers <= constant.C * SLACK
    sharp = theory.convergence_constant(curves, x, phi, sup_state=largest)
    assert sharp.C < theory.convergence_constant(curves, x, phi).C
    assert math.isfinite(sharp.C)


def test_constants_that_do_not_exist():
    with pytest.warns(UserWarning):
        N = NonLocalOperator(GaussianKernel(), "const", positions=2)
    with pytest.raises(ValueError, match="violates"):
        growth_constant(N, 4)
    with pytest.raises(ValueError, match="no Lipschitz constant"):
        lipschitz_constant(NonLocalOperator(GaussianKernel(), "sym", positions=2), 4, 1.0)
    with pytest.raises(ValueError, match="radius must be >= 0"):
        lipschitz_constant(NonLocalOperator(RBFKernel(1.0), positions=2), 4, -1.0)
    curves = ParameterCurves.random_smooth(2, 0)
    with pytest.raises(ValueError, match="sigma\\(0\\) = 0"):
        theory.trajectory_bound(curves, torch.ones(2).double(), LayerMap(None, "softplus"))
