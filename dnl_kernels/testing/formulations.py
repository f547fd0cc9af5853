"""Other ways of writing the references' formulas, equal in exact arithmetic, whose terms kernels may add up instead.

Rounding belongs to the terms that are added, and a non-local operator can be written in several ways:

- rows are divided by their sum before the values are added up, or after; the gradient of a row's sum then is a sum over
  keys, or the product of the output and its gradient (Dao et al. 2022, "FlashAttention", appendix B);
- a Gaussian's exponents are squared distances, or products around a centre of the keys, and those of a softmax are
  products with the keys or around their centre (the offset is that of a row): their gradients are sums over
  (k_j - q_i), k_j or (k_j - centre);
- a dot product's weights meet the keys or the values first.

And 3x3 convolutions are sums over the taps, or products of polynomials in four rows at a time, evaluated at 0, +-3/4,
+-3/2 and infinity (csrc/dnl_block/params.h), from 16 channels and outputs on in two columns as well, at 0, +-1 and
infinity (csrc/common/winograd.h; Lavin and Gray 2016, "Fast algorithms for convolutional neural networks"), whose sums
also have the terms that cancel; those without a bias, as in a bottleneck, in 2 x 2 pixels at 0, +-1 and infinity along
both axes (csrc/dnl_bottleneck/params.h).

`dnl_kernels.testing.budget` runs all of them, and a bound is the largest one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

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


A, B = 0.75, 1.5  # the points of rows, beside 0 and infinity
P, S = A**2 * B**2, A**2 + B**2
Form = tuple[list | None, list | None, list]  # transforms of the inputs, of the filters, of the products
FOUR: Form = (
    [[P, 0, -S, 0, 1, 0], [0, -A * B**2, -(B**2), A, 1, 0], [0, A * B**2, -(B**2), -A, 1, 0],
     [0, -B * A**2, -(A**2), B, 1, 0], [0, B * A**2, -(A**2), -B, 1, 0], [0, P, 0, -S, 0, 1]],
    [[64 / 81, 0, 0], [-128 / 243, -32 / 81, -8 / 27], [-128 / 243, 32 / 81, -8 / 27],
     [32 / 243, 16 / 81, 8 / 27], [32 / 243, -16 / 81, 8 / 27], [0, 0, 1]],
    [[1, 1, 1, 1, 1, 0], [0, A, -A, B, -B, 0], [0, A**2, A**2, B**2, B**2, 0], [0, A**3, -(A**3), B**3, -(B**3), 1]],
)  # fmt: skip
TWO: Form = (
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]],
    [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
    [[1, 1, 1, 0], [0, 1, -1, 1]],
)
ONE: Form = (None, None, [[1, 1, 1]])


def _along(axis: int, matrix: list | None, t: Tensor) -> Tensor:
    """The matrix times t's vectors along an axis; None: the identity."""
    if matrix is None:
        return t
    return torch.tensordot(t, torch.tensor(matrix, dtype=t.dtype), ([axis], [1])).movedim(-1, axis)


def _by_tiles(second: bool):
    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_, **__) -> Tensor:
        """W (*) x + bias for 3x3 filters, some rows and columns at a time."""
        wide = min(weight.shape[:2]) >= 16
        forms: list = [*enumerate((FOUR, TWO if wide else ONE) if second else (TWO, TWO))]
        height, width, (rows, columns) = *x.shape[2:], (len(form[2]) for _, form in forms)
        down, right = -(-height // rows), -(-width // columns)
        padded = F.pad(x, (1, right * columns - width + 1, 1, down * rows - height + 1))
        tiles = padded.unfold(2, rows + 2, rows).unfold(3, columns + 2, columns)
        tiles, filters = tiles.permute(4, 5, 1, 0, 2, 3).flatten(3), weight.permute(2, 3, 0, 1)
        for axis, (of_inputs, of_filters, _) in forms:
            tiles, filters = _along(axis, of_inputs, tiles), _along(axis, of_filters, filters)
        products = (filters.flatten(0, 1) @ tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])  # [., ., outputs, tiles]
        for axis, form in forms:
            products = _along(axis, form[2], products)
        # To [B, outputs, down, rows, right, columns].
        y = products.unflatten(3, (x.shape[0], down, right)).permute(3, 2, 4, 0, 5, 1)
        y = y.flatten(4).flatten(2, 3)[:, :, :height, :width]
        return y if bias is None else y + bias[:, None, None]

    return convolve


def _convolves(x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
    """Whether there is such a way: a "same" convolution of 3x3 pixels."""
    same = [stride in (1, (1, 1)), padding in (1, (1, 1)), dilation in (1, (1, 1)), groups == 1]
    return x.dim() == 4 and x.numel() > 0 and weight.shape[2:] == (3, 3) and all(same)


def _of_attention(config, second: bool) -> bool:
    """Whether there is such another way."""
    return not config.causal and not second if config.kernel == "dot" else config.normalize


def _of_layer(kernel: str, second: bool) -> bool:
    return kernel in ("softmax", "gaussian") or (kernel == "dot" and not second)


@contextlib.contextmanager
def another_formulation(second: bool) -> Iterator[list[str]]:
    """Where the references run inside, they add up the terms of the first or the second other formulation, whoever
    calls them: a function is replaced in every module that has imported it by its name. Yields the names of what was
    called instead so far: none where there is no such other way."""
    used: list[str] = []

    def chosen(before: Callable, other: Callable, applies: Callable[..., bool]) -> Callable:
        def call(*given, **words):
            if not applies(*given, **words):
                return before(*given, **words)
            used.append(before.__name__)
            return other(*given, **words)

        return call

    others: dict[Callable, tuple[Callable, Callable[..., bool]]] = {
        layer.non_local: (_non_local(second), lambda *given: given[0].numel() > 0 and _of_layer(given[2], second)),
        plain.nonlocal_attention: (
            _attention(second), lambda *given: given[1].numel() > 0 and _of_attention(given[5], second)
        ),
        F.conv2d: (
            _by_tiles(second), lambda x, w, bias=None, *o, **words: (
                (second or bias is None) and _convolves(x, w, bias, *o, **words)
            )
        ),
    }  # fmt: skip
    ways = {before.__name__: (before, chosen(before, *how)) for before, how in others.items()}
    replaced = []
    for module in list(sys.modules.values()):
        held = getattr(module, "__dict__", {})
        for name in ways.keys() & held.keys():
            before, function = ways[name]
            if held[name] is before:
                replaced.append((module, name, before))
                setattr(module, name, function)
    try:
        yield used
    finally:
        for module, name, before in replaced:
            setattr(module, name, before)
