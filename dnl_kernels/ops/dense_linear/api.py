"""dense_linear: validate -> select -> autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import affine_in_autocast, differentiable
from ..._checks import check_affine, check_states, check_vectors, fail, shape
from . import cpu, reference

OP = "dense_linear"
_backend.declare(OP, cpu=_backend.CPU, triton=_backend.TRITON)


class Config(NamedTuple):
    activation: str
    scale: float
    backend: str


def dense_linear(
    states: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    activation: str = "identity",
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """y = scale * sum_j act(norm_scale_j * x_j + norm_shift_j) W_j^T + bias, linear in J states.

    Nothing is concatenated, and only the states themselves are kept for backward, unless all of them are a few thousand
    numbers, for which a copy is cheaper.

    Args:
        states: J >= 1 tensors [..., C_j] of one dtype and device, alike in all but the last dimension; any strides.
        weight: [D, sum C_j], blocks in the order of the states.
        bias: [D] or None; it is not scaled.
        norm_scale, norm_shift: [sum C_j] or None (one and zero), a folded normalisation of the states.
        activation: "identity", "relu", "leaky_relu", "leaky_relu(0.2)" (any slope), "tanh", "gelu" or "silu",
            of the normalised states.
        scale: a number: the step tau, or 1.
        backend: None (the best), "reference", "cpu", "triton" or "cuda".

    Returns:
        [..., D], of the states' dtype. Half types accumulate in float32.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, or an unknown activation, named in the
        message.

    Source: DNL Def. 1 (the affine map of several states), DNL (1) with K_{l,j} a matrix that acts on each token.
    """
    if torch._C._is_any_autocast_enabled():
        tensors = (states, weight, bias, norm_scale, norm_shift)
        y = affine_in_autocast(dense_linear, *tensors, activation=activation, scale=scale, backend=backend)
        if y is not None:
            return y
    states = check_states(OP, states)
    first, channels = states[0], 0
    check_affine(OP, first, weight, bias, norm_scale, norm_shift, activation, scale)
    rows = first.shape[:-1]
    for j, state in enumerate(states):
        size = state.shape
        if not size or size[:-1] != rows:
            fail(OP, f"states[{j}]", shape(state), f"{[*rows, 'C_j'] if size else '[..., C_0]'}, as states[0]")
        channels += size[-1]
    size = weight.shape
    if len(size) != 2 or size[1] != channels:
        fail(OP, "weight", shape(weight), f"[{size[0] if size else 'D'}, {channels}] (D, sum C_j)")
    check_vectors(OP, size[0], channels, bias, norm_scale, norm_shift)
    if backend is None and _backend.few(first.numel() * len(states) + weight.numel(), first):
        return cpu.of_few(states, weight, bias, norm_scale, norm_shift, activation, scale)
    chosen = _backend.select(OP, backend, first)
    if chosen == "reference":
        return reference.dense_linear(states, weight, bias, norm_scale, norm_shift, activation, scale)
    function = _function_cpu if chosen == "cpu" else _function
    return function(Config(activation, float(scale), chosen), weight, bias, norm_scale, norm_shift, *states)


def _forward(config, tensors):
    weight, bias, norm_scale, norm_shift, *states = tensors
    return (
        _backend.kernel(config.backend, "dense_linear_fwd")(
            states, weight, bias, norm_scale, norm_shift, config.activation, config.scale
        ),
    )


def _backward(config, dy, tensors, extra, needs):
    weight, _, norm_scale, norm_shift, *states = tensors
    dstates, dweight, dbias, dscale, dshift = _backend.kernel(config.backend, "dense_linear_bwd")(
        dy, states, weight, norm_scale, norm_shift, config.activation, config.scale,
        any(needs[4:]), needs[0], needs[1], needs[2] or needs[3],
    )  # fmt: skip
    return dweight, dbias, dscale, dshift, *(dstates or [None] * len(states))


def _reference(config, tensors):
    weight, bias, norm_scale, norm_shift, *states = tensors
    return reference.dense_linear(states, weight, bias, norm_scale, norm_shift, config.activation, config.scale)


_function_cpu = differentiable(cpu.forward, cpu.backward, _reference)
_function = differentiable(_forward, _backward, _reference)
