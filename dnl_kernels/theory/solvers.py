"""The discrete recursion (1) and second-order quadratures of the integral equation (7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ._checks import check_choice, check_count, check_finite, check_tensor
from .curves import ParameterCurves
from .depth import History
from .grids import grid_times, locate, working_dtype
from .parameters import DiscreteParameters

SCHEMES = ("euler", "trapezoid", "trapezoid_implicit", "collocation")
CHUNK = 256  # grid points at which A(t) and K(t, t) are evaluated together
LayerFunction = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """States on the grid t_l = l / L with dense output by local polynomials.

    Args:
        times: [L + 1], 0 to 1.
        states: [L + 1, ..., d].
        degree: of the interpolating polynomials: 1 where the states are first-order accurate.
        first: what x^0 is, "input" or "lifted" (see `forward`).
    """

    times: Tensor
    states: Tensor
    degree: int = 1
    info: dict = field(default_factory=dict)
    first: str = "input"

    @property
    def layers(self) -> int:
        return self.times.numel() - 1

    @property
    def final(self) -> Tensor:
        """x(1), or x^L."""
        return self.states[-1]

    def __call__(self, t: Tensor | float) -> Tensor:
        """x(t) for t in [0, 1]: [*t.shape, ..., d]; exact at the grid points.

        Between them it is as accurate as polynomials through the states are, which is not what the states are. For a
        solution that is good everywhere see `solve_integral_equation`.
        """
        t = self._points(t)
        layers, degree = self.layers, min(self.degree, self.layers)
        cell, local = locate(t, layers)
        first = (cell - (degree - 1) // 2).clamp(0, layers - degree)
        position = local + (cell - first)
        out = torch.zeros_like(self.states[cell], dtype=working_dtype(self.states.dtype))
        for i in range(degree + 1):
            weight = torch.ones_like(position)
            for j in range(degree + 1):
                if j != i:
                    weight = weight * (position - j) / (i - j)
            out = out + weight.reshape(*t.shape, *([1] * (self.states.ndim - 1))) * self.states[first + i]
        return out.to(self.states.dtype)

    def _points(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=self.times.dtype, device=self.times.device)
        if bool(((t < 0) | (t > 1)).any()):
            raise ValueError("t must lie in [0, 1]")
        return t

    def distance(self, other: Trajectory, *, first: int = 1) -> float:
        """max over the common grid points l >= first of |x^l - y^l| (Euclidean in d, maximum over the batch)."""
        small, large = sorted((self, other), key=lambda z: z.layers)
        if large.layers % small.layers:
            raise ValueError(f"grids must be nested, got L = {small.layers} and L = {large.layers}")
        gap = small.states - large.states[:: large.layers // small.layers]
        sizes = torch.linalg.vector_norm(gap[first:], dim=-1)
        return sizes.max().item() if sizes.numel() else 0.0


class _CurveSource:
    """What a scheme reads at grid index i, from curves; evaluated for CHUNK grid points at a time."""

    def __init__(self, curves: ParameterCurves, layers: int, x: Tensor):
        self.curves, self.x, self.layers = curves, x, layers
        self.times = grid_times(layers, dtype=x.dtype, device=x.device)
        # Cut into layers once: the backward pass of one index per layer would touch the whole tensor every time.
        self.bias = None if curves.b is None else curves.b.row_sums(self.times).unbind()
        self.vartheta = None
        if curves.vartheta is not None:
            vartheta = curves.vartheta(self.times)
            check_finite("the curve vartheta", vartheta.detach())
            self.vartheta = vartheta.unbind()
        self.chunks: dict[str, tuple[int, tuple[Tensor, ...]]] = {}

    def history(self) -> History:
        return self.curves.K.history(self.times)

    def _chunked(self, name: str, i: int, evaluate: Callable[[Tensor], Tensor]) -> Tensor:
        first = i - i % CHUNK
        if name not in self.chunks or self.chunks[name][0] != first:
            self.chunks[name] = (first, evaluate(self.times[first : first + CHUNK]).unbind())
        return self.chunks[name][1][i - first]

    def forcing(self, i: int) -> Tensor:
        def evaluate(t: Tensor) -> Tensor:
            return torch.einsum("lab,nb->lna", self.curves.A(t), self.x) + self.curves.a(t)[:, None]

        return self._chunked("forcing", i, evaluate)

    def bias_sum(self, i: int) -> Tensor | float:
        return 0.0 if self.bias is None else self.bias[i]

    def bias_trapezoid(self, i: int) -> Tensor | float:
        """bias_sum with half weights at s = 0 and s = t."""
        b = self.curves.b
        if b is None:
            return 0.0
        ends = self._chunked("ends", i, lambda t: (b.evaluate(t, torch.zeros_like(t)) + b.evaluate(t, t)) / 2)
        return self.bias_sum(i) - ends

    def diagonal(self, i: int) -> Tensor:
        return self._chunked("diagonal", i, lambda t: self.curves.K.evaluate(t, t))

    def parameters_at(self, i: int) -> Tensor | None:
        return None if self.vartheta is None else self.vartheta[i]

    def check_finite(self) -> None:
        """Name the curve that is to blame; asked only once a state is not finite."""
        with torch.no_grad():
            for name in ("A", "a", "vartheta"):
                if (curve := getattr(self.curves, name)) is not None:
                    check_finite(f"the curve {name}", curve(self.times))
            for i, t in enumerate(self.times):
                for name in ("K", "b"):
                    if (kernel := getattr(self.curves, name)) is not None:
                        check_finite(f"the curve {name}", kernel.evaluate(t.expand(i + 1), self.times[: i + 1]))


class _ParameterSource:
    """The same from stored parameters, which exist at the L left endpoints only."""

    def __init__(self, parameters: DiscreteParameters, x: Tensor):
        self.parameters, self.layers = parameters, parameters.layers
        # Cut into layers once, see _CurveSource.
        self.forcings = (torch.einsum("lab,nb->lna", parameters.A, x) + parameters.a[:, None]).unbind()
        self.biases = [row.sum(0) for row in parameters.rows("b")]
        self.vartheta = parameters.vartheta.unbind() if parameters.vartheta.shape[1] else None

    def history(self) -> History:
        return self.parameters.history()

    def forcing(self, i: int) -> Tensor:
        return self.forcings[i]

    def bias_sum(self, i: int) -> Tensor:
        return self.biases[i]

    def parameters_at(self, i: int) -> Tensor | None:
        return None if self.vartheta is None else self.vartheta[i]

    def check_finite(self) -> None:
        for name, value in self.parameters.items():
            check_finite(name, value.detach())


def forward(
    parameters: DiscreteParameters | ParameterCurves,
    x: Tensor,
    phi: LayerFunction,
    *,
    layers: int | None = None,
    scheme: str = "euler",
    first: str | None = None,
    tolerance: float | None = None,
    max_iterations: int = 100,
) -> Trajectory:
    """The states of an L-layer network.

    euler, eq. (1):  y^l = A^l x + a^l + tau sum_{j=0}^{l} (K^{l,j} x^j + b^{l,j}),  x^{l+1} = phi(y^l, vartheta^l).

    trapezoid (ours): y_{l+1} = A(t_{l+1}) x + a(t_{l+1}) + tau [g_0 / 2 + g_1 + .. + g_l + g_end / 2] with
    g_j = K(t_{l+1}, t_j) x_j + b(t_{l+1}, t_j) and x_{l+1} = phi(y_{l+1}, vartheta(t_{l+1})). g_end uses the state x_l
    ("trapezoid", explicit: an error tau/2 O(tau) that does not accumulate) or x_{l+1} ("trapezoid_implicit", fixed
    point). Second order needs the shift to t_{l+1}, the end weights and the lifted start together.

    collocation (order 4 at the grid points): on each layer x is the straight line through its values at two Gauss
    points, at which the equation holds; x(t_l) is what the equation then says. O(L^2) for every kernel.

    Args:
        parameters: Theta, or curves with `layers`; structured depth kernels keep their O(L) or O(L log^2 L) cost.
        x: inputs [..., d], of any batch, an empty one too; their dtype and device are those of the computation, except
            that half precision is computed in float32 and rounded once.
        phi: the layer map (y [B, d], vartheta [v] or None) -> [B, d], e.g. `LayerMap`.
        layers: L >= 1, for curves only.
        scheme: "euler", "trapezoid", "trapezoid_implicit" or "collocation"; all but the first need curves.
        first: "input" x^0 = x (the default of "euler"); "lifted" x^0 = phi(A(0) x + a(0), vartheta(0)) = x(0) (the
            default of the others).
        tolerance, max_iterations: of the implicit fixed point, relative; the default is a few roundings.

    Returns:
        A Trajectory with states [L + 1, ..., d], differentiable in x and in the parameters.

    Raises:
        ValueError: wrong shapes or names, L < 1, or a state that is not finite; the curve that caused it is named.
        RuntimeError: the fixed point does not contract (tau / 2 Lip(phi) ||K|| >= 1): more layers are needed.

    Source: DNL (1) (reconstructed); trapezoid: section 11 of the specification, beyond the paper.
    """
    check_tensor("x", x)
    check_choice("scheme", scheme, SCHEMES)
    first = check_choice("first", first or ("input" if scheme == "euler" else "lifted"), ("input", "lifted"))
    dim = parameters.dim
    if x.ndim < 1 or x.shape[-1] != dim:
        raise ValueError(f"x must have shape [..., {dim}], got {list(x.shape)}")
    work = working_dtype(x.dtype)
    flat = flatten_batch(x, dim).to(work)
    if isinstance(parameters, DiscreteParameters):
        if scheme != "euler":
            raise ValueError(f"scheme {scheme!r} needs curves: Theta has no values at t_L = 1; use Theta's extension")
        if layers not in (None, parameters.layers):
            raise ValueError(f"layers must be {parameters.layers} like the parameters, or None, got {layers}")
        source: _ParameterSource | _CurveSource = _ParameterSource(parameters.map(lambda value: value.to(work)), flat)
    else:
        if layers is None:
            raise ValueError("layers must be given with curves")
        source = _CurveSource(parameters, check_count("layers", layers), flat)
    start = phi(source.forcing(0), source.parameters_at(0)) if first == "lifted" else flat
    if scheme == "collocation":
        from .integral import collocate

        if first == "input":
            raise ValueError("first must be 'lifted' with scheme 'collocation', whose states solve the equation")
        states, guard = collocate(parameters, flat, phi, layers), _nothing_seen(flat)  # type: ignore[arg-type]
    elif isinstance(source, _ParameterSource) or scheme == "euler":
        states, guard = _euler(source, start, phi)
    else:
        tolerance = 4 * torch.finfo(work).eps if tolerance is None else tolerance
        states, guard = _trapezoid(source, start, phi, scheme == "trapezoid_implicit", tolerance, max_iterations)
    stacked = torch.stack(states)
    # A bounded activation hides an infinite pre-activation: `guard`, whether all were finite, does not.
    if not bool(guard & torch.isfinite(stacked.detach()).all()):
        source.check_finite()
        check_finite("states", stacked.detach())
    times = grid_times(source.layers, dtype=x.dtype, device=x.device)
    states_of_x = stacked.reshape(source.layers + 1, *x.shape).to(x.dtype)
    return Trajectory(times, states_of_x, 1 if scheme == "euler" else 3, first=first)


def flatten_batch(x: Tensor, dim: int) -> Tensor:
    """[..., d] as [B, d]; B may be 0, whose size reshape cannot infer."""
    return x.reshape(math.prod(x.shape[:-1]), dim)


def _euler(source: _CurveSource | _ParameterSource, x: Tensor, phi: LayerFunction) -> tuple[list[Tensor], Tensor]:
    history, tau, states, guard = source.history(), 1 / source.layers, [x], _nothing_seen(x)
    for i in range(source.layers):
        history.push(x)
        y = source.forcing(i) + tau * (history.total(i) + source.bias_sum(i))
        guard = guard & torch.isfinite(y.detach()).all()
        x = phi(y, source.parameters_at(i))
        states.append(x)
    return states, guard


def _trapezoid(
    source: _CurveSource, x: Tensor, phi: LayerFunction, implicit: bool, tolerance: float, max_iterations: int
) -> tuple[list[Tensor], Tensor]:
    history, tau, states, guard = source.history(), 1 / source.layers, [x], _nothing_seen(x)
    history.push(x / 2)
    for i in range(1, source.layers + 1):
        base = source.forcing(i) + tau * (history.total(i) + source.bias_trapezoid(i))
        end, vartheta = tau / 2 * source.diagonal(i).transpose(0, 1), source.parameters_at(i)
        guard = guard & torch.isfinite(base.detach()).all() & torch.isfinite(end.detach()).all()
        if implicit:
            guess = 2 * x - states[-2] if len(states) > 1 else x
            step = partial(_implicit_step, phi, base, end, vartheta)
            try:
                x = _fixed_point(step, guess, tolerance, max_iterations)
            except RuntimeError:
                source.check_finite()
                raise
        else:
            x = phi(base + x @ end, vartheta)
        states.append(x)
        history.push(x)
    return states, guard


def _nothing_seen(x: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=x.device)


def _implicit_step(phi: LayerFunction, base: Tensor, end: Tensor, vartheta: Tensor | None, x: Tensor) -> Tensor:
    return phi(base + x @ end, vartheta)


def _fixed_point(step: Callable[[Tensor], Tensor], x: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    for _ in range(max_iterations):
        new = step(x)
        change = (new - x).detach().abs().max() if new.numel() else new.new_zeros(())
        x = new
        if bool(change <= tolerance * (1 + x.detach().abs().max() if x.numel() else 1)):
            return x
    raise RuntimeError(
        f"the implicit end value did not converge in {max_iterations} iterations (last change {change.item():.1e}): "
        "tau / 2 * Lip(phi) * ||K|| must be < 1, use more layers"
    )
