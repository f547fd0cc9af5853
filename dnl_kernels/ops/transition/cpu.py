"""transition, norm_activation_max_pool and norm_activation_mean on the CPU, without gradients: csrc/transition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._kept import Kept

Norm = Sequence[Tensor | None]  # gamma, beta, mean, var


def limit(x: Tensor, tensors: Sequence[Tensor | None], ranks: Sequence[int] = (4,)) -> str | None:
    """Why these kernels cannot run a call with these tensors, or None. ranks: of x, that the kernel takes."""
    if x.device.type != "cpu" or x.dim() not in ranks or x.dtype not in (torch.float32, torch.float64):
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


def _folded(norm: Norm, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale, shift with norm(x) = scale * x + shift."""
    gamma, beta, mean, var = (None if t is None else t.double() for t in norm)
    assert mean is not None and var is not None
    scale = torch.rsqrt(var + eps) if gamma is None else gamma * torch.rsqrt(var + eps)
    shift = -mean * scale if beta is None else beta - mean * scale
    return scale.to(dtype), shift.to(dtype)


def norm_activation_max_pool(x: Tensor, norm: Norm, activation: str, eps: float, kept: Kept | None = None) -> Tensor:
    """Maxima over 3 x 3 pixels, 2 apart and padded by 1, of act(norm(x)): [B, C, H, W] -> [B, C, (H+1)/2, (W+1)/2].
    `kept` as for `transition`."""
    scale, shift = (kept or Kept()).get(norm, (eps, x.dtype), lambda: _folded(norm, eps, x.dtype))
    return torch.ops.dnl.norm_activation_max_pool.default(x, scale, shift, activation)


def norm_activation_mean(x: Tensor, norm: Norm, activation: str, eps: float, kept: Kept | None = None) -> Tensor:
    """The mean of act(norm(x)) over all positions: [B, C, N], [B, C, H, W] or [B, C, D, H, W] -> [B, C]."""
    scale, shift = (kept or Kept()).get(norm, (eps, x.dtype), lambda: _folded(norm, eps, x.dtype))
    images: Any = x if x.dim() == 4 else x.flatten(2).unsqueeze(2)
    return torch.ops.dnl.norm_activation_mean.default(images, scale, shift, activation)
