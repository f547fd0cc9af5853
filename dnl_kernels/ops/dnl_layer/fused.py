"""dnl_layer as one autograd node. On CUDA in one launch, csrc/dnl_layer: a block of threads makes a sample in shared
memory, so each state is read once and nothing but the result is written. In Triton in two: triton.py. Either backward
computes everything again from the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import differentiable
from . import reference
from .config import LayerConfig, NonLocalParameters

MAX_STATES, MAX_WIDTH = 128, 32  # kLayerMaxStates, kLayerWidth
LISTED = (1, 8, 64)  # Triton: how many states are parameters of its kernel; it compiles once for each
# Triton: channels of y, of a head and of the result, which a tile has all of. float32 operands fill the registers.
TRITON_WIDTH, TRITON_WIDTH_FLOAT32 = 128, 64
CHUNK, BACKWARD_CHUNK = 16, 8
PARAMETERS = (  # in the order of the registered operator
    "affine_weight", "affine_bias", "norm_scale", "norm_shift", "query_weight", "query_bias", "key_weight", "key_bias",
    "value_weight", "value_bias", "output_weight", "output_bias", "rho", "output_scale", "output_shift", "skip_weight",
    "skip_bias",
)  # fmt: skip


class Config(NamedTuple):
    layer: LayerConfig
    backend: str


def shared_bytes(
    positions: int, width: int, result: int, query: int, value: int, kernel: str, backward: bool, norm: bool,
    output_norm: bool, half: bool,
) -> int:  # fmt: skip
    """The shared memory of a block: LayerLayout and LayerBackwardLayout in csrc/dnl_layer, plus the channel tables.
    half: on tensor cores, whose operands are padded to 16 and kept in 2 bytes."""
    unit = 16 if half else 4
    query, value, columns = (-(-n // unit) * unit for n in (query, value, positions))
    width_padded, result_padded = (-(-n // unit) * unit if half else n for n in (width, result))
    stride = columns + 4 * (columns // 4 % 2 == 0)
    matrix = columns / 2 if half else stride  # floats for each channel of a product's operand
    biases = 2 * query + value
    weights = max(2 * width_padded * CHUNK, width_padded * biases + result_padded * value) / (2 if half else 1)
    rows, operands = width + result + half, query + value
    floats = rows * stride + operands * matrix
    if backward:
        operands = (1 if kernel == "gaussian" else 2) * query + 2 * value + max(query, value)
        chunk = 2 * CHUNK * matrix + 8 * 2 * CHUNK if half else BACKWARD_CHUNK * (3 if norm else 1) * stride
        head = operands * matrix + (3 + half) * stride
        floats = (2 * width + result) * stride + max(head, chunk, 2 * result * output_norm * stride)
    return int(4 * (floats + weights + biases)) + 2048


def limit(states: Sequence[Tensor], named: dict[str, Tensor | None], config: LayerConfig) -> str | None:
    """Why the fused kernel cannot run this call, or None. The composition runs every call."""
    affine, first = named["affine_weight"], states[0]
    assert affine is not None
    if config.kernel == "local":
        return "the fused layer has a non-local kernel, not 'local'"
    if affine.dim() == 4 and affine.shape[2] != 1:
        return f"the fused layer accumulates tokens or 1x1 convolutions, not {affine.shape[2]}x{affine.shape[3]}"
    if len(states) > MAX_STATES:
        return f"the fused layer takes at most {MAX_STATES} states, not {len(states)}"
    query, value, output = (named[f"theta.{name}_weight"] for name in ("query", "value", "output"))
    assert query is not None and value is not None and output is not None
    widths = query.shape[0] // config.heads, value.shape[0] // config.heads
    if max(widths) > MAX_WIDTH:
        return f"the fused layer has heads of width {MAX_WIDTH} at most, not {max(widths)}"
    positions = first.shape[2] * first.shape[3] if affine.dim() == 4 else first.shape[1]
    tensors = [*states, *named.values()]
    backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    norm, output_norm = (
        any(named[f"{name}_{part}"] is not None for part in ("scale", "shift")) for name in ("norm", "output")
    )
    sizes, half = (positions, affine.shape[0], output.shape[0], *widths), first.element_size() == 2
    needed = shared_bytes(*sizes, config.kernel, backward, norm, output_norm, half)
    if needed > (available := _backend.shared_memory(first.device)):
        return (
            f"a sample of {positions} positions needs {needed} bytes of shared memory"
            f"{' for backward' if backward else ''}, of which a block has {available}"
        )
    return None


def triton_limit(states: Sequence[Tensor], named: dict[str, Tensor | None], config: LayerConfig) -> str | None:
    """Why the two kernels of ops/dnl_layer/triton.py cannot run this call, or None."""
    if config.kernel not in ("softmax", "gaussian"):
        return "the fused layer in Triton has exponential weights; of others the products are a library's"
    if len(states) > LISTED[-1]:
        return f"the fused layer in Triton takes at most {LISTED[-1]} states, not {len(states)}"
    affine, query, value, output = (
        named[name] for name in ("affine_weight", "theta.query_weight", "theta.value_weight", "theta.output_weight")
    )
    assert affine is not None and query is not None and value is not None and output is not None
    widths = affine.shape[0], query.shape[0] // config.heads, value.shape[0] // config.heads, output.shape[0]
    most = TRITON_WIDTH_FLOAT32 if affine.dtype == torch.float32 else TRITON_WIDTH
    if max(widths) > most:
        return f"the fused layer in Triton has tiles of {most} channels at most in {affine.dtype}, not {max(widths)}"
    return None


def choose(
    states: Sequence[Tensor], named: dict[str, Tensor | None], config: LayerConfig, backend: str | None
) -> str | None:
    """The backend whose fused kernels run this call, or None: it is composed of other operators."""
    chosen = _backend.select("dnl_layer", backend, states[0], states=states, named=named, config=config)
    fits = chosen == "triton" and triton_limit(states, named, config) is None
    return chosen if fits or chosen.startswith("cuda") else None


def dnl_layer(states: Sequence[Tensor], named: dict[str, Tensor | None], config: LayerConfig, backend: str) -> Tensor:
    """named: every other tensor by the name of its argument in api.py."""
    parameters = [named[name if name in named else f"theta.{name}"] for name in PARAMETERS]
    return _function(Config(config, backend), named["skip_input"], *parameters, *states)


def _split(tensors):
    skip, *others = tensors
    return skip, others[: len(PARAMETERS)], others[len(PARAMETERS) :]


def _static(config: LayerConfig):
    return config.kernel, config.activation, config.tau, config.input_activation, config.heads, config.residual


def _forward(config, tensors):
    skip, parameters, states = _split(tensors)
    run = _backend.kernel(config.backend, "dnl_layer_fwd")
    return (run(states, skip, *parameters, *_static(config.layer)),)


def _backward(config, dout, tensors, extra, needs):
    skip, parameters, states = _split(tensors)
    run = _backend.kernel(config.backend, "dnl_layer_bwd")
    need_skip, need_parameters, need_states = needs[0], needs[1 : 1 + len(PARAMETERS)], needs[1 + len(PARAMETERS) :]
    dstates, flat = run(
        dout, states, skip, *parameters, *_static(config.layer), need_skip or any(need_states), any(need_parameters)
    )
    dskip = dstates.pop() if skip is not None and dstates else None
    dparameters: list[Tensor | None] = [None] * len(parameters)
    if any(need_parameters):
        given = [i for i, p in enumerate(parameters) if p is not None]
        for i, gradient in zip(given, flat.split([parameters[i].numel() for i in given]), strict=True):
            dparameters[i] = gradient.view(parameters[i].shape)
    return dskip, *dparameters, *(dstates or [None] * len(states))


def _reference(config, tensors):
    skip, parameters, states = _split(tensors)
    p = dict(zip(PARAMETERS, parameters, strict=True))
    return reference.dnl_layer(
        states,
        p["affine_weight"],
        p["affine_bias"],
        NonLocalParameters(**{name: p[name] for name in NonLocalParameters._fields}),
        (p["norm_scale"], p["norm_shift"]),
        (p["output_scale"], p["output_shift"]),
        None if skip is None else (skip, p["skip_weight"], p["skip_bias"]),
        config.layer,
    )


_function = differentiable(_forward, _backward, _reference)
