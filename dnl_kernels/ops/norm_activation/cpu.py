"""norm_activation as one autograd node on the CPU, in passes of csrc/norm_activation: the input is all that is kept,
pooled results are all that is written, and the statistics of the batch are known to the caller."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import differentiable
from . import reference


class Config(NamedTuple):
    activation: str
    pool: str | None
    eps: float
    measures: bool


def limit(x: Tensor, mean: Tensor | None, pool: str | None = None) -> str | None:
    """Why this implementation cannot run the call, or None. mean, pool: as in `norm_activation`."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.dim() != 4:
        return "norm_activation takes float32 or float64 images on the CPU"
    if mean is None and x.numel() <= x.shape[1]:
        return "statistics need more than one number per channel"
    if pool == "floor" and min(x.shape[2:]) < 2:
        return "nothing would be left of the images"
    if torch.compiler.is_compiling():
        return "a compiler fuses the reference itself"
    if _backend.decomposes():
        return "a transform of torch.func is for PyTorch's own operators"
    return _backend.absence("cpu")


def norm_activation(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, activation: str,
    pool: str | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """z = act(weight * (x - mean) / sqrt(var + eps) + bias), pooled or not, and mean and var.

    x: [B, C, H, W], float32 or float64, any strides. weight, bias: [C] or None (1 and 0). mean, var: [C], constants,
    or both None: those of x, var biased. pool: see the reference. Returns z [B, C, H or H / 2, W or W / 2],
    differentiable in x, weight and bias to any order, and mean and var [C], which are not. `limit` says what it does
    not take.
    """
    return _function(Config(activation, pool, eps, mean is None), x, weight, bias, mean, var)


def _folded(config: Config, weight, bias, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scale, shift and 1 / sqrt(var + eps)"""
    rate = torch.rsqrt(var + config.eps)
    scale = rate if weight is None else rate * weight
    return scale, -mean * scale if bias is None else bias - mean * scale, rate


def _forward(config: Config, tensors):
    x, weight, bias, mean, var = tensors
    ops: Any = torch.ops.dnl
    x = x.contiguous()
    if config.measures:
        mean, var = ops.norm_activation_moments(x)
    scale, shift, _ = _folded(config, weight, bias, mean, var)
    size = [(n + (config.pool == "ceil")) // 2 for n in x.shape[2:]] if config.pool else x.shape[2:]
    out = x.new_empty(*x.shape[:2], *size)
    ops.norm_activation_fwd(x, scale, shift, config.activation, out, config.pool is not None)
    return (out, mean, var) if config.measures else (out, mean.clone(), var.clone())


def _backward(config: Config, dout, tensors, extra, needs):
    x, weight, bias, *_ = tensors
    mean, var = extra
    ops: Any = torch.ops.dnl
    scale, shift, rate = _folded(config, weight, bias, mean, var)
    x, dx = x.contiguous(), x.new_empty(x.shape)
    plain, moment = ops.norm_activation_pull(
        dout.contiguous(), x, scale, shift, mean, config.activation, False, dx, config.pool is not None
    )
    dgamma = moment * rate
    if config.measures:
        share = -scale * (x.shape[1] / max(x.numel(), 1))
        ops.norm_activation_correct(x, share * rate * dgamma, mean, share * plain, dx)
    return dx, dgamma, plain, None, None


def _reference(config: Config, tensors):
    x, weight, bias, mean, var = tensors
    return reference.norm_activation(x, weight, bias, mean, var, config.activation, config.pool, config.eps)


_function = differentiable(_forward, _backward, _reference, return_extra=True)
