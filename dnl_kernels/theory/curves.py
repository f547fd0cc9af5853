"""Parameter curves theta = (A, a, K, b, vartheta) on [0, 1] and on the triangle: the continuous model's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import as_samples, check_count, check_finite, check_grid, check_shape, check_tensor
from .depth import CallableKernel, DepthKernel, SampledKernel, locate_between
from .enclosure import NotEnclosed, node_suprema, suprema
from .grids import grid_times, working_dtype
from .structured import SeparableKernel

Curve = Callable[[Tensor], Tensor]
NAMES = ("A", "a", "K", "b", "vartheta")


class SampledCurve:
    """Piecewise linear interpolation of values on a grid of [0, 1].

    Args:
        times: [m] strictly increasing from 0 to 1.
        values: [m, ...], finite.
    """

    def __init__(self, times: Tensor, values: Tensor):
        check_grid("times", times)
        check_tensor("values", values)
        if values.shape[:1] != times.shape:
            raise ValueError(f"values must have {times.numel()} rows like times, got shape {list(values.shape)}")
        self.times, self.values = times, check_finite("values", values)

    def __call__(self, t: Tensor) -> Tensor:
        values = self.values.to(t.device, working_dtype(t.dtype))
        cell, lam = locate_between(self.times, t)
        lam = lam.reshape(*t.shape, *([1] * (values.ndim - 1)))
        return ((1 - lam) * values[cell] + lam * values[cell + 1]).to(t.dtype)


class BasisCurve:
    """u(t) = sum_m f_m(t) u_m for coefficients [M, ...]."""

    def __init__(self, basis: Curve, coefficients: Tensor):
        self.basis, self.coefficients = basis, check_tensor("coefficients", coefficients)

    def __call__(self, t: Tensor) -> Tensor:
        return torch.tensordot(self.basis(t), self.coefficients.to(t), 1)


class CosineBasis:
    """f_m(t) = cos(pi m t + phase_m), f_0 = 1: smooth, bounded by 1."""

    def __init__(self, phases: Tensor):
        self.phases = phases

    def __call__(self, t: Tensor) -> Tensor:
        modes = torch.arange(self.phases.numel(), dtype=t.dtype, device=t.device)
        return torch.cos(math.pi * modes * t[..., None] + self.phases.to(t) * (modes > 0))


def derivative(function: Curve, t: Tensor) -> Tensor:
    """d/dt of an elementwise curve at every t, by forward-mode automatic differentiation."""
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]


def kernel_derivatives(kernel: DepthKernel, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """d_t K and d_s K at the points (t, s) of the triangle."""
    return derivative(lambda z: kernel.evaluate(z, s), t), derivative(lambda z: kernel.evaluate(t, z), s)


@dataclass(frozen=True)
class ParameterCurves:
    """The parameters of the integral equation (7): A, a, vartheta on [0, 1]; K, b on 0 <= s <= t <= 1.

    A one-time curve is any function t [...] -> [..., shape] written in torch (so that dtype, device and gradients
    follow t), or an array of samples [m, shape] at i / (m - 1). K and b are DepthKernels, functions (t, s) -> values,
    or samples [m, m, shape] whose lower triangle is read. Arrays are tensors, or numpy arrays (taken as float64); for
    other grids, give a SampledCurve or SampledKernel. b and vartheta may be None (zero, and no parameters).

    Source: DNL (7)-(9). The symmetric extension of eq. (8) is `K(t, s)` with any order of arguments.

    Raises:
        ValueError: wrong shapes, sample grids that do not increase, or values that are not finite.
    """

    A: Curve
    a: Curve
    K: DepthKernel
    b: DepthKernel | None = None
    vartheta: Curve | None = None
    dim: int = 0

    def __post_init__(self) -> None:
        check_count("dim", self.dim)
        d = self.dim
        for name in NAMES:
            object.__setattr__(self, name, as_samples(getattr(self, name)))
        for name, samples in (("A", "m, d, d"), ("a", "m, d"), ("K", "m, m, d, d"), ("b", "m, m, d")):
            value = getattr(self, name)
            if isinstance(value, Tensor) and (value.ndim != samples.count(",") + 1 or value.shape[0] < 2):
                allowed = samples.replace("d", str(d))
                raise ValueError(f"{name} must hold samples [{allowed}] with m >= 2, got {list(value.shape)}")
        for name in ("A", "a", "vartheta"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                grid = grid_times(value.shape[0] - 1, device=value.device)
                object.__setattr__(self, name, SampledCurve(grid, value))
            elif value is not None and not callable(value):
                raise TypeError(f"{name} must be a function of t or an array of samples, got {type(value).__name__}")
        for name, shape in (("K", (d, d)), ("b", (d,))):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                grid = grid_times(value.shape[0] - 1, device=value.device)
                value = SampledKernel(grid, value)
            elif callable(value) and not isinstance(value, DepthKernel):
                value = CallableKernel(value, shape)
            elif value is not None and not isinstance(value, DepthKernel):
                raise TypeError(f"{name} must be a DepthKernel, a function of (t, s) or samples, got {type(value)}")
            object.__setattr__(self, name, value)
        if self.K is None:
            raise TypeError("K must be given; use a SeparableKernel with zero coefficients for K = 0")
        self._probe()

    def _probe(self) -> None:
        """Shapes and finiteness at a few points, so that a wrong curve fails here and not inside a solver."""
        t = torch.linspace(0, 1, 5, dtype=torch.float64)
        d = self.dim
        with torch.no_grad():
            check_finite("A", check_shape("A(t)", self.A(t), (5, d, d)))
            check_finite("a", check_shape("a(t)", self.a(t), (5, d)))
            smooth = getattr(self.K, "smooth", self.K)  # a weakly singular kernel has no value at (0, 0)
            check_finite("K", check_shape("K(t, s)", smooth.evaluate(t, t / 2), (5, d, d)))
            if self.b is not None:
                check_finite("b", check_shape("b(t, s)", self.b.evaluate(t, t / 2), (5, d)))
            if self.vartheta is not None:
                check_finite("vartheta", check_shape("vartheta(t)", self.vartheta(t), (5, None)))

    @classmethod
    def random_smooth(
        cls, dim: int, seed: int = 0, *, modes: int = 3, scale: float = 1.0, vartheta: int = 0
    ) -> ParameterCurves:
        """Smooth random curves in separable form: cosines with decaying Gaussian coefficients, float64.

        Args:
            dim: state size d.
            seed: of an own generator; the global one is untouched.
            modes: cosines per argument.
            scale: factor on A and K.
            vartheta: size of vartheta; 0 for none.
        """
        check_count("dim", dim)
        check_count("modes", modes)
        check_count("vartheta", vartheta, 0)
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        decay = 1 / (1 + torch.arange(modes, dtype=torch.float64)) ** 2
        both = decay[:, None] * decay
        basis = CosineBasis(math.pi * torch.rand(modes, generator=generator, dtype=torch.float64))
        size = scale / math.sqrt(dim)
        A = draw(modes, dim, dim) * decay[:, None, None] * size
        a = draw(modes, dim) * decay[:, None] / 2
        K = draw(modes, modes, dim, dim) * both[:, :, None, None] * size
        b = draw(modes, modes, dim) * both[:, :, None] / 2
        v = BasisCurve(basis, draw(modes, vartheta) * decay[:, None] * 0.3) if vartheta else None
        kernels = (SeparableKernel(basis, basis, K), SeparableKernel(basis, basis, b))
        return cls(BasisCurve(basis, A), BasisCurve(basis, a), *kernels, vartheta=v, dim=dim)

    def bounds(self, points: int | None = None) -> CurveBounds:
        """Upper bounds of the sup norms (9) and of the Lipschitz constants, for Propositions 3-4 and Corollary 5.

        Certified, up to rounding, by interval arithmetic with branch and bound (`enclosure`); exact for curves given by
        samples and for extensions. Within 0.1 % of the supremum where the curve allows it.

        Args:
            points: None, or a number of grid points to take maxima over them instead: `sup_norms` and
                `lipschitz_constants`, which are lower bounds and certify nothing.

        Raises:
            ValueError: a curve uses an operation that has no interval form (it is named); give points then, and know
                that a bump between them is not seen.
        """
        if points is not None:
            return CurveBounds(self.sup_norms(points), self.lipschitz_constants(points), False)
        sup, lipschitz = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
        for name in NAMES:
            curve = getattr(self, name)
            if curve is None:
                continue
            try:
                with torch.no_grad():
                    sup[name], lipschitz[name] = _certified(curve, name in ("A", "K"))
            except NotEnclosed as error:
                raise ValueError(
                    f"the curve {name} cannot be enclosed: {error}. Its bounds can only be sampled: give points"
                ) from error
        return CurveBounds(sup, lipschitz, True)

    def sup_norms(self, points: int = 129) -> dict[str, float]:
        """Sampled sup norms of eq. (9), maxima over a grid: spectral for A, K, Euclidean for a, b, vartheta.

        A maximum over a grid is a lower bound of the sup; for curves with slope bounded by M it is within
        M / (2 (points - 1)) of it. Certified upper bounds are those of `bounds`.
        """
        t, tt, ss = _grids(points)
        with torch.no_grad():
            return {
                "A": _matrix_sup(self.A(t)),
                "a": _vector_sup(self.a(t)),
                "K": _matrix_sup(self.K.evaluate(tt, ss)),
                "b": 0.0 if self.b is None else _vector_sup(self.b.evaluate(tt, ss)),
                "vartheta": 0.0 if self.vartheta is None else _vector_sup(self.vartheta(t)),
            }

    def norm(self, points: int = 129) -> float:
        """||theta|| of eq. (9): the largest of the sup norms."""
        return max(self.sup_norms(points).values())

    def lipschitz_constants(self, points: int = 129) -> dict[str, float]:
        """Sampled Lipschitz constants in t (for K, b: the larger of those in t and in s): maxima of |d/dt| over a grid.

        Lower bounds; certified upper ones are those of `bounds`.
        """
        t, tt, ss = _grids(points)

        def both(kernel: DepthKernel, sup: Callable[[Tensor], float]) -> float:
            return max(sup(slope) for slope in kernel_derivatives(kernel, tt, ss))

        return {
            "A": _matrix_sup(derivative(self.A, t)),
            "a": _vector_sup(derivative(self.a, t)),
            "K": both(self.K, _matrix_sup),
            "b": 0.0 if self.b is None else both(self.b, _vector_sup),
            "vartheta": 0.0 if self.vartheta is None else _vector_sup(derivative(self.vartheta, t)),
        }


@dataclass(frozen=True)
class CurveBounds:
    """Sup norms and Lipschitz constants by parameter name; upper bounds if `certified`, maxima over points if not."""

    sup: dict[str, float]
    lipschitz: dict[str, float]
    certified: bool


def samples_of(curve: object) -> tuple[Tensor, Tensor] | None:
    """(times [m], values) of a curve that is (bi)linear between samples: sampled curves and kernels, extensions."""
    curve = getattr(curve, "function", curve)
    values = getattr(curve, "values", None)
    if not isinstance(values, Tensor):
        return None
    if isinstance(times := getattr(curve, "times", None), Tensor):
        return times, values
    if getattr(curve, "linear", False):  # an extension, whose last value is copied to t = 1
        layers = values.shape[0]
        for axis in range(curve.arguments):  # type: ignore[attr-defined]
            values = torch.cat([values, values.narrow(axis, layers - 1, 1)], axis)
        return grid_times(layers, device=values.device), values
    return None


def _certified(curve: object, matrix: bool) -> tuple[float, float]:
    kernel = isinstance(curve, DepthKernel)
    if (samples := samples_of(curve)) is not None:
        times, values = samples
        return node_suprema(values, times, 1 + kernel, matrix)
    function = curve.evaluate if isinstance(curve, DepthKernel) else curve
    return suprema(function, 1 + kernel, matrix)  # type: ignore[arg-type]


def _grids(points: int) -> tuple[Tensor, Tensor, Tensor]:
    check_count("points", points, 2)
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    i, j = torch.tril_indices(points, points)
    return t, t[i], t[j]


def _matrix_sup(values: Tensor) -> float:
    return torch.linalg.matrix_norm(values, 2).max().item()


def _vector_sup(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dim=-1).max().item()
