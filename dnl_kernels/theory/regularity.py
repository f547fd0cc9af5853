"""How much like samples of curves a trained block's parameters are: R_L, and difference quotients in both indices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import WEIGHT, Triangle, check_block
from .parameters import DiscreteParameters
from .regularization import regularizer


@dataclass(frozen=True)
class DepthRegularity:
    """K^{l,j} of a block over the triangle of its layers l and states j, with its differences.

    Attributes:
        regularizer: R_L of eq. (5) with all weights 1, p = 4.
        size: |K^{l,j}| (Frobenius), [L, L], NaN above the diagonal and where there is no value.
        in_t: |K^{l+1,j} - K^{l,j}| / tau, [L, L]; the last row is NaN.
        in_s: |K^{l,j+1} - K^{l,j}| / tau, [L, L]; NaN at j = l.
    """

    regularizer: float
    size: Tensor
    in_t: Tensor
    in_s: Tensor

    @property
    def layers(self) -> int:
        return self.size.shape[0]

    @property
    def roughness(self) -> tuple[float, float]:
        """tau times the mean difference quotient over the mean size, in t and in s.

        O(tau) for samples of smooth curves; about sqrt(2), whatever L, for independent entries.
        """
        mean = torch.nanmean(self.size)
        return tuple((torch.nanmean(q) / mean / self.layers).item() for q in (self.in_t, self.in_s))  # type: ignore


def depth_regularity(source: Any) -> DepthRegularity:
    """The depth regularity of Theta or of a DNLBlock (of its K = L tau affine.weight).

    A block's column of the input (j = 0) belongs to the triangle only with an input skip and equal widths: elsewhere it
    is the forcing A(t_l), and NaN here.

    Args:
        source: DiscreteParameters, or a DNLBlock with one growth rate and connectivity="dense".

    Examples:
        >>> report = theory.depth_regularity(net.blocks[0])
        >>> report.roughness
        >>> dnl_kernels.experiments.regularity.draw(report, "block0.png")
    """
    if isinstance(source, DiscreteParameters):
        layers, base, packed = source.layers, 0, source.K
    else:
        config = check_block(source)
        layers = config.num_layers
        own = [{WEIGHT: dict(layer.named_parameters())[WEIGHT]} for layer in source.layers]
        triangle = Triangle(WEIGHT, own, config)
        base, packed = triangle.base, triangle.packed * (layers * config.tau)
    packed = packed.detach().double().flatten(1)
    rows, columns = torch.tril_indices(layers - base, layers - base)
    square = packed.new_full((layers, layers, packed.shape[1]), math.nan)
    square[rows + base, columns + base] = packed
    quotient = torch.full_like(square, math.nan)
    in_t, in_s = quotient.clone(), quotient
    in_t[:-1] = (square[1:] - square[:-1]) * layers
    in_s[:, :-1] = (square[:, 1:] - square[:, :-1]) * layers
    norms = [torch.linalg.vector_norm(values, dim=-1).cpu() for values in (square, in_t, in_s)]
    return DepthRegularity(regularizer(source).item(), *norms)
