"""Meaning of dnl_layer: eager PyTorch, any device, any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._activations import activate
from .config import LayerConfig, NonLocalParameters


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0) -> Tensor:
    """scale * (W (*) x) + bias: a "same" convolution of [B, C, *spatial], a linear map of tokens [.., C]."""
    if weight.dim() > 2:
        convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
        y = scale * convolution(x, weight, padding=weight.shape[-1] // 2)
        return y if bias is None else y + bias.view(-1, *[1] * (weight.dim() - 2))
    y = scale * F.linear(x, weight)
    return y if bias is None else y + bias


def normalise(x: Tensor, scale: Tensor | None, shift: Tensor | None, axis: int) -> Tensor:
    """scale * x + shift, one number per channel."""
    x = x.movedim(axis, -1)
    x = x if scale is None else x * scale
    return (x if shift is None else x + shift).movedim(-1, axis)


def non_local(y: Tensor, theta: Any, kernel: str, heads: int) -> Tensor:
    """N(y; theta)_i = W_o concat_heads( (1 / Z_i) sum_j w(q_i, k_j) v_j ) for positions i, by the N x N matrix."""
    if kernel == "local":
        return y
    tokens = y.flatten(2).mT if y.dim() == 4 else y

    def project(weight, bias):  # [B, h, N, D]
        return F.linear(tokens, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)

    query = project(theta.query_weight, theta.query_bias)
    key = query if theta.key_weight is None else project(theta.key_weight, theta.key_bias)
    if kernel == "gaussian":
        log_weight = -(query.unsqueeze(-2) - key.unsqueeze(-3)).square().sum(-1) / 2
        weight = torch.softmax(log_weight * torch.exp(-2 * theta.rho)[:, None, None], -1)
    elif kernel == "softmax":
        weight = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1)
    else:
        weight = query @ key.mT / max(key.shape[-2], 1)
    out = (weight @ project(theta.value_weight, theta.value_bias)).transpose(1, 2).flatten(2)
    out = F.linear(out, theta.output_weight, theta.output_bias)
    return out.mT.unflatten(2, y.shape[2:]) if y.dim() == 4 else out


def dnl_layer(
    states: Sequence[Tensor],
    affine_weight: Tensor,
    affine_bias: Tensor | None,
    theta: NonLocalParameters,
    norm: tuple[Tensor | None, Tensor | None],
    output_norm: tuple[Tensor | None, Tensor | None],
    skip: tuple[Tensor, Tensor, Tensor | None] | None,
    config: LayerConfig,
) -> Tensor:
    """sigma(N(y)), y = tau * sum_j K_j sigma_in(norm(x_j)) + b [+ A x_s + a]."""
    axis = 1 if affine_weight.dim() == 4 else -1
    x = activate(normalise(torch.cat(list(states), axis), *norm, axis), config.input_activation)
    y = affine(x, affine_weight, affine_bias, config.tau)
    y = y if skip is None else y + affine(*skip)
    z = non_local(y, theta, config.kernel, config.heads)
    z = z + y if config.residual else z
    return activate(normalise(z, *output_norm, axis), config.activation)
