"""dense_linear as one matrix product per state: the products belong to torch's GEMM, and nothing is concatenated.

A state is normalised and activated on its way into the product and again in the backward pass, so the only tensors
kept are the states themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._activations import activate, activation_of


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.dtype == dtype else x.to(dtype)


def _parts(tensor: Tensor | None, blocks: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Any]:
    """The part of `tensor` that belongs to each block: slices of its last dimension."""
    if tensor is None:
        return [None] * len(blocks)
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return [tensor] if len(blocks) == 1 else tensor.split([x.shape[1] for x in blocks], dim=-1)


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None:
        return x if shift is None else x + shift
    return x * scale if shift is None else torch.addcmul(shift, x, scale)


def _accumulation_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def forward(config, tensors) -> tuple[Tensor]:
    weight, bias, norm_scale, norm_shift, *states = tensors
    dtype = _accumulation_dtype(weight)
    blocks = [_rows(x, dtype) for x in states]
    weights, scales, shifts = (_parts(t, blocks, dtype) for t in (weight, norm_scale, norm_shift))
    y: Any = None if bias is None else bias.to(dtype)
    for j, (x, w, s, t) in enumerate(zip(blocks, weights, scales, shifts, strict=True)):
        z = activate(_affine(x, s, t), config.activation)
        if j:
            y = y.addmm_(z, w.mT, alpha=config.scale)
        elif y is not None:
            y = torch.addmm(y, z, w.mT, alpha=config.scale)
        else:
            y = z @ w.mT if config.scale == 1 else torch.addmm(z.new_zeros(1), z, w.mT, alpha=config.scale)
    size = states[0].shape
    y = y if len(size) == 2 else y.view(*size[:-1], weight.shape[0])
    return (y if y.dtype == weight.dtype else y.to(weight.dtype),)


def backward(config, dy, tensors, extra, needs) -> list[Tensor | None]:
    weight, bias, norm_scale, norm_shift, *states = tensors
    need_weight, need_bias, need_scale, need_shift, *need_states = needs
    dtype = _accumulation_dtype(weight)
    dy = _rows(dy, dtype)
    gradient = activation_of(config.activation).gradient
    blocks = [_rows(x, dtype) for x in states]
    scaled = weight if config.scale == 1 else weight.to(dtype) * config.scale
    weights, scales, shifts = (_parts(t, blocks, dtype) for t in (scaled, norm_scale, norm_shift))
    dstates: list[Tensor | None] = []
    dweights, dscales, dshifts = [], [], []
    for x, need_state, w, s, t in zip(blocks, need_states, weights, scales, shifts, strict=True):
        pre = _affine(x, s, t)
        if need_weight:
            dweights.append(dy.mT @ activate(pre, config.activation))
        dx = None
        if need_state or need_scale or need_shift:
            dpre = gradient(dy @ w, pre)
            if need_shift:
                dshifts.append(dpre.sum(0))
            if need_scale:
                dscales.append((dpre * x).sum(0))
            dx = (dpre if s is None else dpre * s) if need_state else None
        dstates.append(dx)
    return [
        _joined(dweights).mul_(config.scale).to(weight.dtype) if need_weight else None,
        dy.sum(0).to(weight.dtype) if need_bias else None,
        _joined(dscales).to(weight.dtype) if need_scale else None,
        _joined(dshifts).to(weight.dtype) if need_shift else None,
        *(None if d is None else d.reshape(x.shape).to(x.dtype) for d, x in zip(dstates, states, strict=True)),
    ]


def of_few(
    states: Sequence[Tensor], weight: Tensor, bias: Tensor | None, norm_scale: Tensor | None,
    norm_shift: Tensor | None, activation: str, scale: float,
) -> Tensor:  # fmt: skip
    """The same of a few numbers, by as few of PyTorch's operators as there can be, which autograd records."""
    z = states[0] if len(states) == 1 else torch.cat(states, -1)  # type: ignore[arg-type]
    if norm_scale is not None or norm_shift is not None or activation != "identity":
        z = activate(_affine(z, norm_scale, norm_shift), activation)
    return F.linear(z, weight if scale == 1 else weight * scale, bias)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)
