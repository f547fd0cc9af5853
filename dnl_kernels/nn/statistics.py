"""Normalisations whose running statistics count every forward pass once."""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call

from .._autograd import recomputes


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x); where activation checkpointing computes it again for a backward pass, with copies of its buffers, so
    that running statistics are not updated a second time."""
    if norm.training and recomputes():
        return functional_call(norm, {name: buffer.clone() for name, buffer in norm.named_buffers()}, (x,))
    return norm(x)
