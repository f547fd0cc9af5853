"""dense_linear as one matrix product per state: the products belong to torch's GEMM, and nothing is concatenated.

A state is normalised and activated on its way into the product and again in the backward pass, so the only tensors
kept are the states themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._activations import activate, activation_of
from ..._autograd import outside_autocast


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(dtype)


def _blocks(tensor: Tensor | None, states: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Any]:
    """The part of `tensor` that belongs to each state: slices of its last dimension."""
    if tensor is None:
        return iter([None] * len(states))
    return iter(tensor.to(dtype).split([x.shape[-1] for x in states], dim=-1))


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None:
        return x if shift is None else x + shift
    return x * scale if shift is None else torch.addcmul(shift, x, scale)


def _accumulation_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def forward(config, tensors) -> tuple[Tensor]:
    weight, bias, norm_scale, norm_shift, *states = tensors
    dtype = _accumulation_dtype(weight)
    wide = weight.to(dtype)
    parts = [_blocks(t, states, dtype) for t in (wide, norm_scale, norm_shift)]
    y = wide.new_zeros(1) if bias is None else bias.to(dtype)
    with outside_autocast(weight):
        for j, (x, w, s, t) in enumerate(zip(states, *parts, strict=True)):
            z = activate(_affine(_rows(x, dtype), s, t), config.activation)
            y = y.addmm_(z, w.mT, alpha=config.scale) if j else torch.addmm(y, z, w.mT, alpha=config.scale)
    return (y.to(weight.dtype).reshape(*states[0].shape[:-1], weight.shape[0]),)


def backward(config, dy, tensors, extra, needs) -> list[Tensor | None]:
    weight, bias, norm_scale, norm_shift, *states = tensors
    need_weight, need_bias, need_scale, need_shift, *need_states = needs
    dtype = _accumulation_dtype(weight)
    dy = _rows(dy, dtype)
    gradient = activation_of(config.activation).gradient
    scaled = weight.to(dtype) * config.scale
    parts = [_blocks(t, states, dtype) for t in (scaled, norm_scale, norm_shift)]
    dstates, dweights, dscales, dshifts = [], [], [], []
    for state, need_state, w, s, t in zip(states, need_states, *parts, strict=True):
        x = _rows(state, dtype)
        pre = _affine(x, s, t)
        if need_weight:
            dweights.append(dy.mT @ activate(pre, config.activation))
        if need_state or need_scale or need_shift:
            dpre = gradient(dy @ w, pre)
            if need_shift:
                dshifts.append(dpre.sum(0))
            if need_scale:
                dscales.append((dpre * x).sum(0))
            dx = dpre if s is None else dpre * s
            dstates.append(dx.reshape(state.shape).to(state.dtype) if need_state else None)
        else:
            dstates.append(None)
    return [
        torch.cat(dweights, 1).mul_(config.scale).to(weight.dtype) if need_weight else None,
        dy.sum(0).to(weight.dtype) if need_bias else None,
        torch.cat(dscales).to(weight.dtype) if need_scale else None,
        torch.cat(dshifts).to(weight.dtype) if need_shift else None,
        *dstates,
    ]
