"""The non-local operator with its projections as one function: x = W_o concat_heads(attention(W_q y, W_k y, W_v y)).

What is kept for backward is y, the attention's output and two numbers per query: the projections, three times as large
as y, are computed again. On the CPU few channels with exponential weights go sample by sample through
csrc/dnl_layer/cpu.cpp; else the products belong to torch's GEMM, the attention to the kernels of nonlocal_attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import differentiable
from ..._ops import attends_in_groups
from .config import NonLocalParameters
from .non_local import composed_non_local
from .pointwise import wide


class Config(NamedTuple):
    kernel: str  # "softmax", "gaussian" or "dot"
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


def _linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: bool, images: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, W and, where there is one, b, not yet narrowed to a half type."""
    dy, x, weight = wide(dy), wide(x), wide(weight)
    if images:
        dbias = dy.sum((0, 2)) if bias else None
        return torch.bmm(weight.mT.expand(x.shape[0], -1, -1), dy), torch.bmm(dy, x.mT).sum(0), dbias
    return dy @ weight, dy.flatten(0, 1).mT @ x.flatten(0, 1), dy.sum((0, 1)) if bias else None


def split_heads(t: Tensor, config: Config) -> Tensor:
    """[B, h, D, N] of [B, h * D, N], or [B, h, N, D] of [B, N, h * D]: a view."""
    if config.images:
        return t.unflatten(1, (config.heads, -1))
    return t.unflatten(-1, (config.heads, -1)).transpose(1, 2)


def join_heads(t: Tensor, config: Config) -> Tensor:
    return t.flatten(1, 2) if config.images else t.transpose(1, 2).flatten(2)


def _names(theta: NonLocalParameters) -> list[str]:
    return ["query", "value"] if theta.key_weight is None else ["query", "key", "value"]


def _projection(theta: NonLocalParameters) -> tuple[Tensor, Tensor | None, list[int]]:
    """The matrices and biases of query, key (unless it is the query's) and value as one product, and their rows."""
    weights, biases = ([getattr(theta, f"{name}_{kind}") for name in _names(theta)] for kind in ("weight", "bias"))
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    return torch.cat(weights), bias, [len(w) for w in weights]


def _features(t: Tensor, sizes: list[int], config: Config) -> list[Tensor]:
    """Parts of [B, C, N] or [B, N, C] by heads: views."""
    return [split_heads(part, config) for part in t.split(sizes, 1 if config.images else 2)]


def _attention_arguments(config: Config, x: Tensor, theta: NonLocalParameters, projection):
    """The tensors of nonlocal_attention's kernels, and their static arguments."""
    weight, bias, sizes = projection
    query, *key, value = _features(_linear(x, weight, bias, config.images), sizes, config)
    bandwidth = None if theta.rho is None else torch.exp(wide(theta.rho))
    width = query.shape[2 if config.images else 3]
    return (query, key[0] if key else query, value, bandwidth, None), (width**-0.5, True, False, config.images)


def _attention_backward(config: Config, dout: Tensor, arguments, kept, static, shared: bool):
    """The gradient of the projections, side by side, and that of the bandwidth. shared: the key is the query."""
    query, key, value, bandwidth, _ = arguments
    out, *rows = kept
    axis = 1 if config.images else 2
    need = bandwidth is not None
    if config.kernel == "dot":
        (dquery, dkey, dvalue), dbandwidth = _dot_backward(dout, query, key, value, config), None
    else:
        run = _backend.kernel(config.backend, "nonlocal_attention_bwd")
        dquery, dkey, dvalue, dbandwidth = run(dout, *arguments, out, *rows, *static, need)
    found = [wide(dquery).add_(dkey), wide(dvalue)] if shared else [dquery, dkey, dvalue]
    return torch.cat([join_heads(t, config) for t in found], axis), dbandwidth


def _columns(t: Tensor, config: Config) -> Tensor:
    """[B, h, D, N] in the dtype that is computed in: a view where the heads are stored so."""
    return wide(t if config.images else t.mT)


def _dot(query: Tensor, key: Tensor, value: Tensor, config: Config) -> Tensor:
    """(k^T v)^T q / N: associative, hence two products (see nonlocal_attention/dot.py)."""
    q, k, v = (_columns(t, config) for t in (query, key, value))
    out = (v @ k.mT / max(k.shape[-1], 1)) @ q
    return (out if config.images else out.mT).to(query.dtype).contiguous()


def _dot_backward(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, config: Config):
    q, k, v, dout = (_columns(t, config) for t in (query, key, value, dout))
    share = 1 / max(k.shape[-1], 1)
    state, dstate = v @ k.mT * share, dout @ q.mT * share
    found = (state.mT @ dout, dstate.mT @ v, dstate @ k)
    return [g if config.images else g.mT for g in found]


def _positions(y: Tensor, config: Config) -> Tensor:
    return y.flatten(2) if config.images else y


def combine(config: Config, out: Tensor, theta: NonLocalParameters, like: Tensor) -> Tensor:
    """W_o concat_heads(out) + b_o, in the form of `like`."""
    assert theta.output_weight is not None
    if _fused(config, theta):  # which leaves the heads [B, h * E, N]
        x = _linear(out, theta.output_weight, theta.output_bias, True)
        return x.unflatten(2, like.shape[2:]) if config.images else x.mT
    x = _linear(join_heads(out, config), theta.output_weight, theta.output_bias, config.images)
    return x.unflatten(2, like.shape[2:]) if config.images else x


def _fused(config: Config, theta: NonLocalParameters) -> bool:
    assert theta.value_weight is not None
    return config.backend == "cpu" and attends_in_groups(config.kernel, theta.value_weight)


def _features_first(t: Tensor, config: Config) -> Tensor:
    """[B, C, N] of [B, C, H, W] or [B, N, C]; a view where t has its own positions' steps, as parts of a buffer do."""
    return t.flatten(2) if config.images else t.mT


def _fused_arguments(config: Config, theta: NonLocalParameters, residual: bool):
    weights, biases = ([getattr(theta, f"{name}_{kind}") for name in _names(theta)] for kind in ("weight", "bias"))
    bandwidth = None if theta.rho is None else torch.exp(wide(theta.rho))
    return weights, biases, theta.output_weight, theta.output_bias, bandwidth, config.heads, residual


def forward(
    config: Config, y: Tensor, theta: NonLocalParameters, out: Tensor | None = None, residual: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """N(y), or N(y) + y, in `out` where that is given, and what `backward` needs besides y: the attention's output, and
    two numbers per query unless "dot"."""
    if _fused(config, theta):
        assert theta.output_weight is not None
        if out is None:
            outputs = len(theta.output_weight)
            out = y.new_empty((len(y), outputs, *y.shape[2:]) if config.images else (*y.shape[:2], outputs))
        to = out.view(*out.shape[:2], out.shape[2] * out.shape[3]) if config.images else out.mT
        arguments = _fused_arguments(config, theta, residual)
        return out, list(torch.ops.dnl.dnl_layer_attend(_features_first(y, config), *arguments, to))
    arguments, static = _attention_arguments(config, _positions(y, config), theta, _projection(theta))
    if config.kernel == "dot":
        query, key, value = arguments[:3]
        kept = [_dot(query, key, value, config)]
    else:
        kept = list(_backend.kernel(config.backend, "nonlocal_attention_fwd")(*arguments, *static))
    x = combine(config, kept[0], theta, y)
    x = x.add_(y) if residual else x
    return x if out is None else out.copy_(x), kept


def _fused_backward(config: Config, dx: Tensor, y: Tensor, theta: NonLocalParameters, kept, residual: bool):
    arguments = _fused_arguments(config, theta, residual)
    bandwidth = arguments[4]
    dy = y.new_empty(y.shape, dtype=kept[1].dtype)
    dx, x, to = (_features_first(t, config) for t in (dx, y, dy))
    *maps, dweight, dbias, dbandwidth = torch.ops.dnl.dnl_layer_attend_pull(dx, x, *kept, *arguments, to)
    found: dict[str, Any] = {"output_weight": dweight, "output_bias": dbias}
    for kind, gradients in zip(("weight", "bias"), maps, strict=True):
        found |= {f"{name}_{kind}": gradient for name, gradient in zip(_names(theta), gradients, strict=True)}
    if bandwidth is not None:
        found["rho"] = dbandwidth * bandwidth
    return dy, found


def backward(
    config: Config, dx: Tensor, y: Tensor, theta: NonLocalParameters, kept, residual: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """The gradients of y, through N(y) or N(y) + y, and of what theta has, not yet narrowed to a half type."""
    if _fused(config, theta):
        return _fused_backward(config, dx, y, theta, kept, residual)
    x = _positions(y, config)
    assert theta.output_weight is not None
    dout, doutput_weight, doutput_bias = _linear_backward(
        _positions(dx, config), join_heads(kept[0], config), theta.output_weight, theta.output_bias is not None,
        config.images,
    )  # fmt: skip
    weight, bias, sizes = projection = _projection(theta)
    arguments, static = _attention_arguments(config, x, theta, projection)
    dout = split_heads(dout.to(kept[0].dtype), config)
    dproducts, dbandwidth = _attention_backward(config, dout, arguments, kept, static, theta.key_weight is None)
    bandwidth = arguments[3]
    del arguments, dout  # the largest tensors here
    dy, dweight, dbias = _linear_backward(dproducts, x, weight, bias is not None, config.images)
    found: dict[str, Any] = {"output_weight": doutput_weight, "output_bias": doutput_bias}
    for kind, gradient in (("weight", dweight), ("bias", dbias)):
        pieces = [None] * len(sizes) if gradient is None else [g.clone() for g in gradient.split(sizes)]
        found |= {f"{name}_{kind}": piece for name, piece in zip(_names(theta), pieces, strict=True)}
    if theta.rho is not None:
        found["rho"] = dbandwidth * bandwidth
    dy = dy.view(y.shape)
    return dy.add_(dx) if residual else dy, found


def _forward(config: Config, tensors):
    x, kept = forward(config, tensors[0], NonLocalParameters(*tensors[1:]))
    return x, *kept


def _backward(config: Config, dx, tensors, extra, needs):
    y, theta = tensors[0], NonLocalParameters(*tensors[1:])
    dy, found = backward(config, dx, y, theta, extra)
    gradients = [
        None if t is None or (gradient := found[name]) is None else gradient.to(t.dtype)
        for name, t in theta._asdict().items()
    ]
    return dy.to(y.dtype), *gradients


def _reference(config: Config, tensors):
    theta = NonLocalParameters(*tensors[1:])
    return composed_non_local(tensors[0], theta, config.kernel, config.heads, None)


_function = differentiable(_forward, _backward, _reference)


def non_local(y: Tensor, theta: NonLocalParameters, config: Config) -> Tensor:
    return _function(config, y, *theta)
