"""Meaning of dense_conv2d: eager PyTorch, any device, any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._activations import activate


def dense_conv2d(
    states: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    norm_scale: Tensor | None,
    norm_shift: Tensor | None,
    activation: str,
    scale: float,
) -> Tensor:
    """y = scale * sum_j W_j (*) act(norm_scale x_j + norm_shift) + bias; half types compute in float32."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    x = torch.cat([state.to(dtype) for state in states], 1)
    if norm_scale is not None:
        x = x * norm_scale.to(dtype)[:, None, None]
    if norm_shift is not None:
        x = x + norm_shift.to(dtype)[:, None, None]
    y = scale * F.conv2d(activate(x, activation), weight.to(dtype), padding=weight.shape[-1] // 2)
    if bias is not None:
        y = y + bias.to(dtype)[:, None, None]
    return y.to(weight.dtype)
