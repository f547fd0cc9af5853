"""transition and norm_activation_max_pool on the CPU, without gradients: csrc/transition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._kept import Kept

Norm = Sequence[Tensor | None]  # gamma, beta, mean, var


def limit(x: Tensor, tensors: Sequence[Tensor | None]) -> str | None:
    """Why these kernels cannot run a call with these tensors, or None."""
    if x.device.type != "cpu" or x.dim() != 4 or x.dtype not in (torch.float32, torch.float64):
        return "the evaluated transition takes float32 or float64 images on the CPU"
    if any(t is not None and t.dtype != x.dtype for t in tensors):
        return "the evaluated transition has one dtype"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        return "the evaluated transition has no gradients"
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return "the evaluated transition is not traced"
    if torch.autograd.forward_ad._current_level >= 0:
        return "the evaluated transition has no tangents"
    return _backend.absence("cpu")


def pack(weight: Tensor, bias: Tensor | None, norm: Norm, eps: float) -> Tensor:
    """weight [D, C, 1, 1] and the normalisation as `evaluate` reads them."""
    return torch.ops.dnl.transition_pack.default(weight, bias, list(norm), eps)


def evaluate(x: Tensor, packed: Tensor, outputs: int, activation: str, pool: bool) -> Tensor:
    """[B, C, H, W] -> [B, D, H / 2, W / 2] (rounded down) or [B, D, H, W]."""
    return torch.ops.dnl.transition_eval.default(x, packed, outputs, activation, pool)


def transition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    activation: str,
    pool: bool,
    eps: float,
    kept: Kept | None = None,
) -> Tensor:
    """`evaluate` with packed weights, which `kept` keeps until a tensor changes. `limit` says what it does not take."""
    packed = (kept or Kept()).get((weight, bias, *norm), eps, lambda: pack(weight, bias, norm, eps))
    return evaluate(x, packed, weight.shape[0], activation, pool)


def norm_activation_max_pool(x: Tensor, norm: Norm, activation: str, eps: float) -> Tensor:
    """Maxima over 3 x 3 pixels, 2 apart and padded by 1, of act(norm(x)): [B, C, H, W] -> [B, C, (H+1)/2, (W+1)/2]."""
    ops: Any = torch.ops.dnl
    gamma, beta, mean, var = (None if t is None else t.double() for t in norm)
    assert mean is not None and var is not None
    scale = torch.rsqrt(var + eps) if gamma is None else gamma * torch.rsqrt(var + eps)
    shift = -mean * scale if beta is None else beta - mean * scale
    scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    return ops.norm_activation_max_pool(x, scale, shift, activation)
