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

from ._checks import check_count, check_tensor
from .curves import ParameterCurves
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


def growth_constant(operator: NonLocalOperator | None, dim: int, vartheta: Tensor | None = None) -> float:
    """g with |N(y)| <= g |y|.

    ||V|| for local, for RBF and the Gaussian with "sym" (w is similar to a stochastic matrix: ||w|| = 1) and for RBF
    with "const" (0 <= kappa_ij <= 1: ||kappa|| <= n); sqrt(n) ||V|| for "row" (row sums 1, column sums <= n); n ||V||
    for RBF with "none".

    Raises:
        ValueError: dot-product kernels with "const" or "none" have no linear growth; the embedded one with "sym" has a
            non-symmetric w, for which no bound is derived.
    """
    if operator is None:
        return 1.0
    _, _, value = _norms(operator, dim, vartheta)
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
    if operator is None:
        return 1.0
    h, matrix, value = _norms(operator, dim, vartheta)
    n, kernel, norm = operator.positions, operator.kernel, operator.normalization
    root = math.sqrt(n)
    if isinstance(kernel, LocalKernel):
        return value
    if isinstance(kernel, RBFKernel):
        slope = radius / (h * math.sqrt(math.e))
        if norm == "row":
            local = root + (1 + 2 * root) * (radius / h) ** 2
            return value * min(local, root + (n - 1) * (n + 3) / math.e)
        if norm == "sym":
            return value * (1 + (n - 1) * (3 + root) * slope)
        return value * (1 + 2 * slope) * (n if norm == "none" else 1)
    if norm == "row":
        if math.isinf(radius):
            raise ValueError(f"radius must be finite for {kernel.name}: it is not globally Lipschitz")
        return value * (root + (1 + root) * matrix * radius**2)
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
    h, _, value = _norms(operator, dim, vartheta)
    n, parts = operator.positions, []
    size = math.sqrt(n) * radius
    kernel = operator.kernel
    if isinstance(kernel, EmbeddedGaussianKernel) and kernel.matrix is None:
        parts.append(value * radius**2 * size)
    if isinstance(kernel, RBFKernel) and kernel.bandwidth is None:
        parts.append(value * math.sqrt(n) * (2 * radius / h) ** 2 * radius)
    if isinstance(operator.value, str):
        parts.append(size if isinstance(kernel, LocalKernel) else math.sqrt(n) * size)
    return math.hypot(*parts)  # the blocks of vartheta are orthogonal


def _norms(operator: NonLocalOperator, dim: int, vartheta: Tensor | None) -> tuple[float, float, float]:
    """h, ||M||, ||V|| (spectral), with 1 where they do not apply."""
    like = torch.zeros((), dtype=torch.float64) if vartheta is None else vartheta.detach()
    shape, value = operator.unpack(None if vartheta is None else vartheta.detach(), dim, like)
    h = matrix = 1.0
    if shape is not None and isinstance(operator.kernel, RBFKernel):
        h = shape.item()
    elif shape is not None:
        matrix = torch.linalg.matrix_norm(shape, 2).item()
    return h, matrix, 1.0 if value is None else torch.linalg.matrix_norm(value, 2).item()


@dataclass(frozen=True)
class StateBound:
    """Lemma 2: |x^{l+1}| <= (F + k tau |x^0|) (1 + k tau)^l <= uniform = (F + k |x^0| tau) e^k for l = 0 .. L-1.

    `per_layer` [L] holds the first bound, for x^1 .. x^L.
    """

    per_layer: Tensor
    uniform: Tensor
    F: Tensor
    k: Tensor


def state_bound(parameters: DiscreteParameters, x: Tensor, phi: LayerMap) -> StateBound:
    """Lemma 2 with beta = Lip(sigma) g, F = beta (max||A|| |x^0| + max|a| + max|b|), k = beta max||K||.

    Args:
        parameters: Theta.
        x: x^0 [..., d]; the largest Euclidean norm over the batch enters.
        phi: the layer map.

    Source: DNL Lemma 2 (uniform bound stated; constants derived). Sharp: equality for d = 1, b = 0, positive
    constants and phi = id.
    """
    beta = _sigma(phi) * _largest(phi, parameters.dim, parameters.vartheta, growth_constant)
    norms = parameters.sup_norms()
    size = torch.linalg.vector_norm(check_tensor("x", x), dim=-1).max()
    F = beta * (norms["A"] * size + norms["a"] + norms["b"])
    k, tau = beta * norms["K"], parameters.tau
    power = torch.arange(parameters.layers, dtype=size.dtype, device=size.device)
    start = F + k * tau * size
    return StateBound(start * (1 + k * tau) ** power, start * torch.exp(k), F, k)


@dataclass(frozen=True)
class TrajectoryBound:
    """Proposition 3: |x(t)| <= F e^{k t}; called with t. `sup` is the value at t = 1."""

    F: float
    k: float

    def __call__(self, t: Tensor) -> Tensor:
        return self.F * torch.exp(self.k * t)

    @property
    def sup(self) -> float:
        return self.F * math.exp(self.k)


def trajectory_bound(curves: ParameterCurves, x: Tensor, phi: LayerMap, points: int = 129) -> TrajectoryBound:
    """Proposition 3 from the curves' sup norms (maxima over a grid of `points`, see `ParameterCurves.sup_norms`)."""
    norms = curves.sup_norms(points)
    beta = _sigma(phi) * _largest(phi, curves.dim, _grid_vartheta(curves, points), growth_constant)
    size = torch.linalg.vector_norm(check_tensor("x", x), dim=-1).max().item()
    return TrajectoryBound(beta * (norms["A"] * size + norms["a"] + norms["b"]), beta * norms["K"])


@dataclass(frozen=True)
class ConvergenceConstant:
    """Corollary 5: max_{1 <= l <= L} |x^l - x(t_l)| <= C tau, with the pieces that C is made of."""

    C: float
    lipschitz: float  # of the layer map in y: Lambda
    trajectory: float  # X = sup |x(t)|, a bound or the value given
    trajectory_lipschitz: float  # L_x
    start_gap: float  # |x^0 - x(0)|


def convergence_constant(
    curves: ParameterCurves, x: Tensor, phi: LayerMap, *, sup_state: float | None = None, points: int = 129
) -> ConvergenceConstant:
    """C = (C1 + Lam ||K|| |x^0 - x(0)|) e^{Lam ||K||}, with Lam = Lip(sigma) Lip(R), Lam_v the same in vartheta,

    C1 = Lam (L_A |x| + L_a + 2 L_K X + 2 L_b + ||K|| L_x) + Lam_v L_v,
    L_x = Lam (L_A |x| + L_a + ||K|| X + ||b|| + L_K X + L_b) + Lam_v L_v.

    Args:
        curves: Lipschitz curves; their constants are maxima over a grid of `points`.
        x: inputs [..., d], x^0 = x.
        phi: the layer map; R is the largest |y| that the other constants allow.
        sup_state: X, where a bound of all |x(t)| and |x^l| is known; by default Proposition 3's and Lemma 2's (larger).

    Source: DNL Prop. 3-4 and Cor. 5 (rate stated; constant derived for our reading).
    """
    check_count("points", points, 2)
    norms, slopes = curves.sup_norms(points), curves.lipschitz_constants(points)
    size = torch.linalg.vector_norm(check_tensor("x", x), dim=-1).max().item()
    bound = trajectory_bound(curves, x, phi, points)
    X = bound.sup if sup_state is None else float(sup_state)
    # N is compared at the discrete states too; Lemma 2 bounds them, for every L, by its value with tau = 1.
    discrete = X if sup_state is not None else (bound.F + bound.k * size) * math.exp(bound.k)
    radius = norms["A"] * size + norms["a"] + norms["K"] * max(X, discrete, size) + norms["b"]
    vartheta = _grid_vartheta(curves, points)
    lam = _sigma(phi) * _largest(phi, curves.dim, vartheta, lambda o, d, v: lipschitz_constant(o, d, radius, v))
    lam_v = _sigma(phi) * _largest(
        phi, curves.dim, vartheta, lambda o, d, v: parameter_lipschitz_constant(o, d, radius, v)
    )
    forcing = slopes["A"] * size + slopes["a"]
    shift = lam_v * slopes["vartheta"] if lam_v else 0.0
    L_x = lam * (forcing + norms["K"] * X + norms["b"] + slopes["K"] * X + slopes["b"]) + shift
    C1 = lam * (forcing + 2 * slopes["K"] * X + 2 * slopes["b"] + norms["K"] * L_x) + shift
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    with torch.no_grad():
        y = x @ curves.A(zero).T + curves.a(zero)
        first = phi(y.reshape(-1, curves.dim), None if curves.vartheta is None else curves.vartheta(zero))
        gap = torch.linalg.vector_norm(x.reshape(-1, curves.dim) - first, dim=-1).max().item()
    growth = lam * norms["K"]
    C = (C1 + growth * gap) * math.exp(growth) if growth < 700 else math.inf
    return ConvergenceConstant(C, lam, X, L_x, gap)


def _sigma(phi: LayerMap) -> float:
    if phi.activation not in ACTIVATION_LIPSCHITZ:
        raise ValueError(f"activation {phi.activation!r} does not satisfy (A1): sigma(0) = 0")
    return ACTIVATION_LIPSCHITZ[phi.activation]


def _grid_vartheta(curves: ParameterCurves, points: int) -> Tensor | None:
    if curves.vartheta is None:
        return None
    with torch.no_grad():
        return curves.vartheta(torch.linspace(0, 1, points, dtype=torch.float64))


def _largest(phi: LayerMap, dim: int, vartheta: Tensor | None, constant) -> float:
    """The largest constant over the vartheta rows [m, v] that occur."""
    if vartheta is None or not phi.parameter_count(dim):
        return constant(phi.operator, dim, None)
    return max(constant(phi.operator, dim, row) for row in vartheta)
