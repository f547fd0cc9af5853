"""Batch statistics of a channel, computed once when the channel is produced, and the normalisation they fold into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._autograd import differentiable
from ..dnl_layer.pointwise import broadcast, wide


def elements(x: Tensor, axis: int) -> int:
    """How many numbers a channel of x has."""
    return x.numel() // x.shape[axis] if x.shape[axis] else 0


def moments(x: Tensor, axis: int) -> Tensor:
    """[2, C]: mean and biased variance of each channel."""
    others = [d for d in range(x.dim()) if d != axis % x.dim()]
    count = max(elements(x, axis), 1)
    x = wide(x)
    mean = x.sum(others) / count
    return torch.stack([mean, (x - broadcast(mean, x, axis)).square().sum(others) / count])


def _backward(axis, dmoments, tensors, extra, needs):
    x, mean = tensors[0], extra[0]
    dmean, dvar = dmoments / max(elements(x, axis), 1)
    slope = 2 * dvar
    return [torch.addcmul(broadcast(dmean - slope * mean, x, axis), wide(x), broadcast(slope, x, axis)).to(x.dtype)]


def _forward(axis, tensors):
    found = moments(tensors[0], axis)
    return found, found[0].clone()


def _reference(axis, tensors):
    return moments(tensors[0], axis)


_function = differentiable(_forward, _backward, _reference)


def channel_statistics(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, in float32 at least; only x is kept. Zeros if x is empty."""
    mean, var = _function(axis, x)
    return mean, var


def fold(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Batch normalisation as scale * x + shift: scale = weight / sqrt(var + eps), shift = bias - mean * scale."""
    scale = torch.rsqrt(wide(var) + eps)
    scale = scale if weight is None else scale * weight
    return scale, -mean * scale if bias is None else bias - mean * scale


def gather(vector: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The parts of a vector over the channels of the states buffer that a layer reads, side by side."""
    parts = [vector[start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
