"""The integral equation (7) by collocation on adaptive panels: values that are good everywhere on [0, 1]."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._checks import check_count, check_finite, check_tensor
from .curves import ParameterCurves
from .depth import BLOCK, DepthKernel, WeaklySingularKernel
from .grids import grid_times, working_dtype
from .quadrature import gauss_jacobi, gauss_legendre
from .solvers import LayerFunction, Trajectory, flatten_batch

ORDER = 12  # Gauss points per panel: x is a polynomial of degree ORDER - 1 there, order 2 ORDER at the panels' ends
PANELS = 4  # to begin with
ITERATIONS = 60  # of the fixed point on one panel; it contracts like (h Lip(phi) ||K||)^k / k!


@dataclass(frozen=True)
class Solution(Trajectory):
    """x(t) as a polynomial on each panel: called with t it is good to `info["error"]` everywhere, not on a grid only.

    Args:
        edges: [M + 1], the ends of the panels, 0 to 1.
        coefficients: [M, ORDER, ..., d], Legendre coefficients on each panel.
    """

    edges: Tensor = field(default_factory=lambda: torch.zeros(0))
    coefficients: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __call__(self, t: Tensor | float) -> Tensor:
        """x(t) for t in [0, 1]: [*t.shape, ..., d], differentiable in t."""
        t = self._points(t)
        return _evaluate(self.edges, self.coefficients, t).to(self.states.dtype)


def solve_integral_equation(
    curves: ParameterCurves,
    x: Tensor,
    phi: LayerFunction,
    *,
    rtol: float = 1e-10,
    atol: float = 0.0,
    layers: int = 64,
    panels: int = PANELS,
    max_points: int = 2048,
) -> Solution:
    """x(t) = phi(y(t), vartheta(t)),  y(t) = A(t) x + a(t) + int_0^t (K(t, s) x(s) + b(t, s)) ds, on all of [0, 1].

    Collocation: on each panel x is the polynomial through its values at 12 Gauss points, at which the equation holds.
    The integral over earlier panels is their Gauss rule; that over [panel start, t] a Gauss rule of its own, so that K
    is read for s <= t only. A panel's values are the fixed point of the equation, which contracts on short panels.

    Panels whose last Legendre coefficients exceed the tolerance are halved. Then everything is solved again with every
    panel halved: the largest difference of the two solutions, at points of both and between them, is the error
    estimate, and the finer one is returned. If it exceeds the tolerance, the finer one is refined further.

    Args:
        curves, x, phi: as in `forward`.
        rtol, atol: wanted accuracy everywhere on [0, 1]: atol + rtol times the largest |x(t)| found.
        layers: the grid l / L of the result's `states`; it has nothing to do with the accuracy.
        panels: to begin with. Points are all that is seen of a curve, at first 2 * 12 * panels of them: raise it for
            features of the data that are narrower than the distance of those, which would be missed.
        max_points: collocation points allowed; beyond it the result is not converged.

    Returns:
        A Solution, differentiable in x and in the curves' parameters; `info` holds "error" (the estimate, relative to
        the largest |x(t)|, for all t), "panel_errors" (the same by panel), "converged", "panels" and "points". ReLU's
        kinks are isolated by halving, which takes many panels: if more than max_points are needed, "converged" is
        False, with a warning. With a WeaklySingularKernel the panels shrink towards 0 from the start.

    Source: DNL (7) (reconstructed); collocation for Volterra equations: Brunner (2004).
    """
    if not rtol >= 0 or not atol >= 0 or not rtol + atol > 0:
        raise ValueError(f"rtol must be > 0 (or atol, and neither negative), got rtol = {rtol}, atol = {atol}")
    check_tensor("x", x)
    check_count("layers", layers)
    check_count("panels", panels)
    check_count("max_points", max_points, 2 * panels * ORDER)
    if x.ndim < 1 or x.shape[-1] != curves.dim:
        raise ValueError(f"x must have shape [..., {curves.dim}], got {list(x.shape)}")
    problem = _Problem(curves, flatten_batch(x, curves.dim).to(working_dtype(x.dtype)), phi)
    found = problem.march(_known_edges(curves, panels, max_points, rtol + atol))
    floor = 8 * torch.finfo(problem.x.dtype).eps
    error, errors = math.inf, [math.inf]
    while True:
        scale = _scale(found)
        goal = max(atol + rtol * scale, floor * scale)
        splits = [panel for panel in found if panel.width > 1e-13 * panel.right]
        rough = [panel for panel in splits if panel.tail > goal or not panel.settled]
        if rough and (len(found) + len(rough)) * 2 * ORDER <= max_points:
            found = problem.march(_halve(found, rough), found)
            continue
        if len(found) * 2 * ORDER > max_points:
            break
        fine = problem.march(_halve(found, found))
        errors = _differences(found, fine)
        error = max(errors)
        found = fine
        if error <= atol + rtol * scale and all(panel.settled for panel in fine):
            break
    scale = _scale(found)
    if not all(panel.settled for panel in found):
        error = math.inf
    converged = error <= atol + rtol * scale
    relative = error / scale if scale else error
    if not converged:
        warnings.warn(
            f"solve_integral_equation: error estimate {relative:.1e} > rtol {rtol:.1e} (relative) with "
            f"{len(found) * ORDER} of at most {max_points} points",
            stacklevel=2,
        )
    local = [e / scale if scale else e for e in errors]
    info = {
        "error": relative,
        "panel_errors": local,
        "converged": converged,
        "panels": len(found),
        "points": len(found) * ORDER,
    }
    edges, coefficients = _edges(found), torch.stack([panel.coefficients for panel in found])
    coefficients = coefficients.reshape(*coefficients.shape[:2], *x.shape)
    times = grid_times(layers, dtype=x.dtype, device=x.device)
    states = _evaluate(edges, coefficients, times).to(x.dtype)
    return Solution(times, states, ORDER - 1, info, "lifted", edges, coefficients)


@dataclass
class _Panel:
    """x on [left, right]: values at the Gauss points [ORDER, B, d], Legendre coefficients of the same shape."""

    left: float
    right: float
    values: Tensor
    coefficients: Tensor
    settled: bool  # the fixed point was reached

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def tail(self) -> float:
        """How far the polynomial is from resolving x: the size of its last two coefficients."""
        return _size(self.coefficients[-2:])


class _Problem:
    """The equation on one panel after another."""

    def __init__(self, curves: ParameterCurves, x: Tensor, phi: LayerFunction, order: int = ORDER):
        self.curves, self.x, self.phi, self.order = curves, x, phi, order
        self.alpha = curves.K.alpha if isinstance(curves.K, WeaklySingularKernel) else 0.0
        self.nodes, self.weights = gauss_legendre(order, dtype=x.dtype, device=x.device)
        degrees = torch.arange(order, dtype=x.dtype, device=x.device)
        self.analysis = (2 * degrees + 1)[:, None] * (_legendre(self.nodes, order) * self.weights[:, None]).T
        # For the integral from the panel's start to node i: a Gauss rule there, for the weight (1 - v)^-alpha where K
        # is singular, and x interpolated to its points.
        v, self.inner_weights = gauss_jacobi(order, self.alpha, dtype=x.dtype, device=x.device)
        self.inner = self.nodes[:, None] * v  # [i, q]
        self.interpolation = self._interpolation(self.inner)  # [i, q, k]
        self.bias_inner = self.nodes[:, None] * self.nodes

    def _interpolation(self, u: Tensor) -> Tensor:
        """From the values at a panel's nodes to those at u in [0, 1]: [*u.shape, order]."""
        return (_legendre(u.reshape(-1), self.order) @ self.analysis).reshape(*u.shape, self.order)

    def march(self, edges: list[float], known: list[_Panel] | None = None) -> list[_Panel]:
        """Solve panel by panel; the first panels of `known` are kept as long as they are the same."""
        panels: list[_Panel] = []
        known = known or []
        for index, (left, right) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            same = index == len(panels) < len(known) and (known[index].left, known[index].right) == (left, right)
            if same and all(a is b for a, b in zip(panels, known, strict=False)):
                panels.append(known[index])
            else:
                panels.append(self.solve(left, right, panels))
        return panels

    def solve(self, left: float, right: float, past: list[_Panel]) -> _Panel:
        width = right - left
        t = left + width * self.nodes
        base = torch.einsum("iab,nb->ina", self._curve("A", t), self.x) + self._curve("a", t)[:, None]
        if past:
            base = base + self.history(t, past)
        inside = left + width * self.inner  # [i, q]
        reach = width * self.nodes[:, None]
        points = t[:, None].expand_as(inside)
        kernel = self._kernel(self.smooth, "K", points, inside)
        rule = reach ** (1 - self.alpha) * self.inner_weights  # [i, q]
        mixed = torch.einsum("iq,iqk,iqab->ikab", rule, self.interpolation, kernel)
        if self.curves.b is not None:
            inside = left + width * self.bias_inner
            bias = self._kernel(self.curves.b, "b", t[:, None].expand_as(inside), inside)
            base = base + torch.einsum("iq,iqa->ia", reach * self.weights, bias)[:, None]
        vartheta = None if self.curves.vartheta is None else self._curve("vartheta", t).unbind()
        values, settled = self._fixed_point(base, mixed, vartheta, past)
        coefficients = torch.einsum("ki,ina->kna", self.analysis, values)
        return _Panel(left, right, values, coefficients, settled)

    @property
    def smooth(self) -> DepthKernel:
        """K without its singular factor."""
        return self.curves.K.smooth if isinstance(self.curves.K, WeaklySingularKernel) else self.curves.K

    def at(self, edge: float, past: list[_Panel]) -> Tensor:
        """x at the end of the last panel, from the equation: [B, d]."""
        t = self.x.new_tensor([edge])
        y = torch.einsum("iab,nb->ina", self._curve("A", t), self.x) + self._curve("a", t)[:, None]
        if past:
            y = y + self.history(t, past)
        return self.layer(y, None if self.curves.vartheta is None else self._curve("vartheta", t).unbind())[0]

    def history(self, t: Tensor, past: list[_Panel]) -> Tensor | float:
        """int over the earlier panels of K(t, s) x(s) + b(t, s), for t [i] at or behind their end."""
        s = torch.cat([panel.left + panel.width * self.nodes for panel in past])
        w = torch.cat([panel.width * self.weights for panel in past])
        bias = self._integral("b", t, s, w, None)
        if not self.alpha:
            return bias + self._integral("K", t, s, w, torch.cat([panel.values for panel in past]))
        rules = [self._near(panel, (t.min().item() - panel.right) / panel.width) for panel in past]
        s, w, states = (torch.cat(parts) for parts in zip(*rules, strict=True))
        return bias + self._integral("K", t, s, w, states)

    def _near(self, panel: _Panel, distance: float) -> tuple[Tensor, Tensor, Tensor]:
        """Points, weights and states on a panel whose end is that near to t, in panel widths.

        (t - s)^-alpha is analytic on the panel, but only Gauss rules on pieces that shrink towards t, down to the
        distance, are as accurate for it as one is for a distant t.
        """
        if distance >= 1:
            return panel.left + panel.width * self.nodes, panel.width * self.weights, panel.values
        pieces = min(60, math.ceil(-math.log2(max(distance, 1e-18))) + 1)
        gaps = 0.5 ** torch.arange(pieces + 1, dtype=self.nodes.dtype, device=self.nodes.device)
        gaps = torch.cat([gaps, gaps.new_zeros(1)])  # distances of the pieces' ends from the panel's
        sizes = gaps[:-1] - gaps[1:]
        gap = (gaps[:-1, None] - sizes[:, None] * self.nodes).reshape(-1)
        weights = (panel.width * sizes[:, None] * self.weights).reshape(-1)
        states = torch.einsum("qk,knb->qnb", self._interpolation(1 - gap), panel.values)
        return panel.right - panel.width * gap, weights, states

    def _fixed_point(
        self, base: Tensor, mixed: Tensor, vartheta: tuple[Tensor, ...] | None, past: list[_Panel]
    ) -> tuple[Tensor, bool]:
        values = past[-1].values[-1:].expand_as(base) if past else self.layer(base, vartheta)
        slack = 2 * torch.finfo(base.dtype).eps
        previous = math.inf
        # With the weight (t - s)^-alpha its k-th power is about 1 / Gamma(k (1 - alpha)).
        for _ in range(round(ITERATIONS / (1 - self.alpha) ** 2)):
            new = self.layer(base + torch.einsum("ikab,knb->ina", mixed, values), vartheta)
            change, size = _size(new - values), _size(new)
            values = new
            if not math.isfinite(change):
                check_finite("states", values.detach())
            # At the level of rounding the change no longer falls: that is as far as it goes.
            if change <= slack * size or (change <= 64 * slack * size and change >= previous):
                return values, True
            previous = change
        return values, False

    def layer(self, y: Tensor, vartheta: tuple[Tensor, ...] | None) -> Tensor:
        if vartheta is None:
            return self.phi(y.flatten(0, 1), None).reshape(y.shape)
        return torch.stack([self.phi(row, v) for row, v in zip(y, vartheta, strict=True)])

    def _curve(self, name: str, t: Tensor) -> Tensor:
        values = getattr(self.curves, name)(t)
        check_finite(f"the curve {name}", values.detach())
        return values

    def _kernel(self, kernel: DepthKernel, name: str, t: Tensor, s: Tensor) -> Tensor:
        values = kernel.evaluate(t, s)
        check_finite(f"the curve {name}", values.detach())
        return values

    def _integral(self, name: str, t: Tensor, s: Tensor, w: Tensor, states: Tensor | None) -> Tensor | float:
        """sum_j w_j K(t_i, s_j) x_j, or without states sum_j w_j b(t_i, s_j) with a batch axis."""
        kernel: DepthKernel | None = getattr(self.curves, name)
        if kernel is None:
            return 0.0
        chunk = max(1, BLOCK // (t.numel() * math.prod(kernel.value_shape)))
        total: Tensor | float = 0.0
        for first in range(0, s.numel(), chunk):
            part = slice(first, first + chunk)
            values = self._kernel(kernel, name, t[:, None], s[None, part])
            if states is None:
                total = total + torch.einsum("ija,j->ia", values, w[part])[:, None]
            else:
                total = total + torch.einsum("ijab,jnb->ina", values, w[part][:, None, None] * states[part])
        return total


def collocate(curves: ParameterCurves, x: Tensor, phi: LayerFunction, layers: int) -> list[Tensor]:
    """The states at l / L by collocation at two Gauss points per layer: of order 4 at the grid points.

    At the points inside x is a straight line per layer (order 2); at a grid point it is what the equation says.
    """
    problem = _Problem(curves, x, phi, order=2)
    edges = torch.arange(layers + 1, dtype=torch.float64).div(layers).tolist()
    panels: list[_Panel] = []
    states = []
    for index, edge in enumerate(edges):
        if index:
            panel = problem.solve(edges[index - 1], edge, panels)
            if not panel.settled:
                raise RuntimeError(
                    f"the values of layer {index - 1} did not converge in {ITERATIONS} iterations: "
                    "tau * Lip(phi) * ||K|| is too large, use more layers"
                )
            panels.append(panel)
        states.append(problem.at(edge, panels))
    return states


def _legendre(u: Tensor, order: int) -> Tensor:
    """P_0 .. P_{order - 1} of 2 u - 1 for u [m] in [0, 1]: [m, order]."""
    z = 2 * u - 1
    columns = [torch.ones_like(z), z][:order]
    for k in range(1, order - 1):
        columns.append(((2 * k + 1) * z * columns[k] - k * columns[k - 1]) / (k + 1))
    return torch.stack(columns, -1)


def _evaluate(edges: Tensor, coefficients: Tensor, t: Tensor) -> Tensor:
    """The piecewise polynomial at t [...]: [*t.shape, *coefficients.shape[2:]]."""
    wide = t.double()
    panel = (torch.searchsorted(edges, wide.detach().contiguous(), right=True) - 1).clamp(0, edges.numel() - 2)
    local = ((wide - edges[panel]) / (edges[panel + 1] - edges[panel])).to(coefficients.dtype)
    order = coefficients.shape[1]
    basis = _legendre(local.reshape(-1), order)
    trailing = coefficients.shape[2:]
    flat = coefficients[panel.reshape(-1)].reshape(t.numel(), order, math.prod(trailing))
    return torch.einsum("mk,mkz->mz", basis, flat).reshape(*t.shape, *trailing)


def _edges(panels: list[_Panel]) -> Tensor:
    device = panels[0].values.device
    return torch.tensor([panel.left for panel in panels] + [panels[-1].right], dtype=torch.float64, device=device)


def _halve(panels: list[_Panel], which: list[_Panel]) -> list[float]:
    chosen = {id(panel) for panel in which}
    edges = []
    for panel in panels:
        edges.append(panel.left)
        if id(panel) in chosen:
            edges.append((panel.left + panel.right) / 2)
    return [*edges, panels[-1].right]


def _size(values: Tensor) -> float:
    """The largest Euclidean norm over everything but d; 0 for an empty batch."""
    sizes = torch.linalg.vector_norm(values.detach(), dim=-1)
    return sizes.max().item() if sizes.numel() else 0.0


def _scale(panels: list[_Panel]) -> float:
    return max(_size(panel.values) for panel in panels)


def _differences(coarse: list[_Panel], fine: list[_Panel]) -> list[float]:
    """max |x_coarse - x_fine| on each fine panel: at its Gauss points, between them and at both ends."""
    edges = _edges(fine)
    width = edges[1:] - edges[:-1]
    inside = torch.cat([gauss_legendre(ORDER)[0], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)])
    t = (edges[:-1, None] + width[:, None] * inside.to(edges.device)).reshape(-1)
    with torch.no_grad():
        pair = [
            _evaluate(_edges(panels), torch.stack([panel.coefficients for panel in panels]), t)
            for panels in (coarse, fine)
        ]
        sizes = torch.linalg.vector_norm(pair[0] - pair[1], dim=-1).reshape(len(fine), -1)
    return sizes.max(1).values.tolist() if sizes.numel() else [0.0] * len(fine)


def _known_edges(curves: ParameterCurves, panels: int, max_points: int, goal: float) -> list[float]:
    """The panels to begin with: their ends include the nodes of curves given by samples, if those are few enough.

    Where K is singular, x is a function of t^(1 - alpha): the panels shrink towards 0 by factors of 4 until that is
    below the goal.
    """
    found = {index / panels for index in range(panels + 1)}
    if isinstance(curves.K, WeaklySingularKernel) and curves.K.alpha > 0:
        levels = math.ceil(math.log(max(goal, 1e-16)) / ((1 - curves.K.alpha) * math.log(0.25)))
        levels = min(levels, max_points // (4 * ORDER))
        found.update(0.25**level / panels for level in range(levels))
    for name in ("A", "a", "K", "b", "vartheta"):
        curve = getattr(curves, name)
        curve = getattr(curve, "function", curve)
        if hasattr(curve, "times"):
            found.update(curve.times.double().tolist())
        elif isinstance(getattr(curve, "layers", None), int):
            found.update(index / curve.layers for index in range(curve.layers + 1))
    edges = sorted(found)
    # Nodes that differ by rounding only are one node.
    pairs = zip(edges[:-1], edges[1:], strict=True)
    kept = [edges[0], *(right for left, right in pairs if right - left > 1e-12 * right)]
    if 2 * ORDER * (len(kept) - 1) > max_points:
        return [index / panels for index in range(panels + 1)]
    return kept
