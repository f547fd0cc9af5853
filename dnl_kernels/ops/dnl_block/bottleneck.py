"""dnl_block with a bottleneck (DenseNet-BC) as one autograd node on the CPU. csrc/dnl_bottleneck computes images, a
whole block in one call each way: nothing is concatenated or activated in memory, statistics are computed once per
channel, and the gradient of a state is corrected for them once, when all of its consumers are known. Signals and
volumes: bottleneck_volumes.py.

Kept for backward: the states, and what each layer's 1x1 convolution made (b * G channels, filled up to whole 16s).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import differentiable
from . import reference
from .config import BlockConfig, LayerParameters, Statistics
from .prefix import flattened, keeps

NAMES = (
    "affine_weight", "affine_bias", "norm_weight", "norm_bias", "norm_mean", "norm_var",
    "inner_weight", "inner_norm_weight", "inner_norm_bias", "inner_norm_mean", "inner_norm_var",
)  # fmt: skip
TRAINABLE = tuple(name for name in NAMES if not name.endswith(("_mean", "_var")))


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
    if not keep and config.spatial_dims == 2 and (config.norm is None or not config.training) and not _has_tangents():
        return evaluate(x0, pack(tensors, config), config), None
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


def prepare(
    x0: Tensor, parameters: Sequence[LayerParameters], config: BlockConfig, backend: str | None
) -> Callable[[Tensor], Tensor] | None:
    """The evaluated block as a function of x0, its weights packed; None where that is for images."""
    if config.spatial_dims != 2:
        return None
    packed = pack([getattr(p, name) for p in parameters for name in NAMES], config)
    return lambda x0: evaluate(x0, packed, config)


def _has_tangents() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def _static(config: BlockConfig) -> tuple:
    return (
        flattened(config.connectivity), config.growth_rate, config.bottleneck, config.norm is not None, config.training,
        config.activation, config.tau, config.eps,
    )  # fmt: skip


def _kernel(config: BlockConfig, direction: str) -> Callable[..., Any]:
    name = "dnl_bottleneck" if config.spatial_dims == 2 else "dnl_bottleneck_volumes"
    return _backend.kernel("cpu", f"{name}_{direction}")


def _forward(config, tensors):
    config, keep = config
    return _kernel(config, "fwd")(tensors[0], tensors[1:], keep, *_static(config))


def _backward(config, dstates, tensors, extra, needs):
    config, _ = config
    dx0, found = _kernel(config, "bwd")(dstates, *extra, tensors[1:], *_static(config))
    gradients = iter(found)
    layers = [dict(zip(TRAINABLE, gradients, strict=False)) for _ in range(config.num_layers)]
    given = iter(tensors[1:])
    return [dx0, *(None if next(given) is None else layer.get(name) for layer in layers for name in NAMES)]


def _reference(config, tensors):
    return reference.dnl_block(tensors[0], layers_of(tensors[1:], config[0].num_layers), config[0])[0]


_function = differentiable(_forward, _backward, _reference, keep_output=True, return_extra=True)


def layers_of(tensors: Sequence[Tensor | None], count: int) -> list[Any]:
    size = len(NAMES)
    rows = [tensors[i * size : (i + 1) * size] for i in range(count)]
    return [LayerParameters(**dict(zip(NAMES, row, strict=True))) for row in rows]
