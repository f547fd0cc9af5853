"""Gauss rules on [0, 1], on the square's cells and on the triangle 0 <= s <= t <= 1 (Duffy map on the diagonal)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_count


def gauss_legendre(order: int, *, dtype: torch.dtype = torch.float64, device=None) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], exact for polynomials of degree 2 order - 1 (Golub-Welsch).

    Returns:
        nodes [order], increasing, and weights [order], which sum to 1.
    """
    check_count("order", order)
    k = torch.arange(1, order, dtype=torch.float64)
    off = k / torch.sqrt(4 * k * k - 1)
    jacobi = torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(jacobi)
    return ((nodes + 1) / 2).to(device, dtype), (vectors[0] ** 2).to(device, dtype)


def gauss_jacobi(order: int, alpha: float, *, dtype: torch.dtype = torch.float64, device=None) -> tuple[Tensor, Tensor]:
    """Nodes and weights of int_0^1 f(v) (1 - v)^(-alpha) dv, 0 <= alpha < 1, exact for degree 2 order - 1.

    Golub-Welsch with the recurrence of the Jacobi polynomials P^(-alpha, 0).
    """
    check_count("order", order)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must lie in [0, 1), got {alpha}")
    if alpha == 0:
        return gauss_legendre(order, dtype=dtype, device=device)
    n = torch.arange(order, dtype=torch.float64)
    total = 2 * n - alpha
    diagonal = -(alpha**2) / (total * (total + 2))
    k, total = n[1:], total[1:]
    off = 4 * k * (k - alpha) * k * (k - alpha) / (total**2 * (total + 1) * (total - 1))
    jacobi = torch.diag(diagonal) + torch.diag(off.sqrt(), 1) + torch.diag(off.sqrt(), -1)
    nodes, vectors = torch.linalg.eigh(jacobi)
    return ((nodes + 1) / 2).to(device, dtype), (vectors[0] ** 2 / (1 - alpha)).to(device, dtype)


def composite_rule(panels: int, order: int, *, dtype=torch.float64, device=None) -> tuple[Tensor, Tensor]:
    """Nodes [panels * order] and weights of the composite Gauss rule on [0, 1]."""
    check_count("panels", panels)
    u, w = gauss_legendre(order, dtype=dtype, device=device)
    left = torch.arange(panels, dtype=dtype, device=device)[:, None]
    return ((left + u) / panels).reshape(-1), (w / panels).repeat(panels)


def duffy_rule(order: int, *, dtype=torch.float64, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """int over {0 <= v <= u <= 1} of f(u, v): with v = u r the weight is u, and the diagonal is never crossed.

    Returns:
        u, v, weights, each [order**2]; the weights sum to 1/2.
    """
    g, w = gauss_legendre(order, dtype=dtype, device=device)
    u = g[:, None].expand(order, order).reshape(-1)
    v = (g[:, None] * g[None, :]).reshape(-1)
    return u, v, (w[:, None] * w[None, :] * g[:, None]).reshape(-1)


def triangle_rule(panels: int, order: int, *, dtype=torch.float64, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Composite rule on the triangle s <= t: product Gauss on the cells below the diagonal, Duffy on the diagonal's.

    Aligned to the cells [l/panels, (l+1)/panels)^2, so it is exact to its degree for the (bi)linear extensions too.

    Returns:
        t, s, weights, each [panels (panels - 1) / 2 * order**2 + panels * order**2]; the weights sum to 1/2.
    """
    g, w = gauss_legendre(order, dtype=dtype, device=device)
    rows, cols = torch.tril_indices(panels, panels, -1, device=device)
    shape = (rows.numel(), order, order)
    t = ((rows[:, None, None] + g[:, None]) / panels).expand(shape).reshape(-1)
    s = ((cols[:, None, None] + g[None, :]) / panels).expand(shape).reshape(-1)
    product = (w[:, None] * w[None, :] / panels**2).expand(shape).reshape(-1)
    u, v, duffy = duffy_rule(order, dtype=dtype, device=device)
    cell = torch.arange(panels, dtype=dtype, device=device)[:, None]
    diagonal = [((cell + z) / panels).reshape(-1) for z in (u, v)]
    weights = torch.cat([product, (duffy / panels**2).repeat(panels)])
    return torch.cat([t, diagonal[0]]), torch.cat([s, diagonal[1]]), weights
