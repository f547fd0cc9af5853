"""The regularised learning problems (4) and (11), solved in cosine coordinates, and the functionals (17)-(18)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._checks import check_choice, check_count, check_exponent, check_finite, check_tensor
from .curves import ParameterCurves
from .extension import extend, prolong
from .integral import solve_integral_equation
from .lbfgs import minimize_lbfgs
from .operators import LayerMap
from .parameters import TWO_INDEX, DiscreteParameters
from .regularization import regularizer, regularizer_continuous
from .sampling import sample_pointwise
from .solvers import LayerFunction, forward
from .spectral import SobolevPreconditioner

Loss = Callable[[Tensor, Tensor], Tensor]
AMPLITUDES = (0.0, 0.1, 0.3, 1.0, 2.0)  # of successive random starts


def half_square(x: Tensor, target: Tensor) -> Tensor:
    """|x - g|^2 / 2 per sample."""
    return (x - target).square().sum(-1) / 2


@dataclass(frozen=True)
class Minimizer:
    """A stationary point found by L-BFGS.

    Attributes:
        parameters: Theta*.
        value, data, penalty: J_L = data + penalty.
        gradient: the largest entry of the gradient in the H^1-orthonormal coordinates.
        iterations: of this start.
        starts: the values of all starts, sorted; the first is `value`.
        branches: distinct stationary values among the starts with the parameters that reach them, best first.
    """

    parameters: DiscreteParameters
    value: float
    data: float
    penalty: float
    gradient: float
    iterations: int
    starts: tuple[float, ...] = ()
    branches: tuple[Minimizer, ...] = field(default=(), repr=False)

    @property
    def agreeing(self) -> int:
        """How many starts reached the best value to 1e-8."""
        return sum(value - self.value <= 1e-8 for value in self.starts)


class LearningProblem:
    """J_L(Theta) = (1/S) sum_s ell(x^L(d_s; Theta), g_s) + lambda R_L(Theta), and its continuous limit J(theta).

    Args:
        inputs: d_s [S, d].
        targets: g_s [S, d].
        phi: the layer map, a LayerMap or any function (y [B, d], vartheta [v] or None) -> [B, d].
        weight: lambda, one number or by parameter name.
        p: exponent of the two-index part of R; the theory needs p > 2.
        first: "input" or "lifted", see `forward`.
        loss: (x [S, d], g [S, d]) -> [S]; half the squared distance by default.
        vartheta: v, the entries of vartheta; by default those that a LayerMap needs, 0 for another function.

    Source: DNL (4), (11) (words; the factor 1/S is our choice).
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        phi: LayerFunction,
        *,
        weight: float | Mapping[str, float] = 1e-3,
        p: float = 4,
        first: str = "input",
        loss: Loss = half_square,
        vartheta: int | None = None,
    ):
        for name, value in (("inputs", inputs), ("targets", targets)):
            check_finite(name, check_tensor(name, value))
        if inputs.ndim != 2 or inputs.shape != targets.shape or not inputs.shape[0]:
            shapes = f"{list(inputs.shape)} and {list(targets.shape)}"
            raise ValueError(f"inputs and targets must both have shape [S, d] with S >= 1, got {shapes}")
        self.inputs, self.targets, self.phi, self.loss = inputs, targets, phi, loss
        self.weight, self.p = weight, check_exponent(p)
        self.first = check_choice("first", first, ("input", "lifted"))
        own = phi.parameter_count(self.dim) if isinstance(phi, LayerMap) else 0
        self.vartheta = own if vartheta is None else check_count("vartheta", vartheta, own)

    @property
    def dim(self) -> int:
        return self.inputs.shape[1]

    def coordinates(self, layers: int) -> SobolevPreconditioner:
        return SobolevPreconditioner(
            layers, self.dim, self.vartheta, dtype=self.inputs.dtype, device=self.inputs.device
        )

    def data_loss(self, parameters: DiscreteParameters) -> Tensor:
        """The first term of J_L."""
        final = forward(parameters, self.inputs, self.phi, first=self.first).final
        return self.loss(final, self.targets).mean()

    def penalty(self, parameters: DiscreteParameters) -> Tensor:
        return regularizer(parameters, self.p, self._weights())

    def objective(self, parameters: DiscreteParameters) -> Tensor:
        """J_L(Theta), eq. (4)."""
        return self.data_loss(parameters) + self.penalty(parameters)

    def objective_continuous(self, curves: ParameterCurves, *, rtol: float = 1e-9, panels: int = 8) -> Tensor:
        """J(theta), eq. (11)."""
        final = solve_integral_equation(curves, self.inputs, self.phi, rtol=rtol).final
        penalty = regularizer_continuous(curves, self.p, self._weights(), panels=panels)
        return self.loss(final, self.targets).mean() + penalty

    def _weights(self) -> Mapping[str, float] | float:
        return self.weight

    def descend(
        self,
        layers: int,
        start: Tensor,
        *,
        tolerance: float = 1e-9,
        max_iterations: int = 4000,
        on_progress: Callable[[], None] | None = None,
    ) -> Minimizer:
        """L-BFGS from the cosine coordinates `start`."""
        coordinates = self.coordinates(layers)

        def oracle(point: Tensor) -> tuple[float, Tensor]:
            z = point.detach().requires_grad_()
            with torch.enable_grad():
                value = self.objective(coordinates.to_parameters(z))
            (gradient,) = torch.autograd.grad(value, z)
            if on_progress is not None:
                on_progress()
            return value.item(), gradient

        result = minimize_lbfgs(oracle, start, tolerance=tolerance, max_iterations=max_iterations)
        with torch.no_grad():
            found = coordinates.to_parameters(result.point)
            data, penalty = self.data_loss(found).item(), self.penalty(found).item()
        gradient = result.gradient.abs().max().item()
        return Minimizer(found, data + penalty, data, penalty, gradient, result.iterations, (data + penalty,))

    def minimize(
        self,
        layers: int,
        *,
        restarts: int = 3,
        seed: int = 0,
        start: DiscreteParameters | None = None,
        tolerance: float = 1e-9,
        max_iterations: int = 4000,
        on_progress: Callable[[], None] | None = None,
    ) -> Minimizer:
        """The best of several smooth random starts, and of `start` where given (carried to this grid by I_1).

        The result's `starts` and `branches` say how far global optimality is supported: all starts agreeing is
        evidence, several branches show that the problem is not convex. Neither is a certificate.
        """
        check_count("layers", layers)
        check_count("restarts", restarts, 0 if start is not None else 1)
        coordinates = self.coordinates(layers)

        def descend(z: Tensor) -> Minimizer:
            return self.descend(layers, z, tolerance=tolerance, max_iterations=max_iterations, on_progress=on_progress)

        generator = torch.Generator().manual_seed(seed)
        found = []
        if start is not None:
            found.append(descend(coordinates.to_coordinates(prolong(start, layers))))
        for index in range(restarts):
            z = coordinates.smooth_start(generator, AMPLITUDES[index % len(AMPLITUDES)])
            found.append(descend(z))
        found.sort(key=lambda m: m.value)
        branches: list[Minimizer] = []
        for m in found:
            if all(abs(m.value - other.value) > 1e-6 for other in branches):
                branches.append(m)
        best = found[0]
        return Minimizer(
            best.parameters,
            best.value,
            best.data,
            best.penalty,
            best.gradient,
            best.iterations,
            tuple(m.value for m in found),
            tuple(branches),
        )

    def continuation(
        self,
        levels: Sequence[int],
        start: DiscreteParameters,
        *,
        on_level: Callable[[int], None] | None = None,
        **options,
    ) -> dict[int, Minimizer]:
        """One branch over L: each level starts from I_1 of the nearest level solved before it.

        Args:
            levels: increasing L; those below start.layers are reached downwards by point samples of `start`.
            start: parameters on any level.
        """
        results: dict[int, Minimizer] = {}
        order = sorted((n for n in levels if n < start.layers), reverse=True)
        order = sorted(n for n in levels if n >= start.layers) + order
        for layers in order:
            below = [n for n in results if n < layers]
            nearest = start if layers <= start.layers or not below else results[max(below)].parameters
            results[layers] = self.minimize(layers, restarts=0, start=nearest, **options)
            if on_level is not None:
                on_level(layers)
        return dict(sorted(results.items()))


def problem_a(p: float = 4, first: str = "input", weight: float = 1e-3) -> LearningProblem:
    """Problem A: d = 1, four points, local tanh layers. All starts reach one minimiser at every L tried."""
    inputs = torch.tensor([[-1.0], [-0.3], [0.4], [1.0]], dtype=torch.float64)
    targets = torch.tensor([[0.5], [-0.4], [0.3], [-0.6]], dtype=torch.float64)
    return LearningProblem(inputs, targets, LayerMap.of("local"), weight=weight, p=p, first=first)


def problem_b(weight: float = 1e-2, p: float = 2, first: str = "input") -> LearningProblem:
    """Problem B: two positions of one channel, RBF layers with a learnable bandwidth curve h(t). Not convex."""
    points = [[-0.802, -1.324], [-0.248, 0.420], [1.136, 0.110], [-0.553, -0.785], [0.749, 1.635], [0.273, -1.233]]
    inputs = torch.tensor(points, dtype=torch.float64)
    products = torch.tanh(inputs[:, 0] * inputs[:, 1])
    targets = 0.7 * torch.stack([products, torch.cos(inputs.sum(1)) / 2], 1)
    return LearningProblem(inputs, targets, LayerMap.of("rbf", positions=2), weight=weight, p=p, first=first)


class GammaFunctional:
    """F_L(theta) = J_L(Theta) if theta = I_1 Theta for some Theta, else +inf (17); F(theta) = J(theta) or +inf (18).

    Args:
        problem: the learning problem.
        layers: L for F_L, or None for F.
        tolerance: by which theta may miss I_1 of its own samples, at three points per cell and direction, relative to
            its size. Membership is decided at those points: a function that differs elsewhere only is not seen.

    Source: DNL (17)-(18) (reconstructed).
    """

    def __init__(self, problem: LearningProblem, layers: int | None = None, tolerance: float = 1e-9):
        self.problem, self.layers, self.tolerance = problem, layers, tolerance
        if layers is not None:
            check_count("layers", layers)

    def __call__(self, curves: ParameterCurves) -> float:
        with torch.no_grad():
            if self.layers is None:
                value = self.problem.objective_continuous(curves).item()
                return value if math.isfinite(value) else math.inf
            samples = sample_pointwise(curves, self.layers)
            return (
                self.problem.objective(samples).item() if _is_extension(curves, samples, self.tolerance) else math.inf
            )


def _is_extension(curves: ParameterCurves, samples: DiscreteParameters, tolerance: float) -> bool:
    extension, layers = extend(samples), samples.layers
    inside = torch.tensor([0.25, 0.5, 0.875], dtype=torch.float64)
    t = ((torch.arange(layers, dtype=torch.float64)[:, None] + inside) / layers).reshape(-1)
    scale = tolerance * (1 + samples.norm())
    i, j = torch.tril_indices(t.numel(), t.numel())
    for name, own in extension.items():
        curve = getattr(curves, name)
        if curve is None:
            continue
        if name in TWO_INDEX:
            gap = curve.evaluate(t[i], t[j]) - own(t[i], t[j])
        else:
            gap = curve(t) - own(t)
        if gap.numel() and bool(gap.abs().max() > scale):
            return False
    return True
