"""Meaning of dense_sum: eager PyTorch, any device, any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_sum(states: Sequence[Tensor], weight: Tensor, channel_dim: int) -> Tensor:
    """y = sum_j w_j * x_j, w_j a number or one number per channel; half types accumulate in float32."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    shape = [1] * states[0].dim()
    if weight.dim() == 2:
        shape[channel_dim] = -1
    terms = (x.to(dtype) * w.to(dtype).reshape(shape) for x, w in zip(states, weight, strict=True))
    y = next(terms)
    for term in terms:
        y = y + term
    return y.to(states[0].dtype)
