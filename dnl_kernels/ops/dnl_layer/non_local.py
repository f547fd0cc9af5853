"""N(y; theta) from the operators that it consists of: projections, attention and the output's map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dense_conv2d.api import dense_conv2d
from ..dense_linear.api import dense_linear
from ..nonlocal_attention.api import nonlocal_attention
from .config import NonLocalParameters


def affine(states: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    """The dense accumulation of images (weight [D, C, k, k]) or tokens (weight [D, C]); options: see dense_conv2d."""
    return (dense_conv2d if weight.dim() == 4 else dense_linear)(states, weight, bias, **options)


def _concatenated(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Several linear maps of one input as one; a missing bias is zero."""
    weight = torch.cat(list(weights))
    if all(bias is None for bias in biases):
        return weight, None
    pairs = zip(weights, biases, strict=True)
    return weight, torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in pairs])


def _names(theta: NonLocalParameters) -> list[str]:
    return ["query", "value"] if theta.key_weight is None else ["query", "key", "value"]


def _sizes(theta: NonLocalParameters) -> list[int]:
    return [getattr(theta, f"{name}_weight").shape[0] for name in _names(theta)]


def _projections(theta: NonLocalParameters) -> tuple[Tensor, Tensor | None]:
    """The matrices of query, key (unless it is the query's) and value as one."""
    weights, biases = ([getattr(theta, f"{name}_{kind}") for name in _names(theta)] for kind in ("weight", "bias"))
    return _concatenated(weights, biases)


def composed_non_local(y: Tensor, theta: NonLocalParameters, kernel: str, heads: int, backend: str | None) -> Tensor:
    """N(y; theta) for a kernel other than "local", from differentiable operators."""
    weight, bias = _projections(theta)
    products = affine([y], weight[:, :, None, None] if y.dim() == 4 else weight, bias, backend=backend)
    return _attend(products, theta, kernel, heads, backend)


def _attend(products: Tensor, theta: NonLocalParameters, kernel: str, heads: int, backend: str | None) -> Tensor:
    """N(y; theta) from the projections of y, side by side, which the attention reads where they lie."""
    images, sizes = products.dim() == 4, _sizes(theta)
    if images:
        parts = [p.unflatten(1, (heads, -1)) for p in products.flatten(2).split(sizes, 1)]  # [B, h, D, N]
    else:
        parts = [p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in products.split(sizes, -1)]  # [B, h, N, D]
    out = nonlocal_attention(
        parts[0],
        parts[-2],  # the query again where the two share a matrix
        parts[-1],
        kernel=kernel,
        bandwidth=None if theta.rho is None else torch.exp(theta.rho),
        layout="channels_first" if images else "tokens",
        backend=backend,
    )
    assert theta.output_weight is not None
    if images:
        weight, out = theta.output_weight[:, :, None, None], out.flatten(1, 2).unflatten(2, products.shape[2:])
    else:
        weight, out = theta.output_weight, out.transpose(1, 2).flatten(2)
    return affine([out], weight, theta.output_bias, backend=backend)


def folds(weight: Tensor, theta: NonLocalParameters, config, backend: str | None) -> bool:
    """Whether the projections of N are folded into the accumulation: y is then nowhere in memory.

    On a GPU, where bytes decide, and where the filter is 1x1, nothing else reads y, and the folded map is not much
    wider than K itself: sum_j (W_q K_j) x_j costs a product of the states with every row of W_q, W_k and W_v."""
    device = backend if backend is not None or weight.device.type != "cuda" else "triton"
    if device != "triton" or config.kernel == "local" or config.residual or weight.shape[2:].numel() != 1:
        return False
    return sum(_sizes(theta)) <= 2 * weight.shape[0]


def non_local_of_affine(
    states: Sequence[Tensor], weight: Tensor, bias: Tensor | None, theta: NonLocalParameters, config, backend, **options
) -> Tensor:
    """N(y; theta) with y = affine(states, weight, bias, **options), by the product of the two linear maps."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    projection, shift = _projections(theta)
    folded = projection.to(wide) @ weight.to(wide).flatten(1)
    folded = folded.to(weight.dtype).reshape(projection.shape[0], *weight.shape[1:])
    if bias is not None:
        moved = projection.to(wide) @ bias.to(wide)
        shift = (moved if shift is None else moved + shift).to(weight.dtype)
    products = affine(states, folded, shift, backend=backend, **options)
    return _attend(products, theta, config.kernel, config.heads, backend)
