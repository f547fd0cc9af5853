"""The integral equation (7) by collocation on adaptive panels: values that are good everywhere on [0, 1]."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._checks import check_count, check_finite, check_tensor
from .curves import ParameterCurves
from .depth import BLOCK, DepthKernel
from .grids import grid_times, working_dtype
from .quadrature import gauss_legendre
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
        the largest |x(t)|, for all t), "converged", "panels" and "points". ReLU's kinks are isolated by halving, which
        takes many panels: if more than max_points are needed, "converged" is False, with a warning.

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
    found = problem.march(_known_edges(curves, panels, max_points))
    floor = 8 * torch.finfo(problem.x.dtype).eps
    error = math.inf
    while True:
        scale = _scale(found)
        goal = max(atol + rtol * scale, floor * scale)
        rough = [panel for panel in found if panel.width > 1e-13 and (panel.tail > goal or not panel.settled)]
        if rough and (len(found) + len(rough)) * 2 * ORDER <= max_points:
            found = problem.march(_halve(found, rough), found)
            continue
        if len(found) * 2 * ORDER > max_points:
            break
        fine = problem.march(_halve(found, found))
        error = _difference(found, fine)
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
    info = {"error": relative, "converged": converged, "panels": len(found), "points": len(found) * ORDER}
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

    def __init__(self, curves: ParameterCurves, x: Tensor, phi: LayerFunction):
        self.curves, self.x, self.phi = curves, x, phi
        self.nodes, self.weights = gauss_legendre(ORDER, dtype=x.dtype, device=x.device)
        degrees = torch.arange(ORDER, dtype=x.dtype, device=x.device)
        self.analysis = (2 * degrees + 1)[:, None] * (_legendre(self.nodes) * self.weights[:, None]).T
        # For the integral from the panel's start to node i: a Gauss rule there, and x interpolated to its points.
        inner = self.nodes[:, None] * self.nodes  # [i, q]
        self.inner = inner
        self.interpolation = _legendre(inner.reshape(-1)).reshape(ORDER, ORDER, ORDER) @ self.analysis  # [i, q, k]

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
            s = torch.cat([panel.left + panel.width * self.nodes for panel in past])
            w = torch.cat([panel.width * self.weights for panel in past])
            states = torch.cat([panel.values for panel in past])
            base = base + self._integral("K", t, s, w, states)
            base = base + self._integral("b", t, s, w, None)
        inside = left + width * self.inner  # [i, q]
        rule = width * self.nodes[:, None] * self.weights  # [i, q]
        points = t[:, None].expand(ORDER, ORDER)
        kernel = self._kernel(self.curves.K, "K", points, inside)
        mixed = torch.einsum("iq,iqk,iqab->ikab", rule, self.interpolation, kernel)
        if self.curves.b is not None:
            bias = self._kernel(self.curves.b, "b", points, inside)
            base = base + torch.einsum("iq,iqa->ia", rule, bias)[:, None]
        vartheta = None if self.curves.vartheta is None else self._curve("vartheta", t).unbind()
        values, settled = self._fixed_point(base, mixed, vartheta, past)
        coefficients = torch.einsum("ki,ina->kna", self.analysis, values)
        return _Panel(left, right, values, coefficients, settled)

    def _fixed_point(
        self, base: Tensor, mixed: Tensor, vartheta: tuple[Tensor, ...] | None, past: list[_Panel]
    ) -> tuple[Tensor, bool]:
        values = past[-1].values[-1:].expand_as(base) if past else self.layer(base, vartheta)
        slack = 2 * torch.finfo(base.dtype).eps
        previous = math.inf
        for _ in range(ITERATIONS):
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
        kernel = getattr(self.curves, name)
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


def _legendre(u: Tensor) -> Tensor:
    """P_0 .. P_{ORDER - 1} of 2 u - 1 for u [m] in [0, 1]: [m, ORDER]."""
    z = 2 * u - 1
    columns = [torch.ones_like(z), z]
    for k in range(1, ORDER - 1):
        columns.append(((2 * k + 1) * z * columns[k] - k * columns[k - 1]) / (k + 1))
    return torch.stack(columns, -1)


def _evaluate(edges: Tensor, coefficients: Tensor, t: Tensor) -> Tensor:
    """The piecewise polynomial at t [...]: [*t.shape, *coefficients.shape[2:]]."""
    wide = t.double()
    panel = (torch.searchsorted(edges, wide.detach().contiguous(), right=True) - 1).clamp(0, edges.numel() - 2)
    local = ((wide - edges[panel]) / (edges[panel + 1] - edges[panel])).to(coefficients.dtype)
    basis = _legendre(local.reshape(-1))
    trailing = coefficients.shape[2:]
    flat = coefficients[panel.reshape(-1)].reshape(t.numel(), ORDER, math.prod(trailing))
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


def _difference(coarse: list[_Panel], fine: list[_Panel]) -> float:
    """max |x_coarse - x_fine| at the fine panels' Gauss points, their middles and both sides of their ends."""
    edges = _edges(fine)
    width = edges[1:] - edges[:-1]
    inside = torch.cat([gauss_legendre(ORDER)[0], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)])
    t = (edges[:-1, None] + width[:, None] * inside.to(edges.device)).reshape(-1)
    with torch.no_grad():
        pair = [
            _evaluate(_edges(panels), torch.stack([panel.coefficients for panel in panels]), t)
            for panels in (coarse, fine)
        ]
        return _size(pair[0] - pair[1])


def _known_edges(curves: ParameterCurves, panels: int, max_points: int) -> list[float]:
    """The panels to begin with: their ends include the nodes of curves given by samples, if those are few enough."""
    found = {index / panels for index in range(panels + 1)}
    for name in ("A", "a", "K", "b", "vartheta"):
        curve = getattr(curves, name)
        curve = getattr(curve, "function", curve)
        if hasattr(curve, "times"):
            found.update(curve.times.double().tolist())
        elif isinstance(getattr(curve, "layers", None), int):
            found.update(index / curve.layers for index in range(curve.layers + 1))
    edges = sorted(found)
    # Nodes that differ by rounding only are one node.
    kept = [edges[0], *(right for left, right in zip(edges[:-1], edges[1:], strict=True) if right - left > 1e-12)]
    if 2 * ORDER * (len(kept) - 1) > max_points:
        return [index / panels for index in range(panels + 1)]
    return kept
