"""dnl_block as one autograd node: csrc/dnl_block on the CPU, else triton.py. The states buffer is all that grows with
the depth.

The tensors of all layers are packed into one vector per kind; A_l and a_l of an input skip are folded into the filters
of state 0 and the bias (paper's order, where nothing stands between a state and its filter).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import differentiable
from . import reference
from .config import AFFINES, BlockConfig, LayerParameters, Statistics

NAMES = (
    "affine_weight", "affine_bias", "norm_weight", "norm_bias", "norm_mean", "norm_var", "skip_weight", "skip_bias",
)  # fmt: skip


def choose(x0: Tensor, backend: str | None) -> str | None:
    """The backend whose fused kernels this call would run."""
    candidates = ("triton", "cpu") if backend is None else (backend,)
    for name, device in (("triton", "cuda"), ("cpu", "cpu")):
        asked = name == backend or x0.device.type == device
        if name in candidates and asked and _backend.absence(name) is None:
            return name
    return None


def beyond_local(config: BlockConfig, block: str) -> str | None:
    """What the blocks that are one local kernel lack, by the name of the block."""
    if config.spatial_dims != 2:
        return f"{block} takes images, not {config.spatial_dims} dimensions"
    if config.kernel != "local" or config.affine == "linear":
        return f"{block} has kernel='local' and a convolution, not {config.kernel!r} and {config.affine!r}"
    if config.bottleneck is not None:
        return f"{block} has no bottleneck"
    if config.input_skip and config.preactivation:
        return f"{block} has an input skip in the paper's order only"
    return None


def limit(x0: Tensor, parameters: Sequence[Any], config: BlockConfig, backend: str | None) -> str | None:
    """Why the fused kernels cannot run this call, or None. The composition runs every call."""
    chosen = choose(x0, backend)
    if chosen is None:
        return "the fused block has a CPU kernel and one in Triton"
    if chosen == "triton" and x0.dtype == torch.float64:
        return "the fused block in Triton is not for float64"
    if reason := beyond_local(config, "the fused block"):
        return reason
    if any(t is not None and t.requires_grad for p in parameters for t in (p.norm_mean, p.norm_var)):
        return "the fused block takes given statistics as constants"
    return None


class Call(NamedTuple):
    """The static part of a call, hashable."""

    block: BlockConfig
    backend: str


class Packed(NamedTuple):
    """The vectors of all layers, in the dtype that the kernels compute in: see BlockTensors in csrc/dnl_block."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None


def dnl_block(
    x0: Tensor, parameters: Sequence[LayerParameters], config: BlockConfig, backend: str = "cpu"
) -> tuple[Tensor, Statistics | None]:
    if config.training:  # running statistics are not read, and the caller updates them before the backward pass
        parameters = [p._replace(norm_mean=None, norm_var=None) for p in parameters]
    tensors = [getattr(p, name) for p in parameters for name in NAMES]
    states, mean, var, _ = _function(Call(config, backend), x0, *tensors)
    if config.norm is None or not config.training:
        return states, None
    elements = x0.numel() // x0.shape[1]
    if config.preactivation:
        return states, Statistics(mean, var, [], [], [], [], elements)
    growth = config.growth_rate
    return states, Statistics(None, None, [], [], list(mean.split(growth)), list(var.split(growth)), elements)


def layers_of(config: BlockConfig, tensors: Sequence[Tensor | None]) -> list[Any]:
    size = len(NAMES)
    return [
        LayerParameters(**dict(zip(NAMES, tensors[i * size : (i + 1) * size], strict=True)))
        for i in range(config.num_layers)
    ]


def _connectivity(config: BlockConfig) -> list[int]:
    """The lower triangle, row by row; an input skip reads state 0."""
    return [int(read or (config.input_skip and j == 0)) for row in config.connectivity for j, read in enumerate(row)]


def _size(config: BlockConfig) -> int:
    return AFFINES[config.affine][0]


def _filters(config: BlockConfig, layer: int, p: Any, dtype: torch.dtype) -> Tensor:
    """[G, C, k, k] of a layer: K_{l,j}, with A_l / tau added to the block of state 0."""
    if not config.input_skip:
        return p.affine_weight.to(dtype)
    skip = p.skip_weight.to(dtype) / config.tau
    if p.affine_weight is None:
        return skip
    weight, width = p.affine_weight.to(dtype), config.in_channels
    if config.connectivity[layer][0]:
        return torch.cat([weight[:, :width] + skip, weight[:, width:]], 1)
    return torch.cat([skip, weight], 1)


def _vector(parts: Sequence[Tensor | None], sizes: Sequence[int], dtype: torch.dtype, like: Tensor, fill: float):
    """The parts side by side, absent ones filled; None if all are absent."""
    if all(part is None for part in parts):
        return None
    return torch.cat(
        [
            like.new_full((size,), fill, dtype=dtype) if part is None else part.to(dtype)
            for part, size in zip(parts, sizes, strict=True)
        ]
    )


def _norm_sizes(config: BlockConfig) -> list[int]:
    if config.preactivation:
        return [config.layer_channels(layer) for layer in range(config.num_layers)]
    return [config.growth_rate] * config.num_layers


def pack(config: BlockConfig, x0: Tensor, layers: Sequence[Any], dtype: torch.dtype) -> Packed:
    outputs, norms = [config.growth_rate] * config.num_layers, _norm_sizes(config)
    weight = torch.cat([_filters(config, i, p, dtype).reshape(-1) for i, p in enumerate(layers)])
    bias = _vector([p.affine_bias for p in layers], outputs, dtype, x0, 0.0)
    skip = _vector([p.skip_bias for p in layers], outputs, dtype, x0, 0.0)
    if bias is not None and skip is not None:
        bias = bias + skip
    elif bias is None:
        bias = skip
    if config.norm is None:
        return Packed(weight, bias, None, None, None, None)
    gamma = _vector([p.norm_weight for p in layers], norms, dtype, x0, 1.0)
    beta = _vector([p.norm_bias for p in layers], norms, dtype, x0, 0.0)
    if config.training:
        return Packed(weight, bias, gamma, beta, None, None)
    mean = _vector([p.norm_mean for p in layers], norms, dtype, x0, 0.0)
    return Packed(weight, bias, gamma, beta, mean, _vector([p.norm_var for p in layers], norms, dtype, x0, 1.0))


def static_arguments(config: BlockConfig) -> tuple:
    return (
        _connectivity(config), config.growth_rate, _size(config), config.preactivation, config.norm is not None,
        config.training, config.activation, config.tau, config.eps,
    )  # fmt: skip


def _dtypes(x0: Tensor, backend: str) -> tuple[torch.dtype, torch.dtype]:
    """Of the parameters, and of the states: what the CPU kernels compute in, or the states' own."""
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    return dtype, dtype if backend == "cpu" else x0.dtype


def prepare(
    x0: Tensor, parameters: Sequence[LayerParameters], config: BlockConfig, backend: str | None
) -> Callable[[Tensor], Tensor]:
    """The evaluated block as a function of x0, its weights packed."""
    chosen = choose(x0, backend) or ""
    dtype, stored = _dtypes(x0, chosen)
    packed, static = pack(config, x0, parameters, dtype), static_arguments(config)
    kernel = _backend.kernel(chosen, "dnl_block_fwd")
    return lambda x0: kernel(x0.to(stored), *packed, *static)[0].to(x0.dtype)


def _forward(call, tensors):
    config, backend = call
    x0, layers = tensors[0], layers_of(config, tensors[1:])
    dtype, stored = _dtypes(x0, backend)
    packed = pack(config, x0, layers, dtype)
    states, mean, var, outputs = _backend.kernel(backend, "dnl_block_fwd")(
        x0.to(stored), *packed, *static_arguments(config)
    )
    return states.to(x0.dtype), mean, var, outputs


def _backward(call, dstates, tensors, extra, needs):
    config, backend = call
    x0, layers = tensors[0], layers_of(config, tensors[1:])
    states, mean, var, outputs = extra
    dtype, stored = _dtypes(x0, backend)
    packed = pack(config, x0, layers, dtype)
    if config.norm is not None and config.training:
        packed = packed._replace(mean=mean, var=var)
    dx0, dweight, dbias, dgamma, dbeta = _backend.kernel(backend, "dnl_block_bwd")(
        dstates.to(stored), states.to(stored), outputs, *packed, *static_arguments(config)
    )
    sizes = [config.growth_rate * _read_channels(config, i) * _size(config) ** 2 for i in range(config.num_layers)]
    dfilters = dweight.split(sizes)
    dnorm = [v.split(_norm_sizes(config)) if v.numel() else None for v in (dgamma, dbeta)]
    doutput = dbias.split(config.growth_rate) if dbias.numel() else None
    gradients = [dx0.to(x0.dtype)]
    for layer, p in enumerate(layers):
        found = _filter_gradients(config, layer, dfilters[layer], p)
        for name in ("affine_bias", "skip_bias"):
            found[name] = doutput and doutput[layer]
        for name, values in zip(("norm_weight", "norm_bias"), dnorm, strict=True):
            found[name] = values and values[layer]
        for name in NAMES:
            tensor, gradient = getattr(p, name), found.get(name)
            gradients.append(None if tensor is None or gradient is None else gradient.to(tensor.dtype))
    return gradients


def _read_channels(config: BlockConfig, layer: int) -> int:
    extra = config.in_channels if config.input_skip and not config.connectivity[layer][0] else 0
    return config.layer_channels(layer) + extra


def _filter_gradients(config: BlockConfig, layer: int, flat: Tensor, p: Any) -> dict[str, Any]:
    """The gradients of a layer's affine_weight and skip_weight from that of `_filters`."""
    size, width = _size(config), config.in_channels
    gradient = flat.reshape(config.growth_rate, -1, size, size)
    if not config.input_skip:
        return {"affine_weight": gradient}
    skip = gradient[:, :width] / config.tau
    affine = gradient if config.connectivity[layer][0] else gradient[:, width:]
    return {"affine_weight": affine, "skip_weight": skip}


def _reference(call, tensors):
    return reference.dnl_block(tensors[0], layers_of(call.block, tensors[1:]), call.block)[0]


_function = differentiable(_forward, _backward, _reference, keep_output=True, return_extra=True)
