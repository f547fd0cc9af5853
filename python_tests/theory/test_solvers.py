"""The recursion (1), the second-order schemes and the integral equation (7) against things that are not them."""

import numpy as np
import pytest
import torch
from theory_reference import network, numpy_phi, ode_solution, second_order

from dnl_kernels import theory
from dnl_kernels.theory import LayerMap, ParameterCurves, forward, observed_order, solve_integral_equation

D = 6  # 3 positions x 2 channels
KERNELS = ("local", "gaussian", "softmax", "rbf")
CLOSED = {
    "exp": (lambda t, s: 1.5 + 0 * t, lambda t: torch.exp(1.5 * t)),
    "cosh": (lambda t, s: t - s, torch.cosh),
    "cos": (lambda t, s: -4 * (t - s), lambda t: torch.cos(2 * t)),
}


def problem(kernel, activation="tanh", seed=7, dim=D, scale=1.0):
    phi = LayerMap.of(kernel, activation, positions=3)
    curves = ParameterCurves.random_smooth(dim, seed, vartheta=phi.parameter_count(dim), scale=scale)
    x = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return curves, x, phi


def scalar(kernel):
    ones = torch.ones(1, 1, dtype=torch.float64)
    return ParameterCurves(
        lambda t: 0 * t[..., None, None] + ones,
        lambda t: 0 * t[..., None],
        lambda t, s: kernel(t, s)[..., None, None],
        dim=1,
    )


def euler_errors(curves, x, phi, reference, levels, **options):
    return [forward(curves, x, phi, layers=n, **options).distance(reference) for n in levels]


@pytest.mark.parametrize("first", ["input", "lifted"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_recursion_equals_nested_loops(kernel, first):
    curves, x, phi = problem(kernel)
    P = theory.sample_cell_average(curves, 9)
    arrays = [P.A, P.a, P.square("K"), P.square("b"), P.vartheta]
    expected = network(*(z.numpy() for z in arrays), x.numpy(), numpy_phi(phi), first == "lifted")
    ours = forward(P, x, phi, first=first)
    assert np.abs(ours.states.numpy() - expected).max() < 1e-14
    assert torch.equal(ours.final, ours.states[-1])


def test_curves_and_their_point_samples_are_one_network():
    curves, x, phi = problem("softmax")
    ours = forward(curves, x, phi, layers=40).states
    assert (ours - forward(theory.sample_pointwise(curves, 40), x, phi).states).abs().max() < 1e-13


def test_batches_are_independent_and_keep_their_shape():
    curves, _, phi = problem("gaussian")
    x = torch.randn(2, 3, D, dtype=torch.float64)
    for scheme in ("euler", "trapezoid", "trapezoid_implicit"):
        together = forward(curves, x, phi, layers=12, scheme=scheme).states
        assert together.shape == (13, 2, 3, D)
        alone = forward(curves, x[1, 2], phi, layers=12, scheme=scheme).states
        assert (together[:, 1, 2] - alone).abs().max() < 1e-13
    assert forward(curves, x.float(), phi, layers=12).states.dtype == torch.float32


def test_forward_euler_of_a_constant_kernel_is_exact():
    """K = k, A = I: x^{l+1} = (1 + tau k) x^l, so x^l = (1 + tau k)^l."""
    for layers, k in ((7, 0.7), (50, -1.3)):
        states = forward(
            scalar(lambda t, s, k=k: k + 0 * t), torch.ones(1).double(), LayerMap(None, "identity"), layers=layers
        )
        expected = (1 + k / layers) ** torch.arange(layers + 1, dtype=torch.float64)
        assert (states.states[:, 0] / expected - 1).abs().max() < 1e-13


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name):
    kernel, exact = CLOSED[name]
    curves, x, phi, levels = scalar(kernel), torch.ones(1).double(), LayerMap(None, "identity"), (64, 128, 256)
    for scheme, order in (("euler", 1), ("trapezoid", 2), ("trapezoid_implicit", 2)):
        errors = []
        for n in levels:
            path = forward(curves, x, phi, layers=n, scheme=scheme)
            errors.append((path.states[1:, 0] - exact(path.times[1:])).abs().max().item())
        assert observed_order(errors, levels)[-1] == pytest.approx(order, abs=0.05), scheme
    solution = solve_integral_equation(curves, x, phi, rtol=1e-12)
    assert (solution.states[:, 0] - exact(solution.times)).abs().max() < 1e-11
    t = torch.linspace(0, 1, 301, dtype=torch.float64)
    assert (solution(t)[:, 0] - exact(t)).abs().max() < 1e-11  # dense output


@pytest.mark.parametrize("kernel", KERNELS)
def test_extrapolation_agrees_with_an_ode_solver(kernel):
    """Separable nonlinear problems as an ODE system by DOP853: 1e-8 asked, 1e-10 found."""
    curves, x, phi = problem(kernel)
    solution = solve_integral_equation(curves, x, phi, rtol=1e-12)
    assert solution.info["converged"]
    reference = ode_solution(curves, x.numpy(), numpy_phi(phi), solution.times.numpy())
    assert np.abs(solution.states.numpy() - reference).max() < 1e-10


@pytest.mark.parametrize("sampling", [theory.sample_pointwise, theory.sample_cell_average])
@pytest.mark.parametrize("kernel", KERNELS)
def test_eq_1_converges_at_order_one(kernel, sampling):
    curves, x, phi = problem(kernel)
    reference, levels = solve_integral_equation(curves, x, phi), (64, 128)
    errors = [forward(sampling(curves, n), x, phi).distance(reference) for n in levels]
    assert observed_order(errors, levels)[-1] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kernel", KERNELS)
def test_second_order_schemes(kernel):
    curves, x, phi = problem(kernel)
    reference, levels = solve_integral_equation(curves, x, phi), (64, 128)
    for scheme in ("trapezoid", "trapezoid_implicit"):
        errors = euler_errors(curves, x, phi, reference, levels, scheme=scheme)
        assert observed_order(errors, levels)[-1] == pytest.approx(2, abs=0.05), scheme


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_orders_over_the_long_range(kernel):
    """The bar: 1.00 +- 0.05 and 2.00 +- 0.05 between 2^6 and 2^12 with tanh."""
    curves, x, phi = problem(kernel)
    reference, levels = solve_integral_equation(curves, x, phi, rtol=1e-11), (64, 512, 4096)
    for scheme, order in (("euler", 1), ("trapezoid", 2)):
        errors = euler_errors(curves, x, phi, reference, levels, scheme=scheme)
        assert observed_order(errors, levels) == pytest.approx([order] * 2, abs=0.05), scheme


def test_relu_keeps_order_one_and_nearly_two():
    """Kinks move between grid points: the order holds, with a constant that jumps."""
    curves, x, phi = problem("softmax", "relu")
    times = np.arange(257) / 256
    reference = theory.Trajectory(
        torch.tensor(times), torch.tensor(ode_solution(curves, x.numpy(), numpy_phi(phi), times))
    )
    levels = (32, 64, 128, 256)
    first = euler_errors(curves, x, phi, reference, levels)
    assert theory.fitted_order(first, levels) == pytest.approx(1, abs=0.15)
    second = euler_errors(curves, x, phi, reference, levels, scheme="trapezoid")
    assert theory.fitted_order(second, levels) == pytest.approx(2, abs=0.25)


def test_second_order_needs_all_three_changes():
    """The package equals the reference scheme with all three, and each ablation of the reference has order one."""
    curves, x, phi = problem("gaussian")
    reference, levels = solve_integral_equation(curves, x, phi), (32, 64, 128)
    ours = forward(curves, x, phi, layers=64, scheme="trapezoid").states.numpy()
    assert np.abs(ours - second_order(curves, x.numpy(), numpy_phi(phi), 64)).max() < 1e-13
    for ablation in ({"weights": "rectangle"}, {"shift": False}, {"lift": False}):
        errors = []
        for n in levels:
            states = torch.tensor(second_order(curves, x.numpy(), numpy_phi(phi), n, **ablation))
            errors.append(theory.Trajectory(torch.arange(n + 1).double() / n, states).distance(reference))
        assert observed_order(errors, levels)[-1] == pytest.approx(1, abs=0.1), ablation
    unlifted = euler_errors(curves, x, phi, reference, levels, scheme="trapezoid", first="input")
    assert observed_order(unlifted, levels)[-1] == pytest.approx(1, abs=0.1)


def test_richardson_of_eq_1_is_second_order():
    curves, x, phi = problem("local")
    reference, levels = solve_integral_equation(curves, x, phi), (32, 64, 128)
    errors = []
    for n in levels:
        coarse, fine = (forward(curves, x, phi, layers=m) for m in (n, 2 * n))
        better = theory.richardson(coarse.states, fine.states[::2], 1)
        errors.append(theory.Trajectory(coarse.times, better).distance(reference))
    assert observed_order(errors, levels)[-1] == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_hoelder_curves_lower_the_order(alpha):
    """A(t) = 1 + |t - 1/2|^alpha, K = 1: order alpha. The exact solution is an ODE for the integral."""
    from scipy.integrate import solve_ivp

    def A(t):
        return (1 + (t - 0.5).abs() ** alpha)[..., None, None]

    curves = ParameterCurves(A, lambda t: 0 * t[..., None], lambda t, s: 1 + 0 * t[..., None, None], dim=1)
    rhs = lambda t, z: np.tanh((1 + abs(t - 0.5) ** alpha) / 2 + z)  # noqa: E731
    times = np.arange(1025) / 1024
    options = {"method": "DOP853", "rtol": 1e-11, "atol": 1e-12}
    left = solve_ivp(rhs, (0, 0.5), [0.0], t_eval=times[:513], **options).y[0]
    right = solve_ivp(rhs, (0.5, 1), [left[-1]], t_eval=times[512:], **options).y[0]
    exact = torch.tensor(rhs(times, np.concatenate([left, right[1:]])))[:, None]
    reference = theory.Trajectory(torch.tensor(times), exact)
    levels = (128, 256, 512, 1024)
    errors = euler_errors(curves, torch.full((1,), 0.5).double(), LayerMap(), reference, levels)
    assert observed_order(errors, levels)[-1] == pytest.approx(alpha, abs=0.05)


def test_adjoint_equals_autograd():
    for kernel in ("local", "softmax", "rbf"):
        curves, _, phi = problem(kernel)
        P = theory.sample_pointwise(curves, 8).requires_grad_()
        x = torch.randn(3, D, dtype=torch.float64)
        target = torch.randn(3, D, dtype=torch.float64)
        final = forward(P, x, phi).final
        names = [name for name, value in P.items() if value.numel()]
        expected = torch.autograd.grad((final - target).square().sum() / 2, [getattr(P, name) for name in names])
        found = theory.adjoint(P, x, phi, (final - target).detach())
        for name, gradient in zip(names, expected, strict=True):
            ours = getattr(found.gradient, name)
            assert (ours - gradient).abs().max() <= 1e-12 * max(1, gradient.abs().max().item()), (kernel, name)


@pytest.mark.parametrize("kernel", ["local", "softmax", "rbf"])
def test_adjoint_of_a_lifted_start(kernel):
    """x^0 depends on A^0, a^0 and vartheta^0: the derivative through it is part of theirs."""
    curves, _, phi = problem(kernel)
    P = theory.sample_pointwise(curves, 5).requires_grad_()
    x = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    path = forward(P, x, phi, first="lifted")
    assert path.first == "lifted"
    names = [name for name, value in P.items() if value.numel()]
    expected = torch.autograd.grad(path.final.square().sum() / 2, [getattr(P, name) for name in names])
    for options in ({"trajectory": path}, {"first": "lifted"}, {"trajectory": path, "first": "lifted"}):
        found = theory.adjoint(P, x, phi, path.final.detach(), **options).gradient
        for name, gradient in zip(names, expected, strict=True):
            assert (getattr(found, name) - gradient).abs().max() <= 1e-12, (options.keys(), name)


def test_a_trajectory_of_something_else_is_refused():
    curves, x, phi = problem("rbf")
    P = theory.sample_pointwise(curves, 5)
    final = torch.ones(D, dtype=torch.float64)
    lifted, plain = forward(P, x, phi, first="lifted"), forward(P, x, phi)
    others = [
        ({"trajectory": lifted, "first": "input"}, "state 0 differs"),
        ({"trajectory": plain, "first": "lifted"}, "state 0 differs"),
        ({"trajectory": forward(curves, x, phi, layers=5, scheme="trapezoid")}, "trajectory must hold the states"),
        ({"trajectory": forward(theory.sample_cell_average(curves, 5), x, phi)}, "trajectory must hold the states"),
        ({"trajectory": forward(theory.sample_pointwise(curves, 4), x, phi)}, "trajectory.states must have shape"),
        ({"first": "zero"}, "first must be one of"),
    ]
    for options, says in others:
        with pytest.raises(ValueError, match=says):
            theory.adjoint(P, x, phi, final, **options)
    theory.adjoint(P.map(torch.Tensor.float), x.float(), phi, final.float())
    half = theory.adjoint(P.map(torch.Tensor.half), x.half(), phi, final.half()).gradient
    exact = theory.adjoint(P, x, phi, final).gradient
    assert half.A.dtype == torch.float16
    assert (half.A.double() - exact.A).abs().max() < 2e-2


@pytest.mark.parametrize("scheme", ["euler", "trapezoid", "trapezoid_implicit"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_empty_batches(kernel, scheme):
    curves, _, phi = problem(kernel)
    for shape in ((0, D), (2, 0, D)):
        x = torch.zeros(shape, dtype=torch.float64)
        path = forward(curves, x, phi, layers=7, scheme=scheme)
        assert path.states.shape == (8, *shape)
        assert path(torch.rand(3, dtype=torch.float64)).shape == (3, *shape)
        assert path.distance(path) == 0
    P = theory.sample_pointwise(curves, 4).requires_grad_()
    empty = torch.zeros(0, D, dtype=torch.float64)
    forward(P, empty, phi).final.sum().backward()
    gradient = theory.adjoint(P, empty, phi, empty).gradient
    assert gradient.A.shape == P.A.shape
    assert not gradient.K.any()
    assert torch.isfinite(theory.state_bound(P, empty, phi).uniform)
    assert torch.isfinite(torch.tensor(theory.convergence_constant(curves, empty, phi).log_C))


def test_large_half_precision_batches_are_finite():
    """Their pre-activations sum to more than the largest float16, which is no fault of any curve."""
    curves, _, phi = problem("local")
    x = torch.full((40000, D), 2.0, dtype=torch.float16)
    path = forward(curves, x, phi, layers=3)
    assert torch.isfinite(path.states).all()
    P = theory.sample_pointwise(curves, 3, dtype=torch.float16)
    assert (forward(P, x[:2], phi).states - path.states[:, :2]).abs().max() < 5e-3


def test_any_function_is_a_layer_map():
    """Solvers and learning problems take functions; what needs a LayerMap's constants says so."""
    curves, x, _ = problem("local")
    phi = lambda y, v: torch.sin(y)  # noqa: E731
    assert forward(curves, x, phi, layers=4).states.shape == (5, D)
    assert solve_integral_equation(curves, x, phi).info["converged"]
    P = theory.sample_pointwise(curves, 3)
    found = theory.LearningProblem(x[None, :1], x[None, 1:2], phi).minimize(2, restarts=1, max_iterations=5)
    assert found.parameters.vartheta.shape == (2, 0)
    scaled = theory.LearningProblem(x[None, :1], x[None, 1:2], lambda y, v: torch.sin(y + v), vartheta=1)
    assert scaled.minimize(2, restarts=1, max_iterations=5).parameters.vartheta.shape == (2, 1)
    for call in (
        lambda: theory.state_bound(P, x, phi),
        lambda: theory.trajectory_bound(curves, x, phi),
        lambda: theory.convergence_constant(curves, x, phi),
        lambda: theory.as_block(P, phi),
    ):
        with pytest.raises(TypeError, match="phi must be a LayerMap"):
            call()


def test_adjoint_has_a_dirac_at_the_end():
    """q^{L-1} = O(1) and q^l = O(tau) before it: x(1) is a point value."""
    curves, x, phi = problem("rbf")
    last, scaled = [], []
    for layers in (16, 64):
        P = theory.sample_pointwise(curves, layers)
        q = theory.adjoint(P, x, phi, forward(P, x, phi).final).preactivation.norm(dim=-1)
        last.append(q[-1].item())
        scaled.append(layers * q[:-1].max().item())
    assert last[1] == pytest.approx(last[0], rel=0.1)
    assert scaled[1] == pytest.approx(scaled[0], rel=0.3)
    assert last[1] > 10 * scaled[1] / 64


def test_gradients_flow_through_every_scheme():
    phi = LayerMap.of("gaussian", positions=2)
    C = (torch.randn(1, 1, 4, 4, dtype=torch.float64) / 2).requires_grad_()
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    one = lambda t: torch.ones_like(t)[..., None]  # noqa: E731

    def final(coefficients, start, scheme):
        curves = ParameterCurves(
            theory.BasisCurve(one, torch.eye(4, dtype=torch.float64)[None]),
            theory.BasisCurve(one, torch.zeros(1, 4, dtype=torch.float64)),
            theory.SeparableKernel(one, one, coefficients),
            dim=4,
        )
        return forward(curves, start, phi, layers=3, scheme=scheme).final

    for scheme in ("euler", "trapezoid", "trapezoid_implicit"):
        assert torch.autograd.gradcheck(lambda c, z, k=scheme: final(c, z, k), (C, x)), scheme


def test_dense_output_interpolates():
    curves, x, phi = problem("rbf")
    path = forward(curves, x, phi, layers=16)
    assert torch.equal(path(path.times), path.states)
    middle = path(torch.tensor([0.5 / 16, 15.5 / 16], dtype=torch.float64))
    expected = (path.states[[0, 15]] + path.states[[1, 16]]) / 2
    assert torch.allclose(middle, expected, atol=1e-14)
    cubic = theory.Trajectory(path.times, (path.times**3)[:, None], degree=3)
    t = torch.rand(50, dtype=torch.float64)
    assert torch.allclose(cubic(t)[:, 0], t**3, atol=1e-13)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        path(1.5)


def test_bad_input_is_named():
    curves, x, phi = problem("local")
    P = theory.sample_pointwise(curves, 4)
    cases = [
        (lambda: forward(P, x[:4], phi), ValueError, r"x must have shape \[..., 6\]"),
        (lambda: forward(P, x, phi, scheme="heun"), ValueError, "scheme must be one of"),
        (lambda: forward(P, x, phi, scheme="trapezoid"), ValueError, "needs curves"),
        (lambda: forward(P, x, phi, layers=5), ValueError, "layers must be 4"),
        (lambda: forward(curves, x, phi), ValueError, "layers must be given"),
        (lambda: forward(curves, x, phi, layers=0), ValueError, "layers must be >= 1"),
        (lambda: forward(P, x, phi, first="zero"), ValueError, "first must be one of"),
        (lambda: forward(P, x.int(), phi), TypeError, "floating dtype"),
        (lambda: forward(P, x * float("nan"), phi), ValueError, "states must be finite"),
        (lambda: solve_integral_equation(curves, x, phi, rtol=0), ValueError, "rtol must be > 0"),
        (lambda: observed_order([1.0], [8, 16]), ValueError, "one length"),
        (lambda: observed_order([1.0, 2.0], [16, 8]), ValueError, "increasing"),
        (lambda: observed_order([1.0, -2.0], [8, 16]), ValueError, ">= 0"),
        (lambda: theory.adjoint(P, x, phi, x[:2]), ValueError, "loss_gradient must have shape"),
    ]
    for call, error, says in cases:
        with pytest.raises(error, match=says):
            call()


def test_a_step_too_large_for_the_fixed_point_says_so():
    curves = scalar(lambda t, s: 100 + 0 * t)
    with pytest.raises(RuntimeError, match="use more layers"):
        forward(curves, torch.ones(1).double(), LayerMap(None, "identity"), layers=4, scheme="trapezoid_implicit")


def test_unconverged_solutions_warn():
    curves, x, phi = problem("softmax", "relu")
    with pytest.warns(UserWarning, match="error estimate"):
        solution = solve_integral_equation(curves, x, phi, rtol=1e-13, max_points=256)
    assert not solution.info["converged"]
