"""nonlocal_attention: validate -> select -> autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import _backend
from ..._autograd import autocast, autocasts, differentiable, recorded, transformed
from ..._checks import (
    KERNELS,
    check_choice,
    check_number,
    check_positive,
    check_shape,
    check_tensor,
    fail,
    shape,
)
from . import reference, tiled
from .dot import dot_attention
from .reference import Config

OP = "nonlocal_attention"
LAYOUTS = ("tokens", "channels_first")
TRITON_WIDTH = 256  # of the widest tile


def _triton_limit(width: int, value_width: int) -> str | None:
    if width <= TRITON_WIDTH and value_width <= TRITON_WIDTH:
        return None
    return f"takes widths D and E up to {TRITON_WIDTH}, not {width} and {value_width}"


_backend.declare(OP, cpu=_backend.CPU, triton=_backend.TRITON._replace(limit=_triton_limit))


def nonlocal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: str = "softmax",
    scale: float | None = None,
    bandwidth: float | Tensor | None = None,
    normalize: bool = True,
    causal: bool = False,
    key_mask: Tensor | None = None,
    layout: str = "tokens",
    backend: str | None = None,
) -> Tensor:
    """out_i = (1/Z_i) sum_j w(q_i, k_j) v_j, Z_i = sum_j w(q_i, k_j), or Z_i = 1 with normalize=False.

    kernel    | w(q, k)                              | Z_i with normalize=True
    softmax   | exp(scale q.k)                       | sum_j w
    gaussian  | exp(-|q - k|^2 / (2 bandwidth^2))    | sum_j w
    dot       | q.k                                  | the number of keys that query i sees
    local     | 1 where i = j, else 0 (needs N = M)  | 1: out = value

    A query that sees no key gets zeros and zero gradients. The N x M weights are never stored, except by the reference
    backend. Non-finite keys or values reach the queries that see them, no others.

    Args:
        query: [B, h, N, D] ("tokens") or [B, h, D, N] ("channels_first"); any strides.
        key: [B, h, M, D] or [B, h, D, M], dtype and device of query.
        value: [B, h, M, E] or [B, h, E, M], dtype and device of query.
        kernel: "softmax", "gaussian", "dot" or "local".
        scale: of softmax only; default D^-1/2.
        bandwidth: of gaussian only: a number > 0, or a (learnable) tensor of shape [] or [h] of any floating dtype;
            default 1. A bandwidth far below the distances that the dtype resolves leaves the nearest key.
        normalize: divide by Z_i. Without it, softmax weights overflow where scale q.k exceeds the dtype's range (about
            88 in float32); Gaussian weights never do, and are exactly zero far away.
        causal: query i sees the keys j <= i, counted from the first of each, also where N != M.
        key_mask: bool [B, M], True for the keys that are seen.
        layout: "tokens" or "channels_first", of all tensors and of the result.
        backend: None (the best), "reference", "cpu", "triton" or "cuda".

    Returns:
        [B, h, N, E] or [B, h, E, N], contiguous, in query's dtype. Half types accumulate in float32.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value, named in the message.

    Source: DNL section 2, the non-local operator; Wang et al. 2018, eq. (1).
    """
    if kernel not in KERNELS or layout not in LAYOUTS:
        check_choice(OP, "kernel", kernel, KERNELS)
        check_choice(OP, "layout", layout, LAYOUTS)
    check_tensor(OP, "query", query)
    if torch._C._is_any_autocast_enabled() and autocasts(query.device.type):
        query, key, value = autocast(query, check_tensor(OP, "key", key), check_tensor(OP, "value", value))  # type: ignore[assignment]
    check_tensor(OP, "key", key, query, "query")
    check_tensor(OP, "value", value, query, "query")
    channels_first = layout == "channels_first"
    heads, width = _check_shapes(query, key, value, kernel, channels_first)
    if key_mask is not None:
        _check_mask(key_mask, key, channels_first)
    width_scale = width**-0.5 if scale is None else _check_scale(scale, kernel)
    if bandwidth is not None or kernel == "gaussian":
        bandwidth = _check_bandwidth(bandwidth, kernel, query, heads)
    if (
        backend is None and kernel == "softmax" and normalize and not causal and key_mask is None and not channels_first
        and _is_of_torch(query, key, value)
    ):  # fmt: skip
        return F.scaled_dot_product_attention(query, key, value, scale=width_scale)
    value_width = value.shape[2 if channels_first else 3]
    chosen = _backend.select(OP, backend, query, width=width, value_width=value_width)
    config = Config(kernel, width_scale, bool(normalize), bool(causal), channels_first, chosen)
    if kernel == "local":
        return _local(value, key_mask, channels_first)
    if chosen == "reference":
        return reference.nonlocal_attention(query, key, value, bandwidth, key_mask, config)
    if kernel == "dot":
        q, k, v = (t.mT if channels_first else t for t in (query, key, value))
        out = dot_attention(q, k, v, key_mask, config.normalize, config.causal)
        return out.mT.contiguous() if channels_first else out.contiguous()
    return _function(config, query, key, value, bandwidth, key_mask)


def _is_of_torch(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the call of PyTorch's own attention is the shorter one. Without derivatives: it has no second ones."""
    keys = key.numel()
    if not _backend.few(query.numel() + 2 * keys, query) or keys == 0:
        return False
    return not recorded((query, key, value)) and not transformed()


def _check_shapes(query, key, value, kernel, channels_first) -> tuple[int, int]:
    """The number of heads, and D."""
    position, feature = (3, 2) if channels_first else (2, 3)
    q, k, v = query.shape, key.shape, value.shape
    if len(q) == len(k) == len(v) == 4 and q[:2] == k[:2] == v[:2] and 0 < q[feature] == k[feature]:
        if k[position] == v[position] and (kernel != "local" or q[position] == k[position]):
            return q[1], q[feature]
    names = ("B, h, D, N", "B, h, D, M", "B, h, E, M") if channels_first else ("B, h, N, D", "B, h, M, D", "B, h, M, E")
    for name, t, meaning in zip(("query", "key", "value"), (query, key, value), names, strict=True):
        if t.dim() != 4:
            fail(OP, name, shape(t), f"4 dimensions ({meaning})")
    (B, h), D, N, M, E = q[:2], q[feature], q[position], k[position], v[feature]
    if D == 0:
        fail(OP, "query", shape(query), "a width D of at least 1")
    check_shape(OP, "key", key, (B, h, D, M) if channels_first else (B, h, M, D), meaning=names[1])
    check_shape(OP, "value", value, (B, h, E, M) if channels_first else (B, h, M, E), meaning=names[2])
    fail(OP, "key", shape(key), f"as many positions as query, {N}, for kernel='local'")


def _check_mask(key_mask, key, channels_first) -> None:
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"{OP}: key_mask is of type {type(key_mask).__name__}; expected a bool tensor or None")
    if key_mask.dtype != torch.bool:
        raise TypeError(f"{OP}: key_mask is of {key_mask.dtype}; expected torch.bool")
    if key_mask.device != key.device:
        fail(OP, "key_mask", f"on {key_mask.device}", f"{key.device}, as query")
    check_shape(OP, "key_mask", key_mask, (key.shape[0], key.shape[3 if channels_first else 2]), meaning="B, M")


def _check_scale(scale, kernel) -> float:
    check_number(OP, "scale", scale)
    if kernel != "softmax":
        fail(OP, "scale", scale, f"None for kernel='{kernel}'")
    return float(scale)


def _check_bandwidth(bandwidth, kernel, query, heads) -> Tensor | None:
    """[h], in the dtype that is computed in, for kernel='gaussian'."""
    if kernel != "gaussian":
        if bandwidth is not None:
            fail(OP, "bandwidth", "given", f"None for kernel='{kernel}'")
        return None
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not isinstance(bandwidth, Tensor):
        if bandwidth is not None:
            check_positive(OP, "bandwidth", bandwidth)
        return torch.full((heads,), 1.0 if bandwidth is None else bandwidth, dtype=wide, device=query.device)
    check_tensor(OP, "bandwidth", bandwidth)
    if bandwidth.device != query.device:
        fail(OP, "bandwidth", f"on {bandwidth.device}", f"{query.device}, as query")
    check_shape(OP, "bandwidth", bandwidth, (), (heads,), meaning="a number, or one for each head")
    # Elsewhere the check would wait for a device, break a trace, or meet a batch of answers.
    looked_at = bandwidth.device.type == "cpu" and not torch.compiler.is_compiling() and not _backend.decomposes()
    if looked_at and bool((bandwidth <= 0).any()):
        fail(OP, "bandwidth", bandwidth.detach().tolist(), "numbers > 0")
    return bandwidth.to(wide).expand(heads)


def _local(value: Tensor, key_mask: Tensor | None, channels_first: bool) -> Tensor:
    if key_mask is None:
        return value.contiguous()
    return torch.where(key_mask[:, None, None, :] if channels_first else key_mask[:, None, :, None], value, 0)


def _forward(config, tensors):
    run = _backend.kernel(config.backend, "nonlocal_attention_fwd")
    return run(*tensors, config.scale, config.normalize, config.causal, config.channels_first)


def _backward(config, doutput, tensors, extra, needs):
    run = _backend.kernel(config.backend, "nonlocal_attention_bwd")
    static = (config.scale, config.normalize, config.causal, config.channels_first)
    *gradients, dbandwidth = run(doutput, *tensors, *extra, *static, needs[3])
    return *gradients, dbandwidth, None


_function = differentiable(_forward, _backward, vjp=tiled.vjp, jvp=tiled.jvp, keep_output=True)
