"""Meaning of nonlocal_attention: eager PyTorch, any device, any floating dtype; it forms the N x M weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Config(NamedTuple):
    """Static part of a call. scale is that of softmax. channels_first: tensors are [B, h, C, N], else [B, h, N, C]."""

    kernel: str
    scale: float
    normalize: bool
    causal: bool
    channels_first: bool
    backend: str


def nonlocal_attention(query, key, value, bandwidth, key_mask, config: Config, first_query: int = 0) -> Tensor:
    """out_i = (1/Z_i) sum_j w(q_i, k_j) v_j; half types accumulate in float32. The queries may be a tile: the first of
    them is number `first_query`, which the causal mask counts from."""
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    q, k, v = ((t.mT if config.channels_first else t).to(wide) for t in (query, key, value))
    allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    if config.causal:
        allowed = allowed.tril(first_query)  # query i sees the keys j <= i
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
        k, v = (torch.where(key_mask[:, None, :, None], t, 0) for t in (k, v))  # a masked NaN is no NaN
    w = weights(q, k, bandwidth, allowed, key_mask, config)
    return (w @ v).mT.to(value.dtype).contiguous() if config.channels_first else (w @ v).to(value.dtype)


def weights(q, k, bandwidth, allowed, key_mask, config: Config) -> Tensor:
    """w(q_i, k_j) / Z_i, [B, h, N, M]; rows without an allowed key are zero."""
    if config.kernel == "dot":
        count = allowed.sum(-1, keepdim=True).clamp(min=1) if config.normalize else 1
        return (q @ k.mT).masked_fill(~allowed, 0) / count
    if config.kernel == "softmax":
        exponent = config.scale * (q @ k.mT)
    else:
        variance = bandwidth.to(q.dtype).square()[:, None, None]
        if not config.normalize:
            exponent = (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1) / (-2 * variance)
        else:  # -|q - k|^2 / 2 = q.k - |k|^2 / 2 + a constant of the row, with less cancellation after centring
            centre = mean_key(k, key_mask)
            q, k = q - centre, k - centre
            exponent = (q @ k.mT - k.square().sum(-1)[..., None, :] / 2) / variance
    if not config.normalize:
        return exponent.exp().masked_fill(~allowed, 0)
    lowest = torch.finfo(q.dtype).min  # not -inf: rows without keys have neutral gradients
    return exponent.masked_fill(~allowed, lowest).softmax(-1).masked_fill(~allowed, 0)


def mean_key(k: Tensor, key_mask: Tensor | None) -> Tensor:
    """Mean over the finite coordinates of the allowed keys, [B, h, 1, D]; the result does not depend on it."""
    usable = k.isfinite() if key_mask is None else k.isfinite() & key_mask[:, None, :, None]
    total = torch.where(usable, k, 0).sum(-2, keepdim=True)
    return (total / usable.sum(-2, keepdim=True).clamp(min=1)).detach()
