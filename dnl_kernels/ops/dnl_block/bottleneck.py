"""dnl_block with a bottleneck (DenseNet-BC) as one autograd node on the CPU. The products belong to torch: the 1x1
convolution is a GEMM over all pixels of a batch, the 3x3 one is torch's. Around them csrc/dnl_bottleneck reads and
writes one prefix buffer: nothing is concatenated, statistics are computed once per channel, and the gradient of a
state is corrected for them once, when all of its consumers are known (idea 3 of fused.py's kernels).

Kept for backward: the states, and what each layer's 1x1 convolution made (b * G channels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import differentiable
from . import reference
from .config import BlockConfig, LayerParameters, Statistics
from .statistics import fold, gather

NAMES = (
    "affine_weight", "affine_bias", "norm_weight", "norm_bias", "norm_mean", "norm_var",
    "inner_weight", "inner_norm_weight", "inner_norm_bias", "inner_norm_mean", "inner_norm_var",
)  # fmt: skip
TRAINABLE = tuple(name for name in NAMES if not name.endswith(("_mean", "_var")))
CHUNK = 1 << 20  # normalised elements between a pass over memory and its product: they stay in cache


def limit(x0: Tensor, parameters: Sequence[Any], config: BlockConfig, backend: str | None) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if backend not in (None, "cpu") or x0.device.type != "cpu" or _backend.absence("cpu"):
        return "the fused bottleneck is a CPU kernel"
    if config.bottleneck is None or config.kernel != "local" or not config.preactivation or config.input_skip:
        return "the fused bottleneck is a DenseNet-BC block: pre-activation, kernel='local', no input skip"
    if any(t is not None and t.requires_grad for p in parameters for n, t in zip(p._fields, p, strict=True)
           if n.endswith(("norm_mean", "norm_var"))):  # fmt: skip
        return "the fused bottleneck takes given statistics as constants"
    return None


def dnl_block(
    x0: Tensor, parameters: Sequence[LayerParameters], config: BlockConfig
) -> tuple[Tensor, Statistics | None]:
    if config.training:  # running statistics are not read, and the caller updates them before the backward pass
        none = dict.fromkeys((name for name in NAMES if name not in TRAINABLE))
        parameters = [p._replace(**none) for p in parameters]
    tensors = [getattr(p, name) for p in parameters for name in NAMES]
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    keep = traced or torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x0, *tensors))
    states, _, mean, var, inner_mean, inner_var = _function((config, keep), x0, *tensors)
    if config.norm is None or not config.training:
        return states, None
    elements = x0.numel() // x0.shape[1]
    return states, Statistics(mean, var, list(inner_mean), list(inner_var), [], [], elements)


def _static(config: BlockConfig) -> tuple:
    connectivity = [int(read) for row in config.connectivity for read in row]
    return (
        connectivity, config.growth_rate, config.bottleneck, config.norm is not None, config.training,
        config.activation, config.tau, config.eps,
    )  # fmt: skip


def _config(in_channels, connectivity, growth_rate, bottleneck, norm, training, activation, tau, eps) -> BlockConfig:
    rows: list[tuple[bool, ...]] = []
    while connectivity:
        size = len(rows) + 1
        rows, connectivity = [*rows, tuple(map(bool, connectivity[:size]))], connectivity[size:]
    return BlockConfig(
        in_channels, len(rows), growth_rate, tuple(rows), norm="batch" if norm else None, activation=activation,
        bottleneck=bottleneck, tau=tau, eps=eps, training=training,
    )  # fmt: skip


def _forward(config, tensors):
    config, keep = config
    return _backend.kernel("cpu", "dnl_bottleneck_fwd")(tensors[0], tensors[1:], keep, *_static(config))


def _backward(config, dstates, tensors, extra, needs):
    config, _ = config
    dx0, found = _backend.kernel("cpu", "dnl_bottleneck_bwd")(dstates, *extra, tensors[1:], *_static(config))
    gradients = iter(found)
    layers = [dict(zip(TRAINABLE, gradients, strict=False)) for _ in range(config.num_layers)]
    given = iter(tensors[1:])
    return [dx0, *(None if next(given) is None else layer.get(name) for layer in layers for name in NAMES)]


def _reference(config, tensors):
    return reference.dnl_block(tensors[0], _layers(tensors[1:], config[0].num_layers), config[0])[0]


_function = differentiable(_forward, _backward, _reference, keep_output=True, return_extra=True)


def _layers(tensors: Sequence[Tensor | None], count: int) -> list[Any]:
    size = len(NAMES)
    rows = [tensors[i * size : (i + 1) * size] for i in range(count)]
    return [LayerParameters(**dict(zip(NAMES, row, strict=True))) for row in rows]


class _Norm(NamedTuple):
    """act(scale * x + shift), and what its gradient needs: gamma and the statistics, float32 at least."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rate: Tensor  # 1 / sqrt(var + eps)
    gamma: Tensor


def _norm(config: BlockConfig, like: Tensor, width: int, weight, bias, mean, var) -> _Norm:
    one, zero = like.new_ones(width), like.new_zeros(width)
    if config.norm is None:
        return _Norm(one, zero, zero, one, one)
    gamma, beta = (default if t is None else t.to(like.dtype) for t, default in ((weight, one), (bias, zero)))
    mean, var = mean.to(like.dtype).contiguous(), var.to(like.dtype)
    scale, shift = fold(mean, var, gamma, beta, config.eps)
    return _Norm(scale, shift, mean, torch.rsqrt(var + config.eps), gamma)


class _Run:
    """One pass over the block: the buffers, and the steps that both directions share. Everything is in `dtype`."""

    def __init__(self, config: BlockConfig, states: Tensor, inner: Tensor, layers: Sequence[Any]):
        self.config, self.states, self.inner, self.layers = config, states, inner, layers
        self.batch, _, self.height, self.width = states.shape
        self.pixels = self.height * self.width
        self.wide = config.growth_rate * (config.bottleneck or 1)
        widest = max(map(config.layer_channels, range(config.num_layers)))
        self.step = max(1, CHUNK // max(widest * self.pixels, 1))  # images at a time
        self.buffer = states.new_empty(widest * min(self.step, self.batch) * self.pixels)
        self.ops: Any = torch.ops.dnl

    def planes(self, rows: Tensor) -> Tensor:
        """[C, images * H * W] as [images, C, H, W], in place."""
        return rows.view(rows.shape[0], -1, self.height, self.width).transpose(0, 1)

    def chunks(self, layer: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Some images, their columns, and the buffer for what the layer reads of them, [C(l), columns]."""
        for start in range(0, self.batch, self.step):
            images = slice(start, min(start + self.step, self.batch))
            columns = slice(images.start * self.pixels, images.stop * self.pixels)
            channels, count = self.config.layer_channels(layer), columns.stop - columns.start
            yield images, columns, self.buffer[: channels * count].view(channels, count)

    def parts(self, layer: int) -> Iterator[tuple[slice, slice]]:
        """Channels of the states that a layer reads, and where they stand among those of the layer."""
        at = 0
        for start, end in self.config.spans(layer):
            yield slice(start, end), slice(at, at + end - start)
            at += end - start

    def load(self, layer: int, images: slice, norm: _Norm, z: Tensor) -> None:
        """z = act(norm(the states that the layer reads))"""
        for channels, rows in self.parts(layer):
            self.ops.dnl_bottleneck_activate(
                self.states[images, channels], norm.scale[rows], norm.shift[rows], self.config.activation,
                self.planes(z[rows]),
            )  # fmt: skip

    def load_inner(self, layer: int, norm: _Norm) -> Tensor:
        """act(norm(y)), y the output of the layer's 1x1 convolution"""
        z = self.states.new_empty(self.batch, self.wide, self.height, self.width)
        y = self.planes(self.inner[layer])
        self.ops.dnl_bottleneck_activate(y, norm.scale, norm.shift, self.config.activation, z)
        return z

    def norms(self, layer: int, mean, var, inner_mean, inner_var) -> tuple[_Norm, _Norm]:
        """Those of the states and of the bottleneck; statistics of the batch where the block measures them."""
        return self.norm(layer, mean, var), self.inner_norm(layer, inner_mean, inner_var)

    def norm(self, layer: int, mean: Tensor, var: Tensor) -> _Norm:
        p, spans = self.layers[layer], self.config.spans(layer)
        if self.config.training:
            mean, var = gather(mean, spans), gather(var, spans)
        else:
            mean, var = p.norm_mean, p.norm_var
        width = self.config.layer_channels(layer)
        return _norm(self.config, self.states, width, p.norm_weight, p.norm_bias, mean, var)

    def inner_norm(self, layer: int, mean: Tensor, var: Tensor) -> _Norm:
        p = self.layers[layer]
        given = (mean[layer], var[layer]) if self.config.training else (p.inner_norm_mean, p.inner_norm_var)
        return _norm(self.config, self.states, self.wide, p.inner_norm_weight, p.inner_norm_bias, *given)

    def slot(self, layer: int) -> slice:
        start = self.config.in_channels + layer * self.config.growth_rate
        return slice(start, start + self.config.growth_rate)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.no_grad()  # an exported program calls it with parameters that require gradients
def dnl_bottleneck_fwd(x0, tensors, keep, *static):
    """The states, y of every layer [L or 0, b * G, B * H * W], and statistics where the block measures them."""
    config = _config(x0.shape[1], *static)
    dtype, measures = _dtype(x0), config.norm is not None and config.training
    batch, width, height, columns = x0.shape
    count, growth = config.num_layers, config.growth_rate
    states = x0.new_empty((batch, width + count * growth, height, columns), dtype=dtype)
    states[:, :width] = x0
    wide = growth * config.bottleneck
    layers = _layers(tensors, count)
    inner = states.new_empty(count if keep else 1, wide, batch * height * columns)
    run = _Run(config, states, inner if keep else inner.expand(count, -1, -1), layers)
    mean, var = (states.new_empty(states.shape[1] if measures else 0) for _ in range(2))
    inner_mean, inner_var = (states.new_empty(count if measures else 0, wide) for _ in range(2))

    def measure(channels: slice) -> None:
        if measures:
            mean[channels], var[channels] = run.ops.dnl_bottleneck_moments(states[:, channels])

    measure(slice(0, width))
    for layer, p in enumerate(layers):
        norm, y = run.norm(layer, mean, var), run.inner[layer]
        weight = p.affine_weight.to(dtype).flatten(1) * config.tau
        for images, columns_, z in run.chunks(layer):
            run.load(layer, images, norm, z)
            torch.mm(weight, z, out=y[:, columns_])
        if p.affine_bias is not None:
            y += p.affine_bias.to(dtype)[:, None]
        if measures:
            inner_mean[layer], inner_var[layer] = run.ops.dnl_bottleneck_moments(run.planes(y))
        z = run.load_inner(layer, run.inner_norm(layer, inner_mean, inner_var))
        states[:, run.slot(layer)] = torch.conv2d(z, p.inner_weight.to(dtype), padding=1)
        measure(run.slot(layer))
    kept = inner if keep else inner[:0]
    return states.to(x0.dtype), kept.to(x0.dtype), mean, var, inner_mean, inner_var


@torch.no_grad()
def dnl_bottleneck_bwd(dstates, states, inner, mean, var, inner_mean, inner_var, tensors, *static):
    """dx0, and for every layer the gradients of TRAINABLE, empty where there is no such tensor."""
    count, growth = len(tensors) // len(NAMES), static[1]
    width = states.shape[1] - count * growth
    config = _config(width, *static)
    dtype, measures = _dtype(states), config.norm is not None and config.training
    layers = _layers(tensors, count)
    run = _Run(config, states.to(dtype).contiguous(), inner.to(dtype), layers)
    total = torch.empty_like(run.states).copy_(dstates)  # of every state: what its consumers so far pull, and dOut
    elements = max(run.batch * run.pixels, 1)
    mean_plain, mean_moment = (total.new_zeros(total.shape[1]) for _ in range(2))  # S1, S2
    dy = total.new_empty(run.wide, run.batch * run.pixels)
    found: list[list[Tensor]] = []

    def correct(channels: slice) -> None:
        if measures:
            rate = torch.rsqrt(var[channels] + config.eps)
            slope, constant = -rate.square() * mean_moment[channels], -rate * mean_plain[channels]
            run.ops.dnl_bottleneck_correct(
                run.states[:, channels], slope, mean[channels], constant, total[:, channels]
            )  # fmt: skip

    for layer in reversed(range(count)):
        p, slot = layers[layer], run.slot(layer)
        norm, inner_norm = run.norms(layer, mean, var, inner_mean, inner_var)
        correct(slot)
        z, weight = run.load_inner(layer, inner_norm), p.inner_weight.to(dtype)
        dz, dinner_weight, _ = torch.ops.aten.convolution_backward(
            total[:, slot].contiguous(), z, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        )
        y = run.planes(run.inner[layer])
        plain, moment = run.ops.dnl_bottleneck_activate_bwd(
            dz, y, inner_norm.scale, inner_norm.shift, inner_norm.mean, config.activation, False, run.planes(dy)
        )
        dinner_gamma = moment * inner_norm.rate
        if measures:
            slope = -inner_norm.scale * inner_norm.rate * dinner_gamma / elements
            constant = -inner_norm.scale * plain / elements
            run.ops.dnl_bottleneck_correct(y, slope, inner_norm.mean, constant, run.planes(dy))
        dbias = dy.sum(1) if p.affine_bias is not None else dy.new_empty(0)

        weight = p.affine_weight.to(dtype).flatten(1) * config.tau
        dweight = torch.zeros_like(weight)
        dbeta, dgamma = (total.new_zeros(config.layer_channels(layer)) for _ in range(2))
        for images, columns, z in run.chunks(layer):
            run.load(layer, images, norm, z)
            dweight.addmm_(dy[:, columns], z.mT)
            torch.mm(weight.mT, dy[:, columns], out=z)
            for channels, rows in run.parts(layer):
                sums = run.ops.dnl_bottleneck_activate_bwd(
                    run.planes(z[rows]), run.states[images, channels], norm.scale[rows], norm.shift[rows],
                    norm.mean[rows], config.activation, True, total[images, channels],
                )  # fmt: skip
                dbeta[rows] += sums[0]
                dgamma[rows] += sums[1]
        dgamma *= norm.rate
        for channels, rows in run.parts(layer):
            mean_plain[channels] += norm.gamma[rows] * dbeta[rows] / elements
            mean_moment[channels] += norm.gamma[rows] * dgamma[rows] / elements
        gradients = {
            "affine_weight": (dweight * config.tau).view_as(p.affine_weight), "affine_bias": dbias,
            "norm_weight": dgamma, "norm_bias": dbeta, "inner_weight": dinner_weight,
            "inner_norm_weight": dinner_gamma, "inner_norm_bias": plain,
        }  # fmt: skip
        given = [getattr(p, name) for name in TRAINABLE]
        found.append([
            states.new_empty(0) if t is None else gradients[name].to(t.dtype)
            for name, t in zip(TRAINABLE, given, strict=True)
        ])  # fmt: skip
    correct(slice(0, width))
    dx0 = total[:, :width].to(states.dtype, memory_format=torch.contiguous_format, copy=True)
    return dx0, [gradient for layer in reversed(found) for gradient in layer]
