"""dnl_layer from the operators that it consists of: an accumulation, a non-local operator, a pointwise end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _backend
from ..dense_conv2d.api import dense_conv2d
from ..dense_linear.api import dense_linear
from ..nonlocal_attention.api import nonlocal_attention
from . import projected
from .config import LayerConfig, NonLocalParameters
from .pointwise import normalise_activate


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


def non_local(y: Tensor, theta: NonLocalParameters, kernel: str, heads: int, backend: str | None) -> Tensor:
    """N(y; theta): one function where kernels run, its parts where a compiler or a transform looks inside."""
    if kernel == "local":
        return y
    if kernel != "dot" and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        assert theta.query_weight is not None and theta.value_weight is not None
        widths = (weight.shape[0] // heads for weight in (theta.query_weight, theta.value_weight))
        facts = dict(zip(("width", "value_width"), widths, strict=True))
        chosen = _backend.select("nonlocal_attention", backend, y, **facts)
        if chosen != "reference" and y.device.type != "meta":
            return projected.non_local(y, theta, projected.Config(kernel, heads, y.dim() == 4, chosen))
    return composed_non_local(y, theta, kernel, heads, backend)


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


def dnl_layer(
    states: Sequence[Tensor],
    affine_weight: Tensor,
    affine_bias: Tensor | None,
    theta: NonLocalParameters,
    norm: tuple[Tensor | None, Tensor | None],
    output_norm: tuple[Tensor | None, Tensor | None],
    skip: tuple[Tensor, Tensor, Tensor | None] | None,
    config: LayerConfig,
    backend: str | None,
) -> Tensor:
    prologue = {"norm_scale": norm[0], "norm_shift": norm[1], "activation": config.input_activation}
    if skip is None and folds(affine_weight, theta, config, backend):
        z = non_local_of_affine(
            states, affine_weight, affine_bias, theta, config, backend, scale=config.tau, **prologue
        )
    else:
        y = affine(states, affine_weight, affine_bias, scale=config.tau, backend=backend, **prologue)
        if skip is not None:
            y = y + affine([skip[0]], skip[1], skip[2], backend=backend)
        z = non_local(y, theta, config.kernel, config.heads, backend)
        z = z + y if config.residual else z
    return normalise_activate(z, *output_norm, config.activation, 1 if affine_weight.dim() == 4 else -1)
