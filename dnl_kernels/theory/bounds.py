"""Bounds of Lemma 2, Propositions 3-4 and Corollary 5, and the constants of Remark 1, as functions of the data.

Growth and Lipschitz constants are those of assumption (A2), |N(y; v)| <= g(|v|) |y| and
|N(y; v) - N(y'; v)| <= Lip(R, |v|) |y - y'| for max_i |y_i|, |y'_i| <= R, in the Euclidean norm over all n positions.
Source: section 8-9 of the specification; the paper states the assumptions, the constants are derived for our reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_choice, check_count, check_tensor
from .curves import CurveBounds, ParameterCurves, samples_of
from .enclosure import enclose
from .grids import grid_times
from .operators import (
    ACTIVATION_LIPSCHITZ,
    EmbeddedGaussianKernel,
    GaussianKernel,
    LayerMap,
    LocalKernel,
    NonLocalOperator,
    RBFKernel,
)
from .parameters import DiscreteParameters
from .solvers import flatten_batch


def growth_constant(operator: NonLocalOperator | None, dim: int, vartheta: Tensor | None = None) -> float:
    """g with |N(y)| <= g |y|.

    ||V|| for local, for RBF and the Gaussian with "sym" (w is similar to a stochastic matrix: ||w|| = 1) and for RBF
    with "const" (0 <= kappa_ij <= 1: ||kappa|| <= n); sqrt(n) ||V|| for "row" (row sums 1, column sums <= n); n ||V||
    for RBF with "none".

    Raises:
        ValueError: dot-product kernels with "const" or "none" have no linear growth; the embedded one with "sym" has a
            non-symmetric w, for which no bound is derived.
    """
    return 1.0 if operator is None else _growth(operator, _norms(operator, dim, vartheta))


def _growth(operator: NonLocalOperator, norms: _Norms) -> float:
    value = norms.value
    n, kernel, norm = operator.positions, operator.kernel, operator.normalization
    if isinstance(kernel, LocalKernel):
        return value
    if norm == "row":
        return math.sqrt(n) * value
    if isinstance(kernel, RBFKernel):
        return (n if norm == "none" else 1) * value
    if norm == "sym" and isinstance(kernel, GaussianKernel):
        return value
    raise ValueError(f"no growth constant for {kernel.name} with normalization {norm!r}: it violates (A2)")


def lipschitz_constant(
    operator: NonLocalOperator | None, dim: int, radius: float = math.inf, vartheta: Tensor | None = None
) -> float:
    """Lip(R) with |N(y) - N(y')| <= Lip |y - y'| where max_i |y_i|, |y'_i| <= R.

    local ||V||; with M (identity for gaussian): row ||V|| (sqrt n + (1 + sqrt n) ||M|| R^2); RBF row the smaller of
    ||V|| (sqrt n + (1 + 2 sqrt n) R^2 / h^2) and the global ||V|| (sqrt n + (n - 1)(n + 3) / e). Ours, by
    kappa r <= h / sqrt(e): RBF const ||V|| (1 + 2 R / (h sqrt e)), none n times that, sym
    ||V|| (1 + (n - 1)(3 + sqrt n) R / (h sqrt e)).

    Raises:
        ValueError: no bound known; for dot products radius must be finite, since they are not globally Lipschitz.
    """
    if not radius >= 0:
        raise ValueError(f"radius must be >= 0, got {radius}")
    return 1.0 if operator is None else _lipschitz(operator, _norms(operator, dim, vartheta), radius)


def _lipschitz(operator: NonLocalOperator, norms: _Norms, radius: float) -> float:
    h, matrix, value = norms.bandwidth, norms.matrix, norms.value
    n, kernel, norm = operator.positions, operator.kernel, operator.normalization
    root = math.sqrt(n)
    if isinstance(kernel, LocalKernel):
        return value
    if isinstance(kernel, RBFKernel):
        slope = radius / (h * math.sqrt(math.e))
        if norm == "row":
            local = root + (1 + 2 * root) * (radius / h) * (radius / h)
            return value * min(local, root + (n - 1) * (n + 3) / math.e)
        if norm == "sym":
            return value * (1 + (n - 1) * (3 + root) * slope)
        return value * (1 + 2 * slope) * (n if norm == "none" else 1)
    if norm == "row":
        if math.isinf(radius):
            raise ValueError(f"radius must be finite for {kernel.name}: it is not globally Lipschitz")
        return value * (root + (1 + root) * matrix * radius * radius)
    raise ValueError(f"no Lipschitz constant is known for {kernel.name} with normalization {norm!r}")


def parameter_lipschitz_constant(
    operator: NonLocalOperator | None, dim: int, radius: float, vartheta: Tensor | None = None
) -> float:
    """Lipschitz constant of N in vartheta for max_i |y_i| <= R, row normalisation; 0 where nothing is read from it.

    V: sqrt(n) |y|; M: ||V|| R^2 |y|; rho = log h: ||V|| sqrt(n) (diam^2 / h^2) R with diam <= 2 R; |y| <= sqrt(n) R.
    Entries of vartheta are measured in its Euclidean norm, which bounds the spectral norms of M and V.
    """
    if operator is None or not operator.parameter_count(dim):
        return 0.0
    if operator.normalization != "row":
        raise ValueError(f"normalization must be 'row' for a constant in vartheta, got {operator.normalization!r}")
    return _parameter_lipschitz(operator, _norms(operator, dim, vartheta), radius)


def _parameter_lipschitz(operator: NonLocalOperator, norms: _Norms, radius: float) -> float:
    h, value = norms.bandwidth, norms.value
    n, parts = operator.positions, []
    size = math.sqrt(n) * radius
    kernel = operator.kernel
    if isinstance(kernel, EmbeddedGaussianKernel) and kernel.matrix is None:
        parts.append(value * radius * radius * size)
    if isinstance(kernel, RBFKernel) and kernel.bandwidth is None:
        parts.append(value * math.sqrt(n) * (2 * radius / h) * (2 * radius / h) * radius)
    if isinstance(operator.value, str):
        parts.append(size if isinstance(kernel, LocalKernel) else math.sqrt(n) * size)
    return math.hypot(*parts)  # the blocks of vartheta are orthogonal


@dataclass(frozen=True)
class _Norms:
    """h, ||M||, ||V|| (spectral), with 1 where they do not apply. Every constant grows with 1 / h, ||M|| and ||V||."""

    bandwidth: float = 1.0
    matrix: float = 1.0
    value: float = 1.0

    def worse(self, other: _Norms) -> _Norms:
        pairs = (self.matrix, other.matrix), (self.value, other.value)
        return _Norms(min(self.bandwidth, other.bandwidth), *map(max, pairs))


def _norms(operator: NonLocalOperator, dim: int, vartheta: Tensor | None, radius: Tensor | None = None) -> _Norms:
    """For one vartheta [v], or for all within `radius` [v] of it, entry by entry."""
    like = torch.zeros((), dtype=torch.float64) if vartheta is None else vartheta.detach()
    shape, value = operator.unpack(None if vartheta is None else vartheta.detach(), dim, like)
    free = like.new_zeros(operator.parameter_count(dim)) if radius is None else radius
    c = operator.channels(dim)
    h = matrix = 1.0
    if shape is not None and isinstance(operator.kernel, RBFKernel):
        h = shape.item()
        if operator.kernel.bandwidth is None:
            h, free = h * math.exp(-free[0].item()), free[1:]
    elif shape is not None:
        matrix = torch.linalg.matrix_norm(shape, 2).item()
        if isinstance(operator.kernel, EmbeddedGaussianKernel) and operator.kernel.matrix is None:
            matrix, free = matrix + free[: c * c].norm().item(), free[c * c :]
    size = 1.0 if value is None else torch.linalg.matrix_norm(value, 2).item()
    if isinstance(operator.value, str):
        size += free[: c * c].norm().item()
    return _Norms(h, matrix, size)


@dataclass(frozen=True)
class StateBound:
    """Lemma 2: |x^{l+1}| <= (F + k tau |x^0|) (1 + k tau)^l <= uniform = (F + k |x^0| tau) e^k for l = 0 .. L-1.

    `per_layer` [L] holds the first bound, for x^1 .. x^L, and `start` bounds |x^0|.
    """

    per_layer: Tensor
    uniform: Tensor
    F: Tensor
    k: Tensor
    start: Tensor


def state_bound(parameters: DiscreteParameters, x: Tensor, phi: LayerMap, *, first: str = "input") -> StateBound:
    """Lemma 2 with beta = Lip(sigma) g, F = beta (max||A|| |x| + max|a| + max|b|), k = beta max||K||.

    Args:
        parameters: Theta.
        x: inputs [..., d]; the largest Euclidean norm over the batch enters.
        phi: the layer map.
        first: "input", x^0 = x, or "lifted", for which |x^0| <= beta (||A^0|| |x| + |a^0|) takes the place of |x|.

    Source: DNL Lemma 2 (uniform bound stated; constants derived). Sharp: equality for d = 1, b = 0, positive
    constants and phi = id.
    """
    check_choice("first", first, ("input", "lifted"))
    beta = _sigma(phi) * _growth_of(phi, parameters.dim, parameters.vartheta)
    norms = parameters.sup_norms()
    size = start = _input_size(x)
    if first == "lifted":
        matrix, shift = torch.linalg.matrix_norm(parameters.A[0], 2), torch.linalg.vector_norm(parameters.a[0])
        start = beta * (matrix * size + shift)
    F = beta * (norms["A"] * size + norms["a"] + norms["b"])
    k, tau = beta * norms["K"], parameters.tau
    power = torch.arange(parameters.layers, dtype=size.dtype, device=size.device)
    lowest = F + k * tau * start
    return StateBound(lowest * (1 + k * tau) ** power, lowest * torch.exp(k), F, k, start)


@dataclass(frozen=True)
class TrajectoryBound:
    """Proposition 3: |x(t)| <= F e^{k t}; called with t. `sup` is the value at t = 1.

    `certified`: F and k come from upper bounds of the curves; otherwise from maxima over points, and a bump between
    them may break the bound.
    """

    F: float
    k: float
    certified: bool = True

    def __call__(self, t: Tensor) -> Tensor:
        return self.F * torch.exp(self.k * t)

    @property
    def sup(self) -> float:
        return self.F * _exp(self.k)


def trajectory_bound(curves: ParameterCurves, x: Tensor, phi: LayerMap, points: int | None = None) -> TrajectoryBound:
    """Proposition 3 with the curves' sup norms: certified upper bounds (`ParameterCurves.bounds`).

    Args:
        curves, x, phi: the problem.
        points: None, or the number of grid points to take maxima over instead, for curves without an interval form.
            The result is then no bound, and its `certified` is False.

    Raises:
        ValueError: a curve has no interval form and points is None.
    """
    return _trajectory_bound(curves.bounds(points), x, phi, _curve_norms(curves, phi, points))


def _trajectory_bound(bounds: CurveBounds, x: Tensor, phi: LayerMap, operator: _Norms | None) -> TrajectoryBound:
    beta = _sigma(phi) * (1.0 if phi.operator is None else _growth(phi.operator, operator or _Norms()))
    sup, size = bounds.sup, _input_size(x).item()
    return TrajectoryBound(beta * (sup["A"] * size + sup["a"] + sup["b"]), beta * sup["K"], bounds.certified)


@dataclass(frozen=True)
class ConvergenceConstant:
    """Corollary 5: max_{1 <= l <= L} |x^l - x(t_l)| <= C tau, with the pieces that C is made of.

    C = inf means e^{Lam ||K||} beyond the largest float64: `log_C` is finite then. The reason: a dot-product kernel's
    Lipschitz constant does grow like ||M|| R^2 (see `lipschitz_constant`), and Gronwall's inequality puts it into an
    exponent. Whether C of that size is ever attained is not claimed.
    """

    C: float
    log_C: float
    lipschitz: float  # of the layer map in y: Lambda
    trajectory: float  # X = sup |x(t)|, a bound or the value given
    trajectory_lipschitz: float  # L_x
    start_gap: float  # |x^0 - x(0)|
    certified: bool  # the curves' constants are upper bounds; sup_state, where given, is taken on trust


def convergence_constant(
    curves: ParameterCurves,
    x: Tensor,
    phi: LayerMap,
    *,
    sup_state: float | None = None,
    points: int | None = None,
    first: str = "input",
) -> ConvergenceConstant:
    """C = (C1 + Lam ||K|| |x^0 - x(0)|) e^{Lam ||K||}, with Lam = Lip(sigma) Lip(R), Lam_v the same in vartheta,

    C1 = Lam (L_A |x| + L_a + 2 L_K X + 2 L_b + ||K|| L_x) + Lam_v L_v,
    L_x = Lam (L_A |x| + L_a + ||K|| X + ||b|| + L_K X + L_b) + Lam_v L_v.

    Args:
        curves: Lipschitz curves; their constants are certified upper bounds (`ParameterCurves.bounds`).
        x: inputs [..., d].
        phi: the layer map; R is the largest |y| that the other constants allow.
        sup_state: X, where a bound of all |x(t)| and |x^l| is known; by default Proposition 3's and Lemma 2's (the
            larger), and for tanh at most sqrt(d).
        points: None, or a number of grid points to take maxima over instead (not certified).
        first: "input", x^0 = x, or "lifted", x^0 = x(0), for which the gap is 0.

    Raises:
        ValueError: a curve has no interval form and points is None; a bound of the states overflows and none is given.

    Source: DNL Props. 3-4, Cor. 5 (rate stated; constant derived for our reading).
    """
    check_choice("first", first, ("input", "lifted"))
    bounds, operator = curves.bounds(points), _curve_norms(curves, phi, points)
    norms, slopes = bounds.sup, bounds.lipschitz
    size = _input_size(x).item()
    bound = _trajectory_bound(bounds, x, phi, operator)
    ceiling = math.sqrt(curves.dim) if phi.activation == "tanh" else math.inf
    X = min(bound.sup, ceiling) if sup_state is None else float(sup_state)
    # N is compared at the discrete states too; Lemma 2 bounds them, for every L, by its value with tau = 1.
    start = size if first == "input" else min(bound.F, ceiling)
    discrete = X if sup_state is not None else min((bound.F + bound.k * start) * _exp(bound.k), ceiling)
    if math.isinf(max(X, discrete)):
        raise ValueError(f"sup_state must be given: Proposition 3's bound F e^k overflows (k = {bound.k:.3g})")
    radius = norms["A"] * size + norms["a"] + norms["K"] * max(X, discrete, start) + norms["b"]
    lam = 1.0
    if phi.operator is not None:
        lam = _lipschitz(phi.operator, operator or _Norms(), radius)
    lam *= _sigma(phi)
    lam_v = 0.0
    if phi.operator is not None and phi.parameter_count(curves.dim):
        if phi.operator.normalization != "row":
            given = phi.operator.normalization
            raise ValueError(f"normalization must be 'row' for a constant in vartheta, got {given!r}")
        lam_v = _sigma(phi) * _parameter_lipschitz(phi.operator, operator or _Norms(), radius)
    forcing = slopes["A"] * size + slopes["a"]
    shift = lam_v * slopes["vartheta"] if lam_v else 0.0
    L_x = lam * (forcing + norms["K"] * X + norms["b"] + slopes["K"] * X + slopes["b"]) + shift
    C1 = lam * (forcing + 2 * slopes["K"] * X + 2 * slopes["b"] + norms["K"] * L_x) + shift
    gap = 0.0 if first == "lifted" else _start_gap(curves, x, phi)
    growth = lam * norms["K"]
    factor = C1 + growth * gap
    log_C = math.log(factor) + growth if factor > 0 else -math.inf
    return ConvergenceConstant(factor * _exp(growth), log_C, lam, X, L_x, gap, bounds.certified)


def _start_gap(curves: ParameterCurves, x: Tensor, phi: LayerMap) -> float:
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    flat = flatten_batch(x.detach(), curves.dim)
    if not flat.numel():
        return 0.0
    with torch.no_grad():
        start = phi(
            flat @ curves.A(zero).T + curves.a(zero), None if curves.vartheta is None else curves.vartheta(zero)
        )
        return torch.linalg.vector_norm(flat - start, dim=-1).max().item()


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < 709 else math.inf


def _input_size(x: Tensor) -> Tensor:
    """The largest |x| over the batch; 0 for an empty one."""
    sizes = torch.linalg.vector_norm(check_tensor("x", x).detach(), dim=-1)
    return sizes.max() if sizes.numel() else x.new_zeros(())


def _sigma(phi: LayerMap) -> float:
    if not isinstance(phi, LayerMap):
        raise TypeError(f"phi must be a LayerMap, whose constants are known, got {type(phi).__name__}")
    if phi.activation not in ACTIVATION_LIPSCHITZ:
        raise ValueError(f"activation {phi.activation!r} does not satisfy (A1): sigma(0) = 0")
    return ACTIVATION_LIPSCHITZ[phi.activation]


def _growth_of(phi: LayerMap, dim: int, vartheta: Tensor | None) -> float:
    """The largest growth constant over the vartheta rows [m, v] that occur."""
    if vartheta is None or not phi.parameter_count(dim):
        return growth_constant(phi.operator, dim, None)
    return max(growth_constant(phi.operator, dim, row) for row in vartheta)


def _curve_norms(curves: ParameterCurves, phi: LayerMap, points: int | None) -> _Norms | None:
    """The worst norms of the operator along the curve vartheta(t): by interval cells, or over `points`."""
    _sigma(phi)
    if phi.operator is None:
        return None
    if curves.vartheta is None or not phi.parameter_count(curves.dim):
        return _norms(phi.operator, curves.dim, None)
    with torch.no_grad():
        rows, radii = _vartheta_cells(curves, points)
    worst = None
    for row, radius in zip(rows, radii, strict=True):
        found = _norms(phi.operator, curves.dim, row, radius)
        worst = found if worst is None else worst.worse(found)
    return worst


def _vartheta_cells(curves: ParameterCurves, points: int | None) -> tuple[Tensor, Tensor]:
    """Rows [m, v] of vartheta and radii: every value of the curve lies within a radius of its row, entry by entry."""
    curve = curves.vartheta
    assert curve is not None
    if (samples := samples_of(curve)) is not None:  # norms are convex and log h is linear between the nodes
        return samples[1], torch.zeros_like(samples[1])
    if points is not None:
        rows = curve(grid_times(check_count("points", points, 2) - 1))
        return rows, torch.zeros_like(rows)
    found = enclose(curve, 256)
    return found.middle, found.radius
