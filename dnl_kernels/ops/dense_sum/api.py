"""dense_sum: validate -> select -> autograd."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import autocasts, differentiable
from ..._checks import check_shape, check_states, check_states_alike, check_tensor, fail, shape
from . import reference

OP = "dense_sum"
CUDA_MAX_STATES = 256  # kDenseSumMaxStates


def _cuda_limit(count: int) -> str | None:
    return f"takes at most {CUDA_MAX_STATES} states, not {count}" if count > CUDA_MAX_STATES else None


_backend.declare(OP, cpu=_backend.CPU, triton=_backend.TRITON, cuda=_backend.CUDA._replace(limit=_cuda_limit))


class Config(NamedTuple):
    channel_dim: int
    backend: str


def dense_sum(states: Sequence[Tensor], weight: Tensor, *, channel_dim: int = -1, backend: str | None = None) -> Tensor:
    """y = sum_j w_j * x_j, the depth-weighted sum of J states.

    Args:
        states: J >= 1 tensors of one shape, dtype and device; any rank and strides.
        weight: [J], one number per state, or [J, C], one per state and channel; dtype and device of the states.
        channel_dim: the dimension of the states that weight's C refers to; unused for weight [J].
        backend: None (the best), "reference", "cpu", "triton" or "cuda".

    Returns:
        A tensor of the states' shape and dtype. Half types accumulate in float32. Autocast narrows nothing, and in its
        regions states of different dtypes meet in the widest.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, named in the message.

    Source: DNL Def. 1 with scalar or diagonal K; DenseFormer's depth-weighted average is the scalar case.
    """
    if torch._C._is_any_autocast_enabled() and autocasts(check_tensor(OP, "weight", weight).device.type):
        states, weight = _promoted(check_states(OP, states, mixed=True), weight)
    first, size = check_states_alike(OP, states)
    check_tensor(OP, "weight", weight, first, "states[0]")
    numbers = weight.shape
    if len(numbers) == 2:
        if not -first.dim() <= channel_dim < first.dim():
            fail(OP, "channel_dim", channel_dim, f"a dimension of states[0] {shape(first)}")
        channel_dim %= first.dim()
        check_shape(OP, "weight", weight, (len(states), size[channel_dim]), meaning="J, C")
    else:
        if len(numbers) != 1 or numbers[0] != len(states):
            check_shape(OP, "weight", weight, (len(states),), meaning="J")
        channel_dim = 0
    if backend is None and _backend.few(first.numel() * len(states), first):
        return _of_few(states, weight, channel_dim)
    chosen = _backend.select(OP, backend, first, count=len(states))
    if chosen == "reference":
        return reference.dense_sum(states, weight, channel_dim)
    return _function(Config(channel_dim, chosen), weight, *states)


def _of_few(states: Sequence[Tensor], weight: Tensor, channel_dim: int) -> Tensor:
    """The same of a few numbers, by as few of PyTorch's operators as there can be, which autograd records."""
    if weight.dim() == 2:
        weight = weight.reshape(*weight.shape, *(1,) * (states[0].dim() - channel_dim - 1))
    first, *weights = weight.unbind()
    y = states[0] * first
    for j, w in enumerate(weights, 1):
        y = torch.addcmul(y, states[j], w)
    return y


def _promoted(states: list[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    """In an autocast region PyTorch narrows no sum and no product with numbers: different dtypes meet in the widest, of
    which a single number of weight [J] changes none."""
    types = [state.dtype for state in states]
    if weight.dim() != 1 or states[0].dim() == 0:
        types.append(weight.dtype)
    dtype = functools.reduce(torch.promote_types, types)
    return [state.to(dtype) for state in states], weight.to(dtype)


def _forward(config, tensors):
    weight, *states = tensors
    return (_backend.kernel(config.backend, "dense_sum_fwd")(states, weight, config.channel_dim),)


def _backward(config, dy, tensors, extra, needs):
    weight, *states = tensors
    dstates, dweight = _backend.kernel(config.backend, "dense_sum_bwd")(
        dy, states, weight, config.channel_dim, any(needs[1:]), needs[0]
    )
    return dweight, *(dstates or [None] * len(states))


def _reference(config, tensors):
    weight, *states = tensors
    return reference.dense_sum(states, weight, config.channel_dim)


_function = differentiable(_forward, _backward, _reference)
