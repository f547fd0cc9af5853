"""Cosine (DCT-II) coordinates: they diagonalise the discrete H^1 norms (6) with p = 2, copied boundaries included."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import check_count
from .curves import NAMES
from .parameters import ONE_INDEX, DiscreteParameters, pack, triangle_size, unpack


def dct_matrix(layers: int, *, dtype=torch.float64, device=None) -> Tensor:
    """The orthonormal DCT-II: C[k, l] = c_k cos(pi k (l + 1/2) / L), c_0 = sqrt(1/L), c_k = sqrt(2/L)."""
    check_count("layers", layers)
    k = torch.arange(layers, dtype=dtype, device=device)
    matrix = torch.cos(math.pi * k[:, None] * (k + 0.5) / layers) * math.sqrt(2 / layers)
    return torch.cat([matrix[:1] / math.sqrt(2), matrix[1:]])


class SobolevPreconditioner:
    """Coordinates z in which R_L with p = 2 and unit weights is |z|^2.

    sum_l |u^l|^2 + sum_l |(u^{l+1} - u^l) / tau|^2 = sum_k (1 + e_k) |(C u)_k|^2,  e_k = 4 L^2 sin^2(pi k / (2 L)):
    the differences with copied boundaries are a Neumann Laplacian, whose eigenvectors are the cosines of C.
    So u = C^T diag(tau (1 + e_k))^{-1/2} z, and on the flipped square U = C^T [tau^2 (1 + e_k + e_q)]^{-1/2} Z C.

    Gradient steps in z are Sobolev (H^1) gradient steps in Theta: they do not depend on the mesh.

    Args:
        layers: L. dim: d. vartheta: v.
    """

    def __init__(self, layers: int, dim: int, vartheta: int = 0, *, dtype=torch.float64, device=None):
        self.layers, self.dim = check_count("layers", layers), check_count("dim", dim)
        self.C = dct_matrix(layers, dtype=dtype, device=device)
        k = torch.arange(layers, dtype=dtype, device=device)
        eigenvalue = 4 * layers**2 * torch.sin(math.pi * k / (2 * layers)) ** 2
        self.one = (1 + eigenvalue) / layers
        self.two = (1 + eigenvalue[:, None] + eigenvalue) / layers**2
        size = triangle_size(layers)
        self.shapes = {
            "A": (layers, dim, dim),
            "a": (layers, dim),
            "K": (size, dim, dim),
            "b": (size, dim),
            "vartheta": (layers, vartheta),
        }
        self.sizes = [math.prod(self.shapes[name]) for name in NAMES]
        # |Z|^2 over the square counts an off-diagonal entry twice; this makes the packed coordinates isometric.
        i, j = torch.tril_indices(layers, layers, device=device)
        self.fold = torch.ones(i.numel(), dtype=dtype, device=device).masked_fill_(i != j, math.sqrt(2))

    @classmethod
    def of(cls, parameters: DiscreteParameters) -> SobolevPreconditioner:
        A = parameters.A
        return cls(parameters.layers, parameters.dim, parameters.vartheta.shape[1], dtype=A.dtype, device=A.device)

    @property
    def size(self) -> int:
        """The number of coordinates: that of the parameters, L (d^2 + d) + L (L + 1) / 2 (d^2 + d) + L v."""
        return sum(self.sizes)

    def to_parameters(self, z: Tensor) -> DiscreteParameters:
        """Theta(z), linear and differentiable; z [size]."""
        if z.shape != (self.size,):
            raise ValueError(f"z must have shape [{self.size}], got {list(z.shape)}")
        values = {}
        for name, part in zip(NAMES, z.split(self.sizes), strict=True):
            u = part.reshape(self.shapes[name])
            if name in ONE_INDEX:
                values[name] = torch.tensordot(self.C, u / _column(self.one.sqrt(), u), ([0], [0]))
            else:
                square = unpack(u / _column(self.fold, u), self.layers)
                square = square / _column(self.two.sqrt(), square, 2)
                values[name] = pack(self._transform(square, self.C.T))
        return DiscreteParameters(**values)

    def to_coordinates(self, parameters: DiscreteParameters) -> Tensor:
        """z(Theta), the inverse of `to_parameters`."""
        parts = []
        for name, u in parameters.items():
            if name in ONE_INDEX:
                parts.append(torch.tensordot(self.C, u, 1) * _column(self.one.sqrt(), u))
            else:
                square = self._transform(parameters.square(name), self.C)
                packed = pack(square * _column(self.two.sqrt(), square, 2))
                parts.append(packed * _column(self.fold, packed))
        return torch.cat([part.reshape(-1) for part in parts])

    def sobolev_gradient(self, gradient: DiscreteParameters) -> DiscreteParameters:
        """The Riesz representer g of dJ in the inner product of R_L (p = 2): <g, h> = dJ(h) for every direction h.

        Args:
            gradient: the partial derivatives of J by the entries of Theta (as autograd or `adjoint` give them).
        """
        values = {}
        for name, u in gradient.items():
            if name in ONE_INDEX:
                spectrum = torch.tensordot(self.C, u, 1)
                values[name] = torch.tensordot(self.C, spectrum / _column(self.one, u), ([0], [0]))
            else:
                # An off-diagonal entry stands for two of the square, so its derivative is shared between them.
                square = self._transform(unpack(u / _column(self.fold**2, u), self.layers), self.C)
                values[name] = pack(self._transform(square / _column(self.two, square, 2), self.C.T))
        return DiscreteParameters(**values)

    def smooth_start(self, generator: torch.Generator, amplitude: float, modes: int = 4) -> Tensor:
        """Random coordinates in the lowest cosine modes only: a start that means the same function at every L."""
        present = min(modes, self.layers)
        parts = []
        for name in NAMES:
            # The packed order puts the lowest modes first. All are drawn whatever L is, so that a seed is one function.
            count, kept = (modes, present) if name in ONE_INDEX else (triangle_size(modes), triangle_size(present))
            u = torch.zeros(self.shapes[name], dtype=self.C.dtype)
            u[:kept] = torch.randn(count, *u.shape[1:], generator=generator, dtype=u.dtype)[:kept]
            parts.append(u.reshape(-1) * amplitude)
        return torch.cat(parts).to(self.C.device)

    @staticmethod
    def _transform(square: Tensor, matrix: Tensor) -> Tensor:
        once = torch.tensordot(matrix, square, 1)
        return torch.tensordot(matrix, once.transpose(0, 1), 1).transpose(0, 1)


def sobolev_gradient(parameters: DiscreteParameters, gradient: DiscreteParameters) -> DiscreteParameters:
    """`SobolevPreconditioner.sobolev_gradient` for one gradient."""
    return SobolevPreconditioner.of(parameters).sobolev_gradient(gradient)


def _column(weights: Tensor, like: Tensor, leading: int = 1) -> Tensor:
    return weights.reshape(*weights.shape, *([1] * (like.ndim - leading)))
