"""Other ways of writing the references' formulas, equal in exact arithmetic, whose terms kernels may add up instead.

Rounding belongs to the terms that are added, and a non-local operator can be written in several ways:

- rows are divided by their sum before the values are added up, or after; the gradient of a row's sum then is a sum over
  keys, or the product of the output and its gradient (Dao et al. 2022, "FlashAttention", appendix B);
- a Gaussian's exponents are squared distances, or products around a centre of the keys, and those of a softmax are
  products with the keys or around their centre (the offset is that of a row): their gradients are sums over
  (k_j - q_i), k_j or (k_j - centre);
- a dot product's weights meet the keys or the values first.

And a block's 3x3 convolutions are sums over the taps, or products of polynomials in four rows at a time, evaluated at
0, +-3/4, +-3/2 and infinity (csrc/dnl_block/params.h; Lavin and Gray 2016, "Fast algorithms for convolutional neural
networks"), whose sums also have the terms that cancel; those of a bottleneck are such products along both axes, of
2 x 2 pixels at 0, +-1 and infinity (csrc/dnl_bottleneck/params.h).

`dnl_kernels.testing.budget` runs all of them, and a bound is the largest one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.dnl_block import reference as block
from ..ops.dnl_layer import reference as layer
from ..ops.nonlocal_attention import reference as plain


def _exponents(q, k, bandwidth, key_mask, config, second: bool, generator: torch.Generator) -> Tensor:
    if config.kernel == "softmax":
        if second:  # any centre between zero and the mean, each coordinate its own
            k = k - plain.mean_key(k, key_mask) * torch.rand(k.shape[-1], generator=generator, dtype=k.dtype)
        return config.scale * (q @ k.mT)
    variance = bandwidth.square()[:, None, None]
    if second:
        return (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1) / (-2 * variance)
    centre = plain.mean_key(k, key_mask)
    q, k = q - centre, k - centre
    return (q @ k.mT - k.square().sum(-1)[..., None, :] / 2) / variance


def _attention(second: bool):
    generator = torch.Generator().manual_seed(0)

    def attention(query, key, value, bandwidth, key_mask, config, first_query=0) -> Tensor:
        q, k, v = (t.mT if config.channels_first else t for t in (query, key, value))
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
        allowed = allowed.tril(first_query) if config.causal else allowed
        if key_mask is not None:
            allowed = allowed & key_mask[:, None, None, :]
            k, v = (torch.where(key_mask[:, None, :, None], t, 0) for t in (k, v))
        if config.kernel == "dot":
            seen = allowed.sum(-1, keepdim=True).clamp(min=1) if config.normalize else 1
            out = q @ (k.mT @ v) / seen
        else:
            exponent = _exponents(q, k, bandwidth, key_mask, config, second, generator).masked_fill(
                ~allowed, float("-inf")
            )
            highest = exponent.detach().amax(-1, keepdim=True)
            w = (exponent - torch.where(highest.isfinite(), highest, 0)).exp()
            sees = allowed.any(-1, keepdim=True)
            out = (w @ v) / torch.where(sees, w.sum(-1, keepdim=True), 1)
        return out.mT.contiguous() if config.channels_first else out

    return attention


def _non_local(second: bool):
    attention = _attention(second)

    def non_local(y, theta, kernel, heads) -> Tensor:
        tokens = y.flatten(2).mT if y.dim() == 4 else y

        def project(weight, bias):  # [B, h, N, D]
            return F.linear(tokens, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)

        query, value = project(theta.query_weight, theta.query_bias), project(theta.value_weight, theta.value_bias)
        key = query if theta.key_weight is None else project(theta.key_weight, theta.key_bias)
        bandwidth = theta.rho.exp() if kernel == "gaussian" else None
        config = plain.Config(kernel, query.shape[-1] ** -0.5, True, False, False, "reference")
        out = attention(query, key, value, bandwidth, None, config).transpose(1, 2).flatten(2)
        out = F.linear(out, theta.output_weight, theta.output_bias)
        return out.mT.unflatten(2, y.shape[2:]) if y.dim() == 4 else out

    return non_local


A, B = 0.75, 1.5  # the points
FILTERS = [[64 / 81, 0, 0], [-128 / 243, -32 / 81, -8 / 27], [-128 / 243, 32 / 81, -8 / 27],
           [32 / 243, 16 / 81, 8 / 27], [32 / 243, -16 / 81, 8 / 27], [0, 0, 1]]  # fmt: skip
P, S = A**2 * B**2, A**2 + B**2
ROWS = [[P, 0, -S, 0, 1, 0], [0, -A * B**2, -(B**2), A, 1, 0], [0, A * B**2, -(B**2), -A, 1, 0],
        [0, -B * A**2, -(A**2), B, 1, 0], [0, B * A**2, -(A**2), -B, 1, 0], [0, P, 0, -S, 0, 1]]  # fmt: skip
PRODUCTS = [
    [1, 1, 1, 1, 1, 0],
    [0, A, -A, B, -B, 0],
    [0, A**2, A**2, B**2, B**2, 0],
    [0, A**3, -(A**3), B**3, -(B**3), 1],
]


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0) -> Tensor:
    """scale * (W (*) x) + bias for 3x3 filters, four rows at a time."""
    height, groups = x.shape[2], -(-x.shape[2] // 4)
    filters, rows, products = (torch.tensor(m, dtype=x.dtype) for m in (FILTERS, ROWS, PRODUCTS))
    parts = F.pad(x, (0, 0, 1, 4 * groups - height + 1)).unfold(2, 6, 4) @ rows.mT  # [B, C, groups, W, 6]
    of_filters = torch.einsum("kr,dcrt->kdct", filters, weight)
    found = [F.conv2d(parts[..., k], of_filters[k][:, :, None], padding=(0, 1)) for k in range(6)]
    y = (torch.stack(found, -1) @ products.mT).movedim(-1, 3).flatten(2, 3)[:, :, :height]
    return scale * y if bias is None else scale * y + bias[:, None, None]


TILE = [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]
TILE_FILTERS = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
TILE_PRODUCTS = [[1, 1, 1, 0], [0, 1, -1, -1]]


def _by_tiles(x: Tensor, weight: Tensor, *_: None) -> Tensor:
    """W (*) x for 3x3 filters, 2 x 2 pixels at a time."""
    height, width = x.shape[2:]
    rows, columns = -(-height // 2), -(-width // 2)
    tile, filters, products = (torch.tensor(m, dtype=x.dtype) for m in (TILE, TILE_FILTERS, TILE_PRODUCTS))
    padded = F.pad(x, (1, 2 * columns - width + 1, 1, 2 * rows - height + 1))
    parts = (tile @ (padded.unfold(2, 4, 2).unfold(3, 4, 2) @ tile.mT)).flatten(4)  # [B, C, rows, columns, 16]
    of_filters = (filters @ (weight @ filters.mT)).flatten(2)
    found = [F.conv2d(parts[..., k], of_filters[..., k, None, None]) for k in range(16)]
    y = products @ (torch.stack(found, -1).unflatten(-1, (4, 4)) @ products.mT)  # [B, D, rows, columns, 2, 2]
    return y.transpose(3, 4).flatten(4).flatten(2, 3)[:, :, :height, :width]


def _of_bottleneck(x: Tensor, weight: Tensor, *others: object) -> bool:
    """Whether the reference asks for a bottleneck's 3x3 convolution, which has neither a bias nor a factor."""
    return x.numel() > 0 and weight.shape[2:] == (3, 3) and others == (None,)


def _of_attention(config, second: bool) -> bool:
    """Whether there is such another way."""
    return not config.causal and not second if config.kernel == "dot" else config.normalize


def _of_layer(kernel: str, second: bool) -> bool:
    return kernel in ("softmax", "gaussian") or (kernel == "dot" and not second)


@contextlib.contextmanager
def another_formulation(second: bool) -> Iterator[list[str]]:
    """Where the references run inside, they add up the terms of the first or the second other formulation. Yields the
    names of what was replaced so far: none where there is no such other way."""
    used: list[str] = []

    def chosen(before: Callable, other: Callable, applies: Callable[..., bool]) -> Callable:
        def call(*given):
            if not applies(*given):
                return before(*given)
            used.append(before.__name__)
            return other(*given)

        return call

    non_local = chosen(
        layer.non_local, _non_local(second), lambda *given: given[0].numel() > 0 and _of_layer(given[2], second)
    )
    attention = chosen(
        plain.nonlocal_attention,
        _attention(second),
        lambda *given: given[1].numel() > 0 and _of_attention(given[5], second),
    )
    affine = chosen(
        block.affine, _by_rows, lambda *given: second and given[0].numel() > 0 and given[1].shape[2:] == (3, 3)
    )
    affine = chosen(affine, _by_tiles, lambda *given: not second and _of_bottleneck(*given))
    places = [(plain, "nonlocal_attention", attention), (layer, "non_local", non_local)]
    places += [(block, "non_local", non_local), (block, "affine", affine)]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, function in places:
        setattr(module, name, function)
    try:
        yield used
    finally:
        for (module, name, _), function in zip(places, before, strict=True):
            setattr(module, name, function)
