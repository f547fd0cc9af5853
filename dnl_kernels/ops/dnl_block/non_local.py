"""dnl_block with a non-local N as one autograd node on the CPU: x_{l+1} = N(y_l), y_l the accumulation of the states.

The states live in one buffer, the block's result, of which every layer reads a prefix and writes its own slot; their
gradients in one more, to which every layer adds what it pulls, the last layer first. The accumulations are the kernels
of dense_conv2d (images) or torch's products (tokens, some rows at a time), N is dnl_layer/projected.py.

Kept for backward: the states, and of each layer y, the attention's output and two numbers per query. Projections, the
activated states and, in the paper's order, N(y) are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import differentiable
from ..dense_linear import cpu as linear
from ..dense_linear.api import Config as Linear
from ..dnl_layer import projected
from ..dnl_layer.pointwise import activate_normalised, broadcast, pull_normalised, wide
from . import composition
from .config import BlockConfig, LayerParameters, Statistics
from .prefix import Corrections, Norm, Prefix, flattened, keeps, triangle_of

NAMES = tuple(name for name in LayerParameters._fields if not name.startswith("inner_"))
TRAINABLE = tuple(name for name in NAMES if not name.endswith(("_mean", "_var")))
ROWS = 1 << 16  # numbers of the tokens that are activated at a time: they stay in cache


def limit(x0: Tensor, parameters: Sequence[Any], config: BlockConfig, backend: str | None) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if backend not in (None, "cpu") or x0.device.type != "cpu" or _backend.absence("cpu"):
        return "the non-local block is one node on the CPU"
    if config.kernel == "local" or config.bottleneck is not None:
        return "the non-local block has a non-local kernel, and no bottleneck"
    if any(t is not None and t.requires_grad for p in parameters for t in (p.norm_mean, p.norm_var)):
        return "the non-local block takes given statistics as constants"
    return None


def dnl_block(
    x0: Tensor, parameters: Sequence[LayerParameters], config: BlockConfig
) -> tuple[Tensor, Statistics | None]:
    if config.training:  # running statistics are not read, and the caller updates them before the backward pass
        parameters = [p._replace(norm_mean=None, norm_var=None) for p in parameters]
    tensors = [getattr(p, name) for p in parameters for name in NAMES]
    keep = keeps((x0, *tensors))
    states, mean, var, *_ = _function((config, keep), x0, *tensors)
    if config.norm is None or not config.training:
        return states, None
    elements = x0.numel() // max(config.in_channels, 1)
    if config.preactivation:
        return states, Statistics(mean, var, [], [], [], [], elements)
    return states, Statistics(None, None, [], [], list(mean), list(var), elements)


def _static(config: BlockConfig) -> tuple:
    return (
        flattened(config.connectivity), config.growth_rate, config.affine, config.kernel, config.heads,
        config.norm is not None, config.training, config.preactivation, config.input_skip, config.residual,
        config.activation, config.tau, config.eps,
    )  # fmt: skip


def _config(
    in_channels, connectivity, growth_rate, affine, kernel, heads, norm, training, preactivation, input_skip, residual,
    activation, tau, eps,
) -> BlockConfig:  # fmt: skip
    triangle = triangle_of(connectivity)
    return BlockConfig(
        in_channels, len(triangle), growth_rate, triangle, affine, kernel, "batch" if norm else None, preactivation,
        activation, None, heads, 0, tau, input_skip, residual, eps, training,
    )  # fmt: skip


def _layers(tensors: Sequence[Tensor | None], count: int) -> list[Any]:
    size = len(NAMES)
    rows = [tensors[i * size : (i + 1) * size] for i in range(count)]
    return [LayerParameters(**dict(zip(NAMES, row, strict=True))) for row in rows]


def _forward(config, tensors):
    config, keep = config
    run = _backend.kernel("cpu", "dnl_nonlocal_block_fwd")
    states, mean, var, kept = run(tensors[0], tensors[1:], keep, *_static(config))
    return states, mean, var, *kept


def _backward(config, dstates, tensors, extra, needs):
    config, _ = config
    states, mean, var, *kept = extra
    run = _backend.kernel("cpu", "dnl_nonlocal_block_bwd")
    dx0, found = run(dstates, states, mean, var, kept, tensors[1:], *_static(config))
    gradients = iter(found)
    layers = [dict(zip(TRAINABLE, gradients, strict=False)) for _ in range(config.num_layers)]
    given = iter(tensors[1:])
    return [dx0, *(None if next(given) is None else layer.get(name) for layer in layers for name in NAMES)]


def _reference(config, tensors):
    """The composition, whose operators take derivatives of derivatives in memory linear in the positions."""
    return composition.dnl_block(tensors[0], _layers(tensors[1:], config[0].num_layers), config[0], None)[0]


_function = differentiable(_forward, _backward, _reference, keep_output=True, return_extra=True)


class _Run(Prefix):
    """One pass over the block: the steps that both directions share."""

    def __init__(self, config: BlockConfig, states: Tensor, layers: Sequence[Any]):
        super().__init__(config, states, layers)
        self.attention = projected.Config(config.kernel, config.heads, self.images, "cpu")

    def before(self, layer: int, mean: Tensor, rate: Tensor) -> tuple[Norm | None, str]:
        """The normalisation and the activation of the states that the layer reads."""
        if not self.config.preactivation:
            return None, "identity"
        return (None if self.config.norm is None else self.norm(layer, mean, rate)), self.config.activation

    def reads(self, buffer: Tensor, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
        return [self.channels(buffer, slice(start, end)) for start, end in spans]

    def chunks(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Some tokens of each tensor [B, N, C], as rows."""
        rows = [t.flatten(0, 1) for t in tensors]
        step = max(1, ROWS // max(1, sum(t.shape[1] for t in rows)))
        for first in range(0, len(rows[0]), step):
            yield [t[first : first + step] for t in rows]

    def accumulate(self, spans, weight: Tensor, bias: Tensor | None, norm: Norm | None, activation: str, tau: float):
        """tau * sum_j W_j act(norm(x_j)) + bias over the channels `spans` of the states."""
        x = self.reads(self.states, spans)
        scale, shift = (None, None) if norm is None else (norm.scale, norm.shift)
        if self.images:
            return self.ops.dense_conv2d_fwd(x, weight, bias, scale, shift, activation, tau)
        y = x[0].new_empty(*x[0].shape[:2], len(weight))
        for to, *rows in self.chunks([y, *x]):
            to.copy_(linear.forward(Linear(activation, tau, "cpu"), (weight, bias, scale, shift, *rows))[0])
        return y

    def pull(
        self, total: Tensor, dy: Tensor, spans, weight: Tensor, norm: Norm | None, activation: str, tau: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Adds the states' gradients to `total`; returns those of weight, bias, and the scale and shift of norm."""
        x, to = self.reads(self.states, spans), self.reads(total, spans)
        scale, shift = (None, None) if norm is None else (norm.scale, norm.shift)
        if self.images:
            return self.ops.dense_conv2d_pull(dy, x, weight, scale, shift, activation, tau, to)
        dweight = weight.new_zeros(weight.shape, dtype=self.dtype)
        sums = [dweight.new_zeros(weight.shape[i]) for i in (0, 1, 1)]
        config, wide_weight = Linear(activation, tau, "cpu"), weight.to(self.dtype)
        needs = (True, True, norm is not None, norm is not None, *(True for _ in x))
        for rows in self.chunks([dy, *x, *to]):
            given, added = rows[1 : 1 + len(x)], rows[1 + len(x) :]
            tensors = (wide_weight, None, scale, shift, *(t.to(self.dtype) for t in given))
            found = linear.backward(config, rows[0], tensors, (), needs)
            for sum_, gradient in zip((dweight, *sums, *added), found, strict=True):
                if gradient is not None:
                    sum_ += gradient
        return dweight, sums[0], sums[1], sums[2]

    def output_norm(self, layer: int, mean: Tensor, rate: Tensor) -> Norm | None:
        """The paper's order: that of N(y_l)."""
        p = self.layers[layer]
        if self.config.norm is None:
            return None
        found = (mean[layer], rate[layer]) if self.measures else self.given(p.norm_mean, p.norm_var)
        return self.normalisation(self.config.growth_rate, p.norm_weight, p.norm_bias, *found)

    def activated(self, x: Tensor, norm: Norm | None) -> Tensor:
        scale, shift = (None, None) if norm is None else (norm.scale, norm.shift)
        return activate_normalised(x, scale, shift, self.config.activation, self.axis)

    def pull_activated(self, dx: Tensor, x: Tensor, norm: Norm | None) -> tuple[Tensor, dict[str, Any]]:
        """The gradients of x = N(y_l) and of the norm, given that of act(norm(x))."""
        if norm is None:
            return pull_normalised(dx, x, None, None, self.config.activation, self.axis), {}
        g = pull_normalised(dx, x, norm.scale, norm.shift, self.config.activation, self.axis)
        others = [d for d in range(x.dim()) if d != self.axis]
        centred = wide(x) - broadcast(norm.mean, x, self.axis)
        dbeta, dgamma = g.sum(others), (g * centred).sum(others) * norm.rate
        if self.measures:
            g -= broadcast(self.share * dbeta, x, self.axis)
            g -= centred.mul_(broadcast(self.share * norm.rate * dgamma, x, self.axis))
        return g.mul_(broadcast(norm.scale, x, self.axis)), {"norm_weight": dgamma, "norm_bias": dbeta}


@torch.no_grad()  # an exported program calls it with parameters that require gradients
def dnl_nonlocal_block_fwd(x0, tensors, keep, *static):
    """The states; means and variances of their channels, or of each layer's N(y) [L, G], where the block measures them;
    and, of every layer or none, y and what `projected.forward` keeps."""
    config = _config(x0.shape[-1 if static[2] == "linear" else 1], *static)
    layers = _layers(tensors, config.num_layers)
    width = config.in_channels + config.num_layers * config.growth_rate
    shape = (*x0.shape[:-1], width) if config.affine == "linear" else (x0.shape[0], width, *x0.shape[2:])
    run = _Run(config, x0.new_empty(shape), layers)
    measured = (width,) if config.preactivation else (config.num_layers, config.growth_rate)
    mean, var, rate = (run.states.new_zeros(measured if run.measures else 0, dtype=run.dtype) for _ in range(3))
    kept: list[Tensor] = []
    of_states = slice(0, config.in_channels)
    run.channels(run.states, of_states).copy_(x0)
    for layer, p in enumerate(layers):
        if config.preactivation:
            run.measure(run.channels(run.states, of_states), of_states, (mean, var, rate))
        y: Any = None
        if spans := run.spans[layer]:
            y = run.accumulate(spans, p.affine_weight, p.affine_bias, *run.before(layer, mean, rate), config.tau)
        if config.input_skip:
            skip = run.accumulate([(0, config.in_channels)], p.skip_weight, p.skip_bias, None, "identity", 1.0)
            y = skip if y is None else y.add_(skip)
        of_states = run.slot(layer)
        slot = run.channels(run.states, of_states)
        x, more = projected.forward(
            run.attention, y, p.theta(), slot if config.preactivation else None, config.residual
        )
        if not config.preactivation:
            run.measure(x, layer, (mean, var, rate))
            slot.copy_(run.activated(x, run.output_norm(layer, mean, rate)))
        if keep:
            kept += [y, *more]
    return run.states, mean, var, kept


@torch.no_grad()
def dnl_nonlocal_block_bwd(dstates, states, mean, var, kept, tensors, *static):
    """dx0, and for every layer the gradients of TRAINABLE, empty where there is no such tensor."""
    count, tokens = len(tensors) // len(NAMES), static[2] == "linear"
    config = _config(states.shape[-1 if tokens else 1] - count * static[1], *static)
    layers = _layers(tensors, count)
    run = _Run(config, states.contiguous(), layers)
    total = torch.empty_like(run.states, dtype=run.dtype).copy_(dstates)  # what consumers so far pull, and dOut
    rate = run.rate(var)
    corrections = Corrections(run, total, mean, rate)
    each = len(kept) // count
    found: list[list[Tensor]] = []
    for layer in reversed(range(count)):
        p, theta = layers[layer], layers[layer].theta()
        y, *more = kept[layer * each : (layer + 1) * each]
        if config.preactivation:
            corrections.apply(run.slot(layer))
        dx = run.channels(total, run.slot(layer))
        gradients: dict[str, Any] = {}
        if not config.preactivation:
            x = projected.combine(run.attention, more[0], theta, y)
            x = x.add_(y) if config.residual else x
            dx, gradients = run.pull_activated(dx, x, run.output_norm(layer, mean, rate))
        dy, of_theta = projected.backward(run.attention, dx, y, theta, more, config.residual)
        gradients |= of_theta
        if spans := run.spans[layer]:
            norm, activation = run.before(layer, mean, rate)
            dweight, dbias, moment, plain = run.pull(total, dy, spans, p.affine_weight, norm, activation, config.tau)
            gradients |= {"affine_weight": dweight, "affine_bias": dbias}
            if norm is not None:
                dgamma = (moment - norm.mean * plain) * norm.rate
                corrections.collect(layer, norm, plain, dgamma)
                gradients |= {"norm_weight": dgamma, "norm_bias": plain}
        if config.input_skip:
            at = [(0, config.in_channels)]
            dweight, dbias, *_ = run.pull(total, dy, at, p.skip_weight, None, "identity", 1.0)
            gradients |= {"skip_weight": dweight, "skip_bias": dbias}
        given: list[Any] = [getattr(p, name) for name in TRAINABLE]
        found.append([
            states.new_empty(0) if t is None else gradients[name].to(t.dtype)
            for name, t in zip(TRAINABLE, given, strict=True)
        ])  # fmt: skip
    first = slice(0, config.in_channels)
    if config.preactivation:
        corrections.apply(first)
    dx0 = run.channels(total, first).to(states.dtype, memory_format=torch.contiguous_format, copy=True)
    return dx0, [gradient for layer in reversed(found) for gradient in layer]
