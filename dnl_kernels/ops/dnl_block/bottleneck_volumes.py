"""dnl_block with a bottleneck over signals [B, C, N] and volumes [B, C, D, H, W] on the CPU: what bottleneck.py does
for images, layer by layer. The products belong to torch, the 1x1 convolution as a GEMM over all pixels; around them
csrc/norm_activation reads and writes one states buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .bottleneck import NAMES, TRAINABLE, layers_of
from .config import BlockConfig
from .prefix import Corrections, Norm, Prefix, triangle_of, wide_dtype

LONG = 512  # pixels that fill a product on their own: an image is then normalised and multiplied while in cache


def _config(in_channels, connectivity, growth_rate, bottleneck, norm, training, activation, tau, eps) -> BlockConfig:
    triangle = triangle_of(connectivity)
    return BlockConfig(
        in_channels, len(triangle), growth_rate, triangle, norm="batch" if norm else None, activation=activation,
        bottleneck=bottleneck, tau=tau, eps=eps, training=training,
    )  # fmt: skip


def _as_images(x: Tensor) -> Tensor:
    """[B, C, *spatial] as [B, C, H, W], a view: all that is not the 3x3 convolution asks for positions only."""
    return x.view(*x.shape[:2], math.prod(x.shape[2:-1]), x.shape[-1])


class _Run(Prefix):
    """One pass over the block: the buffers, and the steps that both directions share, in float32 at least.

    states: [B, C, *spatial].

    A layer's product takes one image at a time where its rows are long enough, [B, C, H * W], and all images as one
    matrix where they are not, [C, B * H * W].
    """

    def __init__(self, config: BlockConfig, states: Tensor, inner: Tensor, layers: Sequence[Any]):
        super().__init__(config, _as_images(states), layers)
        self.batch, _, *self.spatial = states.shape
        self.height, self.width = self.states.shape[2:]
        self.pixels = self.height * self.width
        self.wide = config.growth_rate * (config.bottleneck or 1)
        self.single = self.pixels >= LONG
        self.columns = self.pixels if self.single else self.batch * self.pixels
        matrix = (self.batch, self.wide, self.columns) if self.single else (self.wide, self.columns)
        self.inner = inner.view(len(inner), *matrix)
        widest = max(map(config.layer_channels, range(config.num_layers)))
        self.buffer = states.new_empty(widest * self.columns)

    def planes(self, rows: Tensor) -> Tensor:
        """A matrix or a batch of them as [B, C, H, W], in place."""
        images, channels = self.batch if rows.dim() == 3 else 1, rows.shape[-2]
        if self.single:
            return rows.view(images, channels, self.height, self.width)
        return rows.view(channels, self.batch, self.height, self.width).transpose(0, 1)

    def chunks(self, layer: int) -> Iterator[tuple[slice, Any, Tensor]]:
        """Some images, their part of [B, C, H * W] or [C, B * H * W], and a buffer for what the layer reads of them."""
        channels = self.config.layer_channels(layer)
        z = self.buffer[: channels * self.columns].view(channels, self.columns)
        if self.single:
            yield from ((slice(b, b + 1), b, z) for b in range(self.batch))
        elif self.batch:
            yield slice(None), slice(None), z

    def parts(self, layer: int) -> Iterator[tuple[slice, slice]]:
        """Channels of the states that a layer reads, and where they stand among those of the layer."""
        at = 0
        for start, end in self.spans[layer]:
            yield slice(start, end), slice(at, at + end - start)
            at += end - start

    def load(self, layer: int, images: slice, norm: Norm, z: Tensor) -> None:
        """z = act(norm(the states that the layer reads))"""
        for channels, rows in self.parts(layer):
            self.ops.norm_activation_fwd(
                self.states[images, channels], norm.scale[rows], norm.shift[rows], self.config.activation,
                self.planes(z[rows]),
            )  # fmt: skip

    def output(self, layer: int) -> Tensor:
        """y of a layer's 1x1 convolution; one buffer serves all layers where nothing is kept."""
        return self.inner[min(layer, len(self.inner) - 1)]

    def activated(self, layer: int, norm: Norm) -> Tensor:
        z = self.states.new_empty(self.batch, self.wide, self.height, self.width)
        y = self.planes(self.output(layer))
        self.ops.norm_activation_fwd(y, norm.scale, norm.shift, self.config.activation, z)
        return z.view(self.batch, self.wide, *self.spatial)

    def filters(self, layer: int) -> Tensor:
        """Of the 3x3 convolution, contiguous: by channels-last ones torch's results would be channels-last too."""
        return self.layers[layer].inner_weight.to(self.states.dtype).contiguous()

    def convolve(self, layer: int, norm: Norm) -> Tensor:
        """The convolution of act(norm(y)) with the layer's filters."""
        convolution = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(self.spatial)]
        return _as_images(convolution(self.activated(layer, norm), self.filters(layer), padding=1))

    def convolve_back(self, layer: int, norm: Norm, dout: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dy through that convolution and the scale of the norm, as a matrix in `dy`; the filters' gradient; sum g and
        sum g * (y - mean), g the gradient of the norm's result."""
        z, ones = self.activated(layer, norm), [1] * len(self.spatial)
        dz, dweight, _ = torch.ops.aten.convolution_backward(
            dout.view(*dout.shape[:2], *self.spatial), z, self.filters(layer), None, ones, ones, ones, False,
            [0] * len(ones), 1, [True, True, False],
        )  # fmt: skip
        plain, moment = self.ops.norm_activation_pull(
            _as_images(dz.contiguous()), self.planes(self.output(layer)), norm.scale, norm.shift, norm.mean,
            self.config.activation, False, self.planes(dy),
        )  # fmt: skip
        return dweight, plain, moment

    def inner_norm(self, layer: int, mean: Tensor, rate: Tensor) -> Norm:
        p = self.layers[layer]
        if self.config.training:
            mean, rate = mean[layer], rate[layer]
        else:
            mean, rate = self.given(p.inner_norm_mean, p.inner_norm_var)
        return self.normalisation(self.wide, p.inner_norm_weight, p.inner_norm_bias, mean, rate)


@torch.no_grad()  # an exported program calls it with parameters that require gradients
def dnl_bottleneck_volumes_fwd(x0, tensors, keep, *static):
    """The states, y of every layer [L or 0, b * G * B * H * W], and statistics where the block measures them."""
    config = _config(x0.shape[1], *static)
    dtype, measures = wide_dtype(x0), config.norm is not None and config.training
    batch, width, *spatial = x0.shape
    count, growth = config.num_layers, config.growth_rate
    buffer = x0.new_empty((batch, width + count * growth, *spatial), dtype=dtype)
    buffer[:, :width] = x0
    states = _as_images(buffer)
    wide = growth * (config.bottleneck or 1)
    layers = layers_of(tensors, count)
    inner = states.new_empty(count if keep else 1, wide * batch * math.prod(spatial))
    run = _Run(config, buffer, inner, layers)
    mean, var, rate = (states.new_empty(states.shape[1] if measures else 0) for _ in range(3))
    inner_mean, inner_var, inner_rate = (states.new_empty(count if measures else 0, wide) for _ in range(3))

    run.measure(states[:, :width], slice(0, width), (mean, var, rate))
    for layer, p in enumerate(layers):
        norm, y = run.norm(layer, mean, rate), run.output(layer)
        weight = p.affine_weight.to(dtype).flatten(1)
        weight = weight if config.tau == 1 else weight * config.tau
        for images, at, z in run.chunks(layer):
            run.load(layer, images, norm, z)
            torch.mm(weight, z, out=y[at])
        if p.affine_bias is not None:
            y += p.affine_bias.to(dtype)[:, None]
        run.measure(run.planes(y), layer, (inner_mean, inner_var, inner_rate))
        states[:, run.slot(layer)] = run.convolve(layer, run.inner_norm(layer, inner_mean, inner_rate))
        run.measure(states[:, run.slot(layer)], run.slot(layer), (mean, var, rate))
    kept = inner if keep else inner[:0]
    return buffer.to(x0.dtype), kept.to(x0.dtype), mean, var, inner_mean, inner_var


@torch.no_grad()
def dnl_bottleneck_volumes_bwd(dstates, states, inner, mean, var, inner_mean, inner_var, tensors, *static):
    """dx0, and for every layer the gradients of TRAINABLE, empty where there is no such tensor."""
    count, growth = len(tensors) // len(NAMES), static[1]
    width = states.shape[1] - count * growth
    config = _config(width, *static)
    dtype, measures = wide_dtype(states), config.norm is not None and config.training
    layers = layers_of(tensors, count)
    run = _Run(config, states.to(dtype).contiguous(), inner.to(dtype), layers)
    total = _as_images(
        torch.empty(states.shape, dtype=dtype).copy_(dstates)
    )  # of every state: what its consumers so far pull, and dOut
    rate, inner_rate = run.rate(var), run.rate(inner_var)
    dy = torch.empty_like(run.output(0))
    found: list[list[Tensor]] = []

    corrections = Corrections(run, total, mean, rate)
    for layer in reversed(range(count)):
        p, slot = layers[layer], run.slot(layer)
        norm, inner_norm = run.norm(layer, mean, rate), run.inner_norm(layer, inner_mean, inner_rate)
        corrections.apply(slot)
        dinner_weight, plain, moment = run.convolve_back(layer, inner_norm, total[:, slot].contiguous(), dy)
        dinner_gamma = moment * inner_norm.rate
        if measures:
            factor = inner_norm.scale * -run.share
            run.ops.norm_activation_correct(
                run.planes(run.output(layer)), factor * inner_norm.rate * dinner_gamma, inner_norm.mean,
                factor * plain, run.planes(dy),
            )  # fmt: skip
        gradients: dict[str, Any] = {
            "affine_bias": None if p.affine_bias is None else dy.sum((0, 2) if run.single else 1),
            "inner_weight": dinner_weight, "inner_norm_weight": dinner_gamma, "inner_norm_bias": plain,
        }  # fmt: skip

        weight = p.affine_weight.to(dtype).flatten(1)
        weight = weight if config.tau == 1 else weight * config.tau
        dweight = torch.zeros_like(weight)
        dbeta, dgamma = (total.new_zeros(weight.shape[1]) for _ in range(2))
        for images, at, z in run.chunks(layer):
            run.load(layer, images, norm, z)
            dweight.addmm_(dy[at], z.mT)
            torch.mm(weight.mT, dy[at], out=z)
            for channels, rows in run.parts(layer):
                sums = run.ops.norm_activation_pull(
                    run.planes(z[rows]), run.states[images, channels], norm.scale[rows], norm.shift[rows],
                    norm.mean[rows], config.activation, True, total[images, channels],
                )  # fmt: skip
                dbeta[rows] += sums[0]
                dgamma[rows] += sums[1]
        dgamma *= norm.rate
        corrections.collect(layer, norm, dbeta, dgamma)
        dweight = dweight if config.tau == 1 else dweight * config.tau
        gradients |= {"affine_weight": dweight.view_as(p.affine_weight), "norm_weight": dgamma, "norm_bias": dbeta}
        given: list[Any] = [getattr(p, name) for name in TRAINABLE]
        found.append([
            states.new_empty(0) if t is None else gradients[name].to(t.dtype)
            for name, t in zip(TRAINABLE, given, strict=True)
        ])  # fmt: skip
    corrections.apply(slice(0, width))
    dx0 = total[:, :width].to(states.dtype, memory_format=torch.contiguous_format, copy=True)
    dx0 = dx0.view(-1, width, *states.shape[2:])
    return dx0, [gradient for layer in reversed(found) for gradient in layer]
