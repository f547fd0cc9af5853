"""dnl_block in one launch on CUDA: csrc/dnl_block. A block of threads runs all layers of a sample, whose states stay in
shared memory: x_0 and the filters are read once and the states written once, whatever the depth. Without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import differentiable
from . import fused, reference
from .config import AFFINES, BlockConfig, LayerParameters

MAX_LAYERS, MAX_OUTPUTS, MAX_POSITIONS = 64, 32, 1280  # kBlockMax*, kConvMaxPositions


def choose(x0: Tensor, backend: str | None) -> str | None:
    """The backend whose resident kernel this call would run."""
    if backend is None and x0.device.type == "cuda":
        backend = "cuda"
    found = backend is not None and backend.startswith("cuda") and _backend.absence(backend) is None
    return backend if found else None


def shared_bytes(height: int, width: int, config: BlockConfig, element: int) -> tuple[int, int]:
    """Positions of an image with its padding, in whole blocks of 16, and the bytes of shared memory that it needs:
    ConvTiling and BlockLayout in csrc, plus the tables of channels and pixels."""
    size, outputs = AFFINES[config.affine][0], config.growth_rate
    radius, chunk = size // 2, 32 // element
    pitch = width + radius
    positions = -(-((height - 1) * pitch + width) // 16) * 16
    length = (2 * radius * (pitch + 1) + positions + 27) // 32 * 32 + 4
    outputs = next(n for n in (8, 16, 32) if outputs <= n)
    filters = outputs * (size * size * chunk + (8 if element == 2 else 0))
    channels = -(-(config.in_channels + config.num_layers * config.growth_rate) // chunk) * chunk
    return positions, element * ((channels + 2 * chunk) * length + 2 * filters) + 1024


def limit(x0: Tensor, parameters: Sequence[Any], config: BlockConfig, backend: str | None) -> str | None:
    """Why the resident kernel cannot run this call, or None."""
    chosen = choose(x0, backend)
    if chosen is None:
        return "the resident block has a CUDA kernel only"
    if x0.dtype not in _backend.CUDA_DTYPES:
        return f"the resident block is for float32, bfloat16 and float16, not {x0.dtype}"
    if config.norm is not None and config.training:
        return "the resident block sees one sample at a time, not the statistics of the batch"
    if reason := fused.beyond_local(config, "the resident block"):
        return reason
    tensors = [x0, *(t for p in parameters for t in p if t is not None)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "the resident block has no gradients"
    if config.num_layers > MAX_LAYERS:
        return f"the resident block has at most {MAX_LAYERS} layers, not {config.num_layers}"
    if config.growth_rate > MAX_OUTPUTS:
        return f"the resident block has a growth rate of at most {MAX_OUTPUTS}, not {config.growth_rate}"
    height, width = x0.shape[2:]
    positions, needed = shared_bytes(height, width, config, x0.element_size())
    if positions > MAX_POSITIONS:
        return f"images of {height}x{width} have {positions} positions, more than {MAX_POSITIONS}"
    if needed > (available := _backend.shared_memory(x0.device)):
        return (
            f"the states of an image of {height}x{width} and {config.num_layers} layers need {needed} bytes of shared"
            f" memory, of which a block has {available}"
        )
    return None


def dnl_block(x0: Tensor, parameters: Sequence[LayerParameters], config: BlockConfig, backend: str) -> Tensor:
    tensors = [getattr(p, name) for p in parameters for name in fused.NAMES]
    return _function(fused.Call(config, backend), x0, *tensors)


def _forward(call, tensors):
    config, backend = call
    x0, layers = tensors[0], fused.layers_of(config, tensors[1:])
    packed = fused.pack(config, x0, layers, torch.float32)
    packed = packed._replace(weight=packed.weight.to(x0.dtype))
    return (_backend.kernel(backend, "dnl_block_resident")(x0, *packed, *fused.static_arguments(config)),)


def _backward(*_):
    raise AssertionError("`limit` keeps calls with gradients out")


def _reference(call, tensors):
    return reference.dnl_block(tensors[0], fused.layers_of(call.block, tensors[1:]), call.block)[0]


_function = differentiable(_forward, _backward, _reference)
