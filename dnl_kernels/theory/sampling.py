"""From curves to an L-layer network: point samples (Corollary 5) and cell averages (29)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_count, check_finite
from .curves import ParameterCurves
from .depth import BLOCK, DepthKernel
from .grids import grid_times, working_dtype
from .parameters import DiscreteParameters
from .quadrature import duffy_rule, gauss_legendre


def sample_pointwise(
    curves: ParameterCurves, layers: int, *, dtype: torch.dtype = torch.float64, device=None
) -> DiscreteParameters:
    """A^l = A(t_l), a^l = a(t_l), K^{l,j} = K(t_l, t_j), b^{l,j} = b(t_l, t_j), vartheta^l = vartheta(t_l).

    Args:
        curves: the continuous parameters.
        layers: L >= 1; t_l = l / L.

    Raises:
        ValueError: L < 1, or a value that is not finite.

    Source: DNL Cor. 5 (reconstructed).
    """
    check_count("layers", layers)
    t = grid_times(layers, dtype=dtype, device=device, last=False)

    def kernel(k: DepthKernel) -> Tensor:
        return torch.cat([k.evaluate(t[row].expand(row + 1), t[: row + 1]) for row in range(layers)])

    vartheta = None if curves.vartheta is None else curves.vartheta(t)
    return _assemble(curves, curves.A(t), curves.a(t), kernel, vartheta, dtype)


def sample_cell_average(
    curves: ParameterCurves, layers: int, *, quad_order: int = 4, dtype: torch.dtype = torch.float64, device=None
) -> DiscreteParameters:
    """A^l = (1/tau) int_{I_l} A, K^{l,j} = (1/tau^2) int_{I_l x I_j} K of the symmetric K, I_l = [t_l, t_{l+1}).

    The average of the symmetric K over a diagonal cell is 2/tau^2 times its integral over the cell's lower triangle; a
    Duffy rule keeps the kink at t = s out of the quadrature. By Jensen, R_L(averages) <= R(curves) term by term, for
    every L: the recovery sequence of Theorem 1.

    Args:
        curves: the continuous parameters.
        layers: L >= 1.
        quad_order: Gauss points per direction and cell.

    Source: DNL (29) (reconstructed).
    """
    check_count("layers", layers)
    work = working_dtype(dtype)
    g, w = gauss_legendre(quad_order, dtype=work, device=device)
    u, v, duffy = duffy_rule(quad_order, dtype=work, device=device)
    left = torch.arange(layers, dtype=work, device=device)
    nodes = (left[:, None] + g) / layers

    def curve(values: Tensor) -> Tensor:
        return torch.einsum("lg...,g->l...", values, w)

    def kernel(k: DepthKernel) -> Tensor:
        diagonal = k.evaluate((left[:, None] + u) / layers, (left[:, None] + v) / layers)
        diagonal = torch.einsum("lg...,g->l...", diagonal, 2 * duffy)
        size = diagonal[0].numel() * quad_order**2
        rows = []
        for row in range(layers):
            for first in range(0, row, chunk := max(1, BLOCK // size)):
                s = nodes[first : min(first + chunk, row)]
                rows.append(torch.einsum("gjh...,g,h->j...", k.evaluate(nodes[row][:, None, None], s), w, w))
            rows.append(diagonal[row : row + 1])
        return torch.cat(rows)

    vartheta = None if curves.vartheta is None else curve(curves.vartheta(nodes))
    return _assemble(curves, curve(curves.A(nodes)), curve(curves.a(nodes)), kernel, vartheta, dtype)


def _assemble(
    curves: ParameterCurves, A: Tensor, a: Tensor, kernel, vartheta: Tensor | None, dtype: torch.dtype
) -> DiscreteParameters:
    layers = A.shape[0]
    K = kernel(curves.K)
    b = K.new_zeros(K.shape[0], curves.dim) if curves.b is None else kernel(curves.b)
    vartheta = A.new_zeros(layers, 0) if vartheta is None else vartheta
    parameters = DiscreteParameters(A, a, K, b, vartheta)
    for name, value in parameters.items():
        check_finite(f"the curve {name}", value.detach())
    return parameters.map(lambda value: value.to(dtype))
