"""Extension operators of Definitions 3-4: discrete parameters as functions on [0, 1] and on the square."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import check_count, check_tensor
from .curves import NAMES, ParameterCurves
from .depth import CallableKernel
from .grids import grid_times, locate
from .parameters import ONE_INDEX, DiscreteParameters, flip, pack
from .quadrature import composite_rule

FINEST = 1024  # cells per direction of a common refinement; beyond it distances are approximate


class Extension:
    """A function on [0, 1]^arguments made from values on a grid of `layers` cells per direction."""

    arguments = 1
    linear = False  # whether it is continuous: (bi)linear between the nodes

    def __init__(self, values: Tensor):
        check_tensor("values", values)
        if values.ndim < self.arguments or values.shape[0] < 1 or len(set(values.shape[: self.arguments])) != 1:
            wanted = "[L, ...]" if self.arguments == 1 else "[L, L, ...]"
            raise ValueError(f"values must have shape {wanted} with L >= 1, got {list(values.shape)}")
        self.values = values
        self.layers = values.shape[0]

    def __call__(self, *points: Tensor) -> Tensor:
        raise NotImplementedError

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cell l, its right neighbour (index L copied from L - 1) and the local coordinate, shaped for broadcasting."""
        cell, local = locate(t, self.layers)
        local = local.reshape(*t.shape, *([1] * (self.values.ndim - self.arguments)))
        return cell, (cell + 1).clamp_max(self.layers - 1), local

    def l2_distance(self, other: Callable, cells: int | None = None) -> Tensor:
        """||u - v||_{L2} of the Euclidean (Frobenius) norm; exact between piecewise (bi)linear extensions.

        Args:
            other: another extension, or any function of the same arguments.
            cells: of the quadrature, per direction; by default the common refinement of both grids.
        """
        count = self._cells(other, cells)
        order = 2 if isinstance(other, Extension) else 3  # 2 is exact for the square of a piecewise bilinear gap
        nodes, weights = composite_rule(count, order, dtype=self.values.dtype)
        if self.arguments == 1:
            gap = self(nodes) - other(nodes)
            return root(torch.einsum("l,l->", weights, gap.square().flatten(1).sum(1)))
        total = self.values.new_zeros(())
        for t, w in zip(nodes.split(256), weights.split(256), strict=True):
            gap = self(t[:, None], nodes[None]) - other(t[:, None], nodes[None])
            total = total + torch.einsum("l,j,lj->", w, weights, gap.square().flatten(2).sum(2))
        return root(total)

    def sup_distance(self, other: Callable, cells: int | None = None) -> Tensor:
        """max |u - v| over the vertices and midpoints of the common refinement; exact for continuous extensions."""
        points = grid_times(2 * self._cells(other, cells), dtype=self.values.dtype, device=self.values.device)
        if self.arguments == 1:
            return torch.linalg.vector_norm((self(points) - other(points)).flatten(1), dim=1).max()
        worst = []
        for t in points.split(256):
            gap = self(t[:, None], points[None]) - other(t[:, None], points[None])
            worst.append(torch.linalg.vector_norm(gap.flatten(2), dim=2).max())
        return torch.stack(worst).max()

    def _cells(self, other: Callable, cells: int | None) -> int:
        if cells is not None:
            return check_count("cells", cells)
        theirs = other.layers if isinstance(other, Extension) else max(256, self.layers)
        return min(math.lcm(self.layers, theirs), max(FINEST, self.layers))


def root(square: Tensor) -> Tensor:
    """The square root of a sum of squares, with the norm's subgradient 0 at 0 where sqrt has inf."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), 0 * square)


class PiecewiseConstant(Extension):
    """(I_0 u)(t) = u^l on [t_l, t_{l+1}). Source: DNL Def. 3 (reconstructed)."""

    def __call__(self, *points: Tensor) -> Tensor:
        (t,) = points
        return self.values[self._cell(t)[0]]


class PiecewiseLinear(Extension):
    """(I_1 u)(t) = (1 - lam) u^l + lam u^{l+1}, lam = (t - t_l) / tau, u^L := u^{L-1}. Source: DNL Def. 3-4 [R]."""

    linear = True

    def __call__(self, *points: Tensor) -> Tensor:
        (t,) = points
        cell, right, lam = self._cell(t)
        return (1 - lam) * self.values[cell] + lam * self.values[right]


class PiecewiseConstant2d(Extension):
    """(I_0 U)(t, s) = Uhat^{l,j} on I_l x I_j, Uhat the flip of U. Source: DNL Def. 3 (reconstructed)."""

    arguments = 2

    def __init__(self, values: Tensor):
        super().__init__(values)
        self.values = flip(values)

    def __call__(self, *points: Tensor) -> Tensor:
        t, s = torch.broadcast_tensors(*points)
        return self.values[self._cell(t)[0], self._cell(s)[0]]


class PiecewiseBilinear(PiecewiseConstant2d):
    """I_1 U = (1-lam)(1-mu) Uhat^{l,j} + lam (1-mu) Uhat^{l+1,j} + (1-lam) mu Uhat^{l,j+1} + lam mu Uhat^{l+1,j+1}.

    lam = (t - t_l) / tau, mu = (s - t_j) / tau, index L := L - 1. Source: DNL Def. 4 (reconstructed).
    """

    linear = True

    def __call__(self, *points: Tensor) -> Tensor:
        t, s = torch.broadcast_tensors(*points)
        (l0, l1, lam), (j0, j1, mu) = self._cell(t), self._cell(s)
        u = self.values
        return (1 - lam) * ((1 - mu) * u[l0, j0] + mu * u[l0, j1]) + lam * ((1 - mu) * u[l1, j0] + mu * u[l1, j1])


def piecewise_constant(u: Tensor) -> PiecewiseConstant:
    """I_0 of a one-index parameter u [L, ...]."""
    return PiecewiseConstant(u)


def piecewise_linear(u: Tensor) -> PiecewiseLinear:
    """I_1 of a one-index parameter u [L, ...]."""
    return PiecewiseLinear(u)


def piecewise_bilinear(U: Tensor) -> PiecewiseBilinear:
    """I_1 of a two-index parameter U [L, L, ...], whose lower triangle is read."""
    return PiecewiseBilinear(U)


def extend(parameters: DiscreteParameters) -> dict[str, Extension]:
    """I_1 Theta, one extension per parameter."""
    return {
        name: PiecewiseLinear(value) if name in ONE_INDEX else PiecewiseBilinear(parameters.square(name))
        for name, value in parameters.items()
    }


def extended_curves(parameters: DiscreteParameters) -> ParameterCurves:
    """I_1 Theta as parameters of the integral equation (7)."""
    e, d = extend(parameters), parameters.dim
    return ParameterCurves(
        e["A"],
        e["a"],
        CallableKernel(e["K"], (d, d)),
        CallableKernel(e["b"], (d,)),
        vartheta=e["vartheta"] if parameters.vartheta.shape[1] else None,
        dim=d,
    )


def distance(first: DiscreteParameters, second: DiscreteParameters, kind: str = "l2") -> Tensor:
    """||I_1 Theta - I_1 Theta'||: "l2" over all parameters together, or "sup", the norm (9) with Euclidean norms."""
    if kind not in ("l2", "sup"):
        raise ValueError(f"kind must be 'l2' or 'sup', got {kind!r}")
    ours, theirs = extend(first), extend(second)
    if kind == "l2":
        return torch.linalg.vector_norm(torch.stack([ours[name].l2_distance(theirs[name]) for name in NAMES]))
    return torch.stack([ours[name].sup_distance(theirs[name]) for name in NAMES]).max()


def prolong(parameters: DiscreteParameters, layers: int) -> DiscreteParameters:
    """I_1 Theta sampled at the nodes l / layers of another grid: a start for the problem on that grid.

    For layers = 2 L it keeps every value of Theta at the even indices; `restrict` is then its exact inverse.
    """
    check_count("layers", layers)
    A = parameters.A
    t = grid_times(layers, device=A.device, last=False)  # float64: node l of one grid is recognised on the other
    e = extend(parameters)
    t_i, s_j = torch.meshgrid(t, t, indexing="ij")
    values = {name: e[name](t) if name in ONE_INDEX else pack(e[name](t_i, s_j)) for name in NAMES}
    return DiscreteParameters(**values).map(lambda value: value.to(A.dtype))


def restrict(parameters: DiscreteParameters, layers: int) -> DiscreteParameters:
    """Every (L / layers)-th value of Theta: point samples on the coarser grid."""
    check_count("layers", layers)
    if parameters.layers % layers:
        raise ValueError(f"layers must divide {parameters.layers}, got {layers}")
    step = parameters.layers // layers
    values = {
        name: value[::step] if name in ONE_INDEX else pack(parameters.square(name)[::step, ::step])
        for name, value in parameters.items()
    }
    return DiscreteParameters(**values)
