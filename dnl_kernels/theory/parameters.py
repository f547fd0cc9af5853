"""Discrete parameters Theta of an L-layer network, eq. (2), their flip (Definition 2) and norm (3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._checks import check_count, check_shape, check_tensor
from .curves import NAMES
from .depth import TriangleHistory

ONE_INDEX = ("A", "a", "vartheta")
TWO_INDEX = ("K", "b")


def triangle_size(layers: int) -> int:
    return layers * (layers + 1) // 2


def pack(square: Tensor) -> Tensor:
    """The lower triangle of U [L, L, ...] row by row: [L (L + 1) / 2, ...]; row l starts at l (l + 1) / 2."""
    if square.ndim < 2 or square.shape[0] != square.shape[1]:
        raise ValueError(f"square must have shape [L, L, ...], got {list(square.shape)}")
    i, j = torch.tril_indices(square.shape[0], square.shape[0], device=square.device)
    return square[i, j]


def unpack(packed: Tensor, layers: int) -> Tensor:
    """The flipped square [L, L, ...] of a packed triangle: U^{l,j} = U^{j,l} = packed[l (l + 1) / 2 + j], j <= l."""
    check_count("layers", layers)
    if packed.shape[:1] != (triangle_size(layers),):
        raise ValueError(f"packed must have {triangle_size(layers)} rows for {layers} layers, got {packed.shape[0]}")
    i = torch.arange(layers, device=packed.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    return packed[high * (high + 1) // 2 + low]


def flip(U: Tensor) -> Tensor:
    """Uhat^{l,j} = U^{l,j} if l >= j, U^{j,l} if l < j.

    Values are copied, matrices are not transposed: U's entries live in an abstract vector space.

    Args:
        U: [L, L, ...]; only the lower triangle is read.

    Returns:
        The symmetric [L, L, ...].

    Source: DNL Def. 2 (the formula is a reconstruction from its description).
    """
    check_tensor("U", U)
    return unpack(pack(U), U.shape[0])


@dataclass(frozen=True)
class DiscreteParameters:
    """Theta = (A^l, a^l, vartheta^l)_{l < L}, (K^{l,j}, b^{l,j})_{j <= l < L}, with the two-index ones packed.

    Args:
        A: [L, d, d].   a: [L, d].   vartheta: [L, v], v = 0 where the layer map has no parameters.
        K: [L (L + 1) / 2, d, d], packed row by row (see `pack`).   b: [L (L + 1) / 2, d].

    Source: DNL (2). The packed form holds what the equation reads and nothing else.
    """

    A: Tensor
    a: Tensor
    K: Tensor
    b: Tensor
    vartheta: Tensor

    def __post_init__(self) -> None:
        for name in NAMES:
            check_tensor(name, getattr(self, name))
        check_shape("A", self.A, (None, None, None))
        layers, d, _ = self.A.shape
        if layers < 1:
            raise ValueError("A must hold at least one layer, got L = 0")
        size = triangle_size(layers)
        shapes = {"A": (layers, d, d), "a": (layers, d), "K": (size, d, d), "b": (size, d), "vartheta": (layers, None)}
        for name, shape in shapes.items():
            check_shape(name, getattr(self, name), shape)

    @classmethod
    def from_square(cls, A: Tensor, a: Tensor, K: Tensor, b: Tensor, vartheta: Tensor | None = None):
        """From K [L, L, d, d] and b [L, L, d] whose lower triangles are read."""
        vartheta = A.new_zeros(A.shape[0], 0) if vartheta is None else vartheta
        return cls(A, a, pack(K), pack(b), vartheta)

    @classmethod
    def zeros(cls, layers: int, dim: int, vartheta: int = 0, *, dtype=torch.float64, device=None):
        check_count("layers", layers)
        size, new = triangle_size(layers), {"dtype": dtype, "device": device}
        return cls(
            torch.zeros(layers, dim, dim, **new),
            torch.zeros(layers, dim, **new),
            torch.zeros(size, dim, dim, **new),
            torch.zeros(size, dim, **new),
            torch.zeros(layers, vartheta, **new),
        )

    @property
    def layers(self) -> int:
        return self.A.shape[0]

    @property
    def dim(self) -> int:
        return self.A.shape[1]

    @property
    def tau(self) -> float:
        return 1 / self.layers

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name in NAMES:
            yield name, getattr(self, name)

    def map(self, function: Callable[[Tensor], Tensor]) -> DiscreteParameters:
        """The same parameters with `function` applied to each tensor."""
        return replace(self, **{name: function(value) for name, value in self.items()})

    def zip_map(self, function: Callable[[Tensor, Tensor], Tensor], other: DiscreteParameters) -> DiscreteParameters:
        return replace(self, **{name: function(value, getattr(other, name)) for name, value in self.items()})

    def requires_grad_(self) -> DiscreteParameters:
        return self.map(lambda value: value.detach().clone().requires_grad_())

    def square(self, name: str) -> Tensor:
        """K or b as the flipped square [L, L, ...] of Def. 2."""
        return unpack(getattr(self, name), self.layers)

    def row(self, name: str, layer: int) -> Tensor:
        """K^{l,0..l} or b^{l,0..l}: a view [l + 1, ...]."""
        first = triangle_size(layer)
        return getattr(self, name)[first : first + layer + 1]

    def rows(self, name: str) -> tuple[Tensor, ...]:
        """All rows of K or b, cut once: the backward pass of one view per row would touch the whole triangle each."""
        return getattr(self, name).split(list(range(1, self.layers + 1)))

    def norm(self) -> Tensor:
        """||Theta|| = max of ||A^l||, |a^l|, ||K^{l,j}||, |b^{l,j}|, |vartheta^l|: spectral and Euclidean norms.

        Source: DNL (3), reconstructed (maximum instead of sum so that Lemma 2 is uniform in L).
        """
        return torch.stack(list(self.sup_norms().values())).max()

    def sup_norms(self) -> dict[str, Tensor]:
        """The maxima of eq. (3), one per parameter."""
        norms = {}
        for name, value in self.items():
            if name in ("A", "K"):
                norms[name] = torch.linalg.matrix_norm(value, 2).max()
            else:
                norms[name] = torch.linalg.vector_norm(value, dim=-1).max() if value.shape[-1] else value.new_zeros(())
        return norms

    def history(self) -> PackedHistory:
        return PackedHistory(self)


class PackedHistory(TriangleHistory):
    """sum_{j <= l} K^{l,j} x^j from the stored triangle: the dense recursion itself."""

    def __init__(self, parameters: DiscreteParameters):
        super().__init__(parameters.layers)
        self.parameters = parameters
        self.columns: tuple[Tensor, ...] | None = None

    def row(self, row: int, first: int, last: int) -> Tensor:
        return self.parameters.row("K", row)[first:last]

    def column(self, column: int) -> Tensor:
        if self.columns is None:
            K, layers = self.parameters.K, self.rows
            i, j = torch.triu_indices(layers, layers, device=K.device).flip(
                0
            )  # column by column: (j, j), (j + 1, j) ..
            self.columns = K.index_select(0, i * (i + 1) // 2 + j).split(list(range(layers, 0, -1)))
        return self.columns[column]
