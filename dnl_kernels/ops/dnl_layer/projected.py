"""The non-local operator with its projections as one function: x = W_o concat_heads(attention(W_q y, W_k y, W_v y)).

What is kept for backward is y, the attention's output and two numbers per query: the projections, three times as large
as y, are computed again. The products belong to torch's GEMM, the attention to the kernels of nonlocal_attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import differentiable
from .config import NonLocalParameters
from .pointwise import wide


class Config(NamedTuple):
    kernel: str  # "softmax" or "gaussian"
    heads: int
    images: bool  # y is [B, G, H, W], else [B, N, G]
    backend: str  # of nonlocal_attention


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, images: bool) -> Tensor:
    """W x + b of x [B, C, N] (images) or [B, N, C], in the dtype of x; half types accumulate in float32."""
    if images:
        out = torch.bmm(wide(weight).expand(x.shape[0], -1, -1), wide(x))
        out = out if bias is None else out.add_(wide(bias)[:, None])
    else:
        out = wide(x) @ wide(weight).mT
        out = out if bias is None else out.add_(wide(bias))
    return out.to(x.dtype)


def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor, images: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, W and b, not yet narrowed to a half type."""
    dy, x, weight = wide(dy), wide(x), wide(weight)
    if images:
        return torch.bmm(weight.mT.expand(x.shape[0], -1, -1), dy), torch.bmm(dy, x.mT).sum(0), dy.sum((0, 2))
    return dy @ weight, dy.flatten(0, 1).mT @ x.flatten(0, 1), dy.sum((0, 1))


def split_heads(t: Tensor, config: Config) -> Tensor:
    """[B, h, D, N] of [B, h * D, N], or [B, h, N, D] of [B, N, h * D]: a view."""
    if config.images:
        return t.unflatten(1, (config.heads, -1))
    return t.unflatten(-1, (config.heads, -1)).transpose(1, 2)


def join_heads(t: Tensor, config: Config) -> Tensor:
    return t.flatten(1, 2) if config.images else t.transpose(1, 2).flatten(2)


def _attention_arguments(config: Config, x: Tensor, theta: NonLocalParameters):
    """The tensors of nonlocal_attention's kernels, and their static arguments."""

    def project(weight, bias):
        return split_heads(_linear(x, weight, bias, config.images), config)

    query = project(theta.query_weight, theta.query_bias)
    key = query if theta.key_weight is None else project(theta.key_weight, theta.key_bias)
    value = project(theta.value_weight, theta.value_bias)
    bandwidth = None if theta.rho is None else torch.exp(wide(theta.rho))
    width = query.shape[2 if config.images else 3]
    return (query, key, value, bandwidth, None), (width**-0.5, True, False, config.images)


def _positions(y: Tensor, config: Config) -> Tensor:
    return y.flatten(2) if config.images else y


def _forward(config: Config, tensors):
    y, theta = tensors[0], NonLocalParameters(*tensors[1:])
    arguments, static = _attention_arguments(config, _positions(y, config), theta)
    run = _backend.kernel(config.backend, "nonlocal_attention_fwd")
    out, shift, sum_ = run(*arguments, *static)
    assert theta.output_weight is not None
    x = _linear(join_heads(out, config), theta.output_weight, theta.output_bias, config.images)
    return (x.unflatten(2, y.shape[2:]) if config.images else x), out, shift, sum_


def _backward(config: Config, dx, tensors, extra, needs):
    y, theta = tensors[0], NonLocalParameters(*tensors[1:])
    out, shift, sum_ = extra
    x = _positions(y, config)
    assert theta.output_weight is not None
    dout, doutput_weight, doutput_bias = _linear_backward(
        _positions(dx, config), join_heads(out, config), theta.output_weight, config.images
    )
    arguments, static = _attention_arguments(config, x, theta)
    run = _backend.kernel(config.backend, "nonlocal_attention_bwd")
    dout = split_heads(dout.to(out.dtype), config)
    dquery, dkey, dvalue, dbandwidth = run(dout, *arguments, out, shift, sum_, *static, theta.rho is not None)
    found = {"output_weight": doutput_weight, "output_bias": doutput_bias}
    projections = {"query": dquery, "key": dkey, "value": dvalue}
    if theta.key_weight is None:
        projections = {"query": dquery + dkey, "value": dvalue}
    dy = None
    for name, gradient in projections.items():
        weight = getattr(theta, f"{name}_weight")
        part, found[f"{name}_weight"], found[f"{name}_bias"] = _linear_backward(
            join_heads(gradient, config), x, weight, config.images
        )
        dy = part if dy is None else dy.add_(part)
    assert dy is not None
    if theta.rho is not None:
        found["rho"] = dbandwidth * arguments[3]
    gradients = [
        found[name].to(t.dtype) if t is not None and name in found else None for name, t in theta._asdict().items()
    ]
    return dy.to(y.dtype).view(y.shape), *gradients


def _reference(config: Config, tensors):
    from .composition import composed_non_local

    theta = NonLocalParameters(*tensors[1:])
    return composed_non_local(tensors[0], theta, config.kernel, config.heads, None)


_function = differentiable(_forward, _backward, _reference)


def non_local(y: Tensor, theta: NonLocalParameters, config: Config) -> Tensor:
    return _function(config, y, *theta)
