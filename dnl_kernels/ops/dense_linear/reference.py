"""Meaning of dense_linear: eager PyTorch, any device, any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._activations import activate


def dense_linear(
    states: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    norm_scale: Tensor | None,
    norm_shift: Tensor | None,
    activation: str,
    scale: float,
) -> Tensor:
    """y = scale * act(norm_scale * [x_0 .. x_{J-1}] + norm_shift) W^T + bias, [..] the concatenation."""
    x = torch.cat(list(states), dim=-1)
    if norm_scale is not None:
        x = x * norm_scale
    if norm_shift is not None:
        x = x + norm_shift
    y = scale * F.linear(activate(x, activation), weight)
    return y if bias is None else y + bias
