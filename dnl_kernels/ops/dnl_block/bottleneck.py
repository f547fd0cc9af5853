"""dnl_block with a bottleneck (DenseNet-BC) as one autograd node on the CPU. The products belong to torch: the 1x1
convolution is a GEMM over all pixels of a batch, the 3x3 one is torch's. Around them csrc/norm_activation reads and
writes one prefix buffer: nothing is concatenated, statistics are computed once per channel, and the gradient of a
state is corrected for them once, when all of its consumers are known (idea 3 of fused.py's kernels).

In evaluation, without gradients, csrc/dnl_bottleneck does all of it: a whole block is one call.

Kept for backward: the states, and what each layer's 1x1 convolution made (b * G channels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import differentiable
from ..._derived import DerivedCache
from . import reference
from .config import BlockConfig, LayerParameters, Statistics
from .prefix import Corrections, Norm, Prefix, flattened, keeps, triangle_of, wide_dtype

NAMES = (
    "affine_weight", "affine_bias", "norm_weight", "norm_bias", "norm_mean", "norm_var",
    "inner_weight", "inner_norm_weight", "inner_norm_bias", "inner_norm_mean", "inner_norm_var",
)  # fmt: skip
TRAINABLE = tuple(name for name in NAMES if not name.endswith(("_mean", "_var")))
LONG = 512  # pixels that fill a product on their own: an image is then normalised and multiplied while in cache


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
        none = dict.fromkeys(name for name in NAMES if name not in TRAINABLE)
        parameters = [p._replace(**none) for p in parameters]
    tensors = [getattr(p, name) for p in parameters for name in NAMES]
    keep = keeps((x0, *tensors))
    if not keep and (config.norm is None or not config.training) and not _has_tangents():
        return evaluate(x0, packed_weights(tensors, x0, config), config), None
    states, _, mean, var, inner_mean, inner_var = _function((config, keep), x0, *tensors)
    if config.norm is None or not config.training:
        return states, None
    elements = x0.numel() // x0.shape[1]
    return states, Statistics(mean, var, list(inner_mean), list(inner_var), [], [], elements)


def pack(tensors: Sequence[Tensor | None], config: BlockConfig) -> Tensor:
    """The layers' weights as `evaluate` reads them: a vector that holds the folded normalisations, and the filters in
    Winograd's form. tensors: for each layer those of NAMES."""
    assert config.bottleneck is not None and (config.norm is None or not config.training)
    return torch.ops.dnl.dnl_bottleneck_pack.default(
        tensors, flattened(config.connectivity), config.in_channels, config.growth_rate, config.bottleneck,
        config.norm is not None, config.tau, config.eps,
    )  # fmt: skip


def evaluate(x0: Tensor, packed: Tensor, config: BlockConfig) -> Tensor:
    """The states, without gradients, by all layers in one call of csrc/dnl_bottleneck."""
    return torch.ops.dnl.dnl_bottleneck_eval.default(
        x0, packed, flattened(config.connectivity), config.growth_rate, config.bottleneck, config.activation
    )  # fmt: skip


def packed_weights(tensors: Sequence[Tensor | None], x0: Tensor, config: BlockConfig) -> Tensor:
    """`pack`, kept until one of the tensors is another one or has changed."""
    return _packed_cache.get(tensors, (x0.dtype, config), lambda: pack(tensors, config))


_packed_cache = DerivedCache()


def _has_tangents() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def _static(config: BlockConfig) -> tuple:
    return (
        flattened(config.connectivity), config.growth_rate, config.bottleneck, config.norm is not None, config.training,
        config.activation, config.tau, config.eps,
    )  # fmt: skip


def _config(in_channels, connectivity, growth_rate, bottleneck, norm, training, activation, tau, eps) -> BlockConfig:
    triangle = triangle_of(connectivity)
    return BlockConfig(
        in_channels, len(triangle), growth_rate, triangle, norm="batch" if norm else None, activation=activation,
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


class _Run(Prefix):
    """One pass over the block: the buffers, and the steps that both directions share, in float32 at least.

    A layer's product takes one image at a time where its rows are long enough, [B, C, H * W], and all images as one
    matrix where they are not, [C, B * H * W].
    """

    def __init__(self, config: BlockConfig, states: Tensor, inner: Tensor, layers: Sequence[Any]):
        super().__init__(config, states, layers)
        self.batch, _, self.height, self.width = states.shape
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
        return z

    def convolve(self, layer: int, norm: Norm) -> Tensor:
        """The 3x3 convolution of act(norm(y)): by dense_conv2d, which activates on the way, where maps are large."""
        weight, y = self.layers[layer].inner_weight.to(self.states.dtype), self.planes(self.output(layer))
        if not self.single:
            return torch.conv2d(self.activated(layer, norm), weight, padding=1)
        return self.ops.dense_conv2d_fwd([y], weight, None, norm.scale, norm.shift, self.config.activation, 1.0)

    def convolve_back(self, layer: int, norm: Norm, dout: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dy through that convolution and the scale of the norm, as a matrix (in `dy`, or another one); the filters'
        gradient; sum g and sum g * (y - mean), g the gradient of the norm's result."""
        weight, y = self.layers[layer].inner_weight.to(self.states.dtype), self.planes(self.output(layer))
        activation = self.config.activation
        if self.single:
            (found,), dweight, _, moment, plain = self.ops.dense_conv2d_bwd(
                dout, [y], weight, norm.scale, norm.shift, activation, 1.0, True, True, False, True
            )
            return found.view_as(dy), dweight, plain, moment - norm.mean * plain
        dz, dweight, _ = torch.ops.aten.convolution_backward(
            dout, self.activated(layer, norm), weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [True, True, False],
        )  # fmt: skip
        plain, moment = self.ops.norm_activation_pull(
            dz, y, norm.scale, norm.shift, norm.mean, activation, False, self.planes(dy)
        )
        return dy, dweight, plain, moment

    def inner_norm(self, layer: int, mean: Tensor, rate: Tensor) -> Norm:
        p = self.layers[layer]
        if self.config.training:
            mean, rate = mean[layer], rate[layer]
        else:
            mean, rate = self.given(p.inner_norm_mean, p.inner_norm_var)
        return self.normalisation(self.wide, p.inner_norm_weight, p.inner_norm_bias, mean, rate)


@torch.no_grad()  # an exported program calls it with parameters that require gradients
def dnl_bottleneck_fwd(x0, tensors, keep, *static):
    """The states, y of every layer [L or 0, b * G * B * H * W], and statistics where the block measures them."""
    config = _config(x0.shape[1], *static)
    dtype, measures = wide_dtype(x0), config.norm is not None and config.training
    batch, width, height, columns = x0.shape
    count, growth = config.num_layers, config.growth_rate
    states = x0.new_empty((batch, width + count * growth, height, columns), dtype=dtype)
    states[:, :width] = x0
    wide = growth * (config.bottleneck or 1)
    layers = _layers(tensors, count)
    inner = states.new_empty(count if keep else 1, wide * batch * height * columns)
    run = _Run(config, states, inner, layers)
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
    return states.to(x0.dtype), kept.to(x0.dtype), mean, var, inner_mean, inner_var


@torch.no_grad()
def dnl_bottleneck_bwd(dstates, states, inner, mean, var, inner_mean, inner_var, tensors, *static):
    """dx0, and for every layer the gradients of TRAINABLE, empty where there is no such tensor."""
    count, growth = len(tensors) // len(NAMES), static[1]
    width = states.shape[1] - count * growth
    config = _config(width, *static)
    dtype, measures = wide_dtype(states), config.norm is not None and config.training
    layers = _layers(tensors, count)
    run = _Run(config, states.to(dtype).contiguous(), inner.to(dtype), layers)
    total = torch.empty_like(run.states).copy_(dstates)  # of every state: what its consumers so far pull, and dOut
    rate, inner_rate = run.rate(var), run.rate(inner_var)
    dy = torch.empty_like(run.output(0))
    found: list[list[Tensor]] = []

    corrections = Corrections(run, total, mean, rate)
    for layer in reversed(range(count)):
        p, slot = layers[layer], run.slot(layer)
        norm, inner_norm = run.norm(layer, mean, rate), run.inner_norm(layer, inner_mean, inner_rate)
        corrections.apply(slot)
        dy, dinner_weight, plain, moment = run.convolve_back(layer, inner_norm, total[:, slot].contiguous(), dy)
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
    return dx0, [gradient for layer in reversed(found) for gradient in layer]
