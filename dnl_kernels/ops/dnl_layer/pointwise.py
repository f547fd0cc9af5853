"""sigma(scale * x + shift) with one number per channel, computed in float32 at least; only x is kept for backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._activations import activate, activation_of
from ..._autograd import differentiable


class Config(NamedTuple):
    activation: str
    axis: int  # of the channels


def broadcast(vector: Tensor, like: Tensor, axis: int) -> Tensor:
    """A vector over the channels, shaped to meet a tensor whose dimension `axis` they are."""
    return vector.reshape([-1 if d == axis % like.dim() else 1 for d in range(like.dim())])


def wide(x: Tensor) -> Tensor:
    """x in the dtype that sums and normalisations use."""
    return x if x.dtype == torch.float64 else x.float()


def _pre(x, scale, shift, axis):
    return torch.addcmul(broadcast(wide(shift), x, axis), wide(x), broadcast(wide(scale), x, axis))


def activate_normalised(x, scale: Tensor | None, shift: Tensor | None, activation: str, axis: int) -> Tensor:
    """sigma(scale * x + shift), not differentiable; scale and shift are both given or both None."""
    u = wide(x) if scale is None else _pre(x, scale, shift, axis)
    return activate(u, activation).to(x.dtype)


def pull_normalised(dy, x, scale: Tensor | None, shift: Tensor | None, activation: str, axis: int) -> Tensor:
    """The gradient of u = scale * x + shift, given that of sigma(u), in float32 at least."""
    u = wide(x) if scale is None else _pre(x, scale, shift, axis)
    return activation_of(activation).gradient(wide(dy), u)


def _reference(config, tensors):
    return activate_normalised(*tensors, *config)


def _forward(config, tensors):
    return (_reference(config, tensors),)


def backward(config, dy, tensors, extra, needs):
    x, scale, shift = tensors
    others = [d for d in range(x.dim()) if d != config.axis % x.dim()]
    dpre = pull_normalised(dy, *tensors, *config)
    return (
        (dpre * broadcast(wide(scale), x, config.axis)).to(x.dtype) if needs[0] else None,
        (dpre * x).sum(others).to(scale.dtype) if needs[1] else None,
        dpre.sum(others).to(shift.dtype) if needs[2] else None,
    )


_function = differentiable(_forward, backward, _reference)


def normalise_activate(x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str, axis: int) -> Tensor:
    """sigma(scale * x + shift) in the dtype of x; None means one and zero, and costs nothing where both are None."""
    if scale is None and shift is None:
        return activate(x, activation)
    scale = torch.ones_like(shift) if scale is None else scale  # type: ignore[arg-type]
    return _function(Config(activation, axis), x, scale, torch.zeros_like(scale) if shift is None else shift)
