"""The registered operators: one table of schemas with their fakes (shape functions). It imports torch only.

An operator `<op>` has `<op>_fwd` and `<op>_bwd` in the namespace `dnl`, where the dispatcher finds the C++ kernels by
device. Those of TRITON stand in `dnl_triton` too, where it finds the functions of their names in ops/<op>/triton.py,
which is imported at the first call. Autograd is not registered here: see _autograd.py.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMESPACES = ("dnl", "dnl_triton")
# Triton decides by the same variable whether its kernels are interpreted, which happens on CPU tensors.
TRITON_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


class Schema(NamedTuple):
    """python: the module of the package whose function of the operator's name is the CPU kernel, if C++ has none."""

    signature: str
    fake: Callable[..., Any]
    python: str | None = None


def _dense_sum_fwd(states: list[Tensor], weight: Tensor, channel_dim: int) -> Tensor:
    return torch.empty_like(states[0], memory_format=torch.contiguous_format)


def _dense_sum_bwd(dy, states, weight, channel_dim, need_states, need_weight):
    dstates = [torch.empty_like(dy, memory_format=torch.contiguous_format) for _ in states] if need_states else []
    return dstates, weight.new_empty(weight.shape if need_weight else (0, *weight.shape[1:]))


def _dense_conv2d_fwd(states, weight, bias, norm_scale, norm_shift, activation, scale):
    batch, _, height, width = states[0].shape
    return weight.new_empty((batch, weight.shape[0], height, width))


def _dense_conv2d_moments_fwd(states, weight, *rest):
    y = _dense_conv2d_fwd(states, weight, *rest)
    return y, weight.new_empty((2, weight.shape[0]), dtype=torch.float32)


def _dense_linear_fwd(states, weight, bias, norm_scale, norm_shift, activation, scale):
    return weight.new_empty((*states[0].shape[:-1], weight.shape[0]))


def _dense_bwd(
    dy, states, weight, norm_scale, norm_shift, activation, scale, need_states, need_weight, need_bias, need_norm
):
    def gradient(wanted, shape):
        return weight.new_empty(shape if wanted else (0, *shape[1:]))

    return (
        [torch.empty_like(x, memory_format=torch.contiguous_format) for x in states] if need_states else [],
        gradient(need_weight, weight.shape),
        gradient(need_bias, weight.shape[:1]),
        gradient(need_norm and norm_scale is not None, weight.shape[1:2]),
        gradient(need_norm and norm_shift is not None, weight.shape[1:2]),
    )


def _nonlocal_attention_fwd(query, key, value, bandwidth, key_mask, scale, normalize, causal, channels_first):
    B, h = query.shape[:2]
    N, E = query.shape[3 if channels_first else 2], value.shape[2 if channels_first else 3]
    row = torch.empty((B, h, N), dtype=_accumulation_dtype(query), device=query.device)
    return query.new_empty((B, h, E, N) if channels_first else (B, h, N, E)), row, torch.empty_like(row)


def _nonlocal_attention_bwd(
    doutput, query, key, value, bandwidth, key_mask, output, shift, sum, scale, normalize, causal, channels_first,
    need_bandwidth,
):  # fmt: skip
    dbandwidth = shift.new_empty((query.shape[1] if need_bandwidth else 0,))
    return *(t.new_empty(t.shape) for t in (query, key, value)), dbandwidth


def _accumulation_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


_LAYER_TAIL = (
    "Tensor[] states, Tensor? skip_input, Tensor affine_weight, Tensor? affine_bias, Tensor? norm_scale,"
    " Tensor? norm_shift, Tensor query_weight, Tensor? query_bias, Tensor? key_weight, Tensor? key_bias,"
    " Tensor value_weight, Tensor? value_bias, Tensor output_weight, Tensor? output_bias, Tensor? rho,"
    " Tensor? output_scale, Tensor? output_shift, Tensor? skip_weight, Tensor? skip_bias, str kernel, str activation,"
    " float tau, str input_activation, int heads, bool residual"
)


def _dnl_layer_fwd(states, skip_input, affine_weight, *others):
    result, first = others[9].shape[0], states[0]
    shape = (*first.shape[:2], result) if first.dim() == 3 else (first.shape[0], result, *first.shape[2:])
    return first.new_empty(shape)


def _dnl_layer_bwd(dout, states, skip_input, *others):
    *parameters, need_states, need_parameters = others
    given = [p for p in parameters[:17] if p is not None]
    inputs = [*states, *([] if skip_input is None else [skip_input])]
    return (
        [t.new_empty(t.shape) for t in inputs] if need_states else [],
        dout.new_empty(sum(p.numel() for p in given) if need_parameters else 0),
    )


_ATTEND = (
    "Tensor[] weights, Tensor?[] biases, Tensor output_weight, Tensor? output_bias, Tensor? bandwidth, int heads,"
    " bool residual"
)


def attends_in_groups(kernel: str, value_weight: Tensor) -> bool:
    """Whether `dnl_layer_attend` is a layer's N on the CPU: products of more channels are faster in torch's GEMM."""
    return kernel != "dot" and value_weight.shape[1] <= 64


def _dnl_layer_attend(y, weights, biases, output_weight, output_bias, bandwidth, heads, residual, out):
    row = y.new_empty((y.shape[0], heads, y.shape[2]), dtype=_accumulation_dtype(y))
    return y.new_empty((y.shape[0], weights[-1].shape[0], y.shape[2])), row, torch.empty_like(row)


def _dnl_layer_attend_pull(dx, y, attended, shift, total, weights, biases, output_weight, output_bias, bandwidth, *_):
    def gradient(t):
        return shift.new_empty((0,) if t is None else t.shape)

    maps = [gradient(w) for w in weights], [gradient(b) for b in biases]
    return *maps, *map(gradient, (output_weight, output_bias, bandwidth))


def _dnl_block_fwd(
    x0, weight, bias, gamma, beta, mean, var, connectivity, growth_rate, size, preactivation, norm, training,
    activation, tau, eps,
):  # fmt: skip
    batch, in_channels, height, width = x0.shape
    grown = growth_rate * _layers(connectivity)
    measured = (in_channels if preactivation else 0) + grown if norm and training else 0
    return (
        x0.new_empty((batch, in_channels + grown, height, width)),
        weight.new_empty(measured),
        weight.new_empty(measured),
        x0.new_empty((batch, 0 if preactivation else grown, height, width)),
    )


def _dnl_block_resident(x0, weight, bias, gamma, beta, mean, var, connectivity, growth_rate, *_):
    batch, in_channels, height, width = x0.shape
    return x0.new_empty((batch, in_channels + growth_rate * _layers(connectivity), height, width))


def _dnl_block_bwd(
    dstates, states, outputs, weight, bias, gamma, beta, mean, var, connectivity, growth_rate, size, preactivation,
    norm, training, activation, tau, eps,
):  # fmt: skip
    batch, channels, height, width = states.shape
    grown = growth_rate * _layers(connectivity)
    norms = 0
    if norm:
        norms = weight.numel() // (growth_rate * size * size) if preactivation else grown
    return (
        states.new_empty((batch, channels - grown, height, width)),
        weight.new_empty(weight.numel()),
        weight.new_empty(0 if bias is None else grown),
        weight.new_empty(norms),
        weight.new_empty(norms),
    )


def _dnl_bottleneck_fwd(x0, tensors, keep, connectivity, growth_rate, bottleneck, norm, training, activation, tau, eps):
    batch, in_channels, *spatial = x0.shape
    layers, wide = _layers(connectivity), growth_rate * bottleneck
    channels, measured = in_channels + layers * growth_rate, norm and training
    vector = x0.new_empty(channels if measured else 0, dtype=_accumulation_dtype(x0))
    inner = vector.new_empty(layers if measured else 0, wide)
    states = x0.new_empty((batch, channels, *spatial))
    padded = -(-wide // 16) * 16 if len(spatial) == 2 else wide  # the kernels' vectors are whole
    kept = x0.new_empty(layers if keep else 0, padded * batch * math.prod(spatial))
    return states, kept, vector, torch.empty_like(vector), inner, torch.empty_like(inner)


def _dnl_bottleneck_bwd(
    dstates, states, inner, mean, var, inner_mean, inner_var, tensors, connectivity, growth_rate, bottleneck, norm,
    training, activation, tau, eps,
):  # fmt: skip
    layers = _layers(connectivity)
    batch, channels, *spatial = states.shape
    size = len(tensors) // layers
    trainable = [t for i, t in enumerate(tensors) if i % size not in (4, 5, 9, 10)]  # all but statistics
    return (
        states.new_empty((batch, channels - layers * growth_rate, *spatial)),
        [states.new_empty(0) if t is None else t.new_empty(t.shape) for t in trainable],
    )


def _dnl_bottleneck_pack(tensors, connectivity, in_channels, growth_rate, bottleneck, norm, tau, eps):
    """As csrc/dnl_bottleneck/cpu.cpp lays them out: vectors and matrices, each filled up to whole blocks of 16."""
    block, points = 16, 16
    wide, growth = (-(-n // block) * block for n in (growth_rate * bottleneck, growth_rate))
    numbers, row, layers = 0, list(connectivity), _layers(connectivity)
    for layer in range(layers):
        read, row = row[: layer + 1], row[layer + 1 :]
        channels = sum((growth_rate if j else in_channels) for j, connected in enumerate(read) if connected)
        numbers += 2 * (-(-channels // block) * block) + wide * (channels + 1) + points * wide * growth
    weight = tensors[0]
    return weight.new_empty(numbers, dtype=_accumulation_dtype(weight))


def _dnl_bottleneck_eval(x0, packed, connectivity, growth_rate, *_):
    batch, in_channels, height, width = x0.shape
    return x0.new_empty((batch, in_channels + growth_rate * _layers(connectivity), height, width))


def _dnl_nonlocal_block_fwd(
    x0, tensors, keep, connectivity, growth_rate, affine, kernel, heads, norm, training, preactivation, *_
):  # fmt: skip
    layers, tokens = _layers(connectivity), affine == "linear"
    size = len(tensors) // layers
    in_channels, batch = x0.shape[-1 if tokens else 1], x0.shape[0]
    channels = in_channels + layers * growth_rate
    numbers = x0.shape[1] if tokens else x0.shape[2] * x0.shape[3]

    def buffer(features: int) -> Tensor:
        shape = (batch, numbers, features) if tokens else (batch, features, *x0.shape[2:])
        return x0.new_empty(shape)

    measured = (channels,) if preactivation else (layers, growth_rate)
    mean = x0.new_empty(measured if norm and training else 0, dtype=_accumulation_dtype(x0))
    kept: list[Tensor] = []
    for layer in range(layers if keep else 0):
        value = tensors[layer * size + _NONLOCAL_VALUE]
        kept.append(buffer(growth_rate))
        if attends_in_groups(kernel, value):
            kept.append(x0.new_empty((batch, value.shape[0], numbers)))
        else:
            width = value.shape[0] // heads
            kept.append(x0.new_empty((batch, heads, numbers, width) if tokens else (batch, heads, width, numbers)))
        if kernel != "dot":
            kept += [x0.new_empty((batch, heads, numbers), dtype=_accumulation_dtype(x0)) for _ in range(2)]
    return buffer(channels), mean, torch.empty_like(mean), kept


def _dnl_nonlocal_block_bwd(dstates, states, mean, var, kept, tensors, connectivity, growth_rate, affine, *_):
    layers, tokens = _layers(connectivity), affine == "linear"
    size = len(tensors) // layers
    shape = list(states.shape)
    shape[-1 if tokens else 1] -= layers * growth_rate
    trainable = [t for i, t in enumerate(tensors) if i % size not in (4, 5)]  # all but statistics
    return states.new_empty(shape), [states.new_empty(0) if t is None else t.new_empty(t.shape) for t in trainable]


def _layers(triangle: list[int]) -> int:
    layers = 0
    while layers * (layers + 1) // 2 < len(triangle):
        layers += 1
    return layers


_BOTTLENECK_TAIL = (
    "Tensor?[] tensors,{} int[] connectivity, int growth_rate, int bottleneck, bool norm, bool training,"
    " str activation, float tau, float eps)"
)
_NONLOCAL = "ops.dnl_block.non_local"
_NONLOCAL_VALUE = 10  # where value_weight stands among the tensors of a layer
_NONLOCAL_TAIL = (
    "Tensor?[] tensors,{} int[] connectivity, int growth_rate, str affine, str kernel, int heads, bool norm,"
    " bool training, bool preactivation, bool input_skip, bool residual, str activation, float tau, float eps)"
)
_BOTTLENECK_FWD = (
    f"(Tensor x0, {_BOTTLENECK_TAIL.format(' bool keep,')} -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BOTTLENECK_BWD = (
    "(Tensor dstates, Tensor states, Tensor inner, Tensor mean, Tensor var, Tensor inner_mean, Tensor inner_var,"
    f" {_BOTTLENECK_TAIL.format('')} -> (Tensor, Tensor[])"
)
_VOLUMES = "ops.dnl_block.bottleneck_volumes"

_BLOCK_TAIL = (
    "Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, int[] connectivity,"
    " int growth_rate, int size, bool preactivation, bool norm, bool training, str activation, float tau, float eps)"
)

_DENSE_FWD = (
    "(Tensor[] states, Tensor weight, Tensor? bias, Tensor? norm_scale, Tensor? norm_shift, str activation,"
    " float scale)"
)
_DENSE_BWD = (
    "(Tensor dy, Tensor[] states, Tensor weight, Tensor? norm_scale, Tensor? norm_shift, str activation,"
    " float scale, bool need_states, bool need_weight, bool need_bias, bool need_norm)"
    " -> (Tensor[], Tensor, Tensor, Tensor, Tensor)"
)

SCHEMAS: dict[str, Schema] = {
    "dense_sum_fwd": Schema("(Tensor[] states, Tensor weight, int channel_dim) -> Tensor", _dense_sum_fwd),
    # CPU: sums_t (+)= sum_j w_{t,j} x_j in the dtype of accumulation, each state read once for all sums
    "dense_sum_add": Schema(
        "(Tensor(a!)[] sums, Tensor[] states, Tensor weight, bool accumulate, int channel_dim) -> ()", lambda *_: None
    ),
    "dense_sum_bwd": Schema(
        "(Tensor dy, Tensor[] states, Tensor weight, int channel_dim, bool need_states, bool need_weight)"
        " -> (Tensor[], Tensor)",
        _dense_sum_bwd,
    ),
    "dense_linear_fwd": Schema(f"{_DENSE_FWD} -> Tensor", _dense_linear_fwd),
    "dense_linear_bwd": Schema(_DENSE_BWD, _dense_bwd),
    "dense_conv2d_fwd": Schema(f"{_DENSE_FWD} -> Tensor", _dense_conv2d_fwd),
    # CUDA: also the sums of y and of y^2 over the pixels, [2, D] in float32
    "dense_conv2d_moments_fwd": Schema(f"{_DENSE_FWD} -> (Tensor, Tensor)", _dense_conv2d_moments_fwd),
    "dense_conv2d_bwd": Schema(_DENSE_BWD, _dense_bwd),
    # CPU: the gradients of the states are added to `total`. Never seen by autograd or torch.compile.
    "dense_conv2d_pull": Schema(
        "(Tensor dy, Tensor[] states, Tensor weight, Tensor? norm_scale, Tensor? norm_shift, str activation,"
        " float scale, Tensor(a!)[] total) -> (Tensor, Tensor, Tensor, Tensor)",
        lambda dy, states, weight, *_: (
            weight.new_empty(weight.shape),
            *(weight.new_empty(weight.shape[i]) for i in (0, 1, 1)),
        ),
    ),
    # CUDA: float32 multiplied as tf32, where torch's setting allows it
    "dense_conv2d_tf32_fwd": Schema(f"{_DENSE_FWD} -> Tensor", _dense_conv2d_fwd),
    "dense_conv2d_tf32_bwd": Schema(_DENSE_BWD, _dense_bwd),
    "nonlocal_attention_fwd": Schema(
        "(Tensor query, Tensor key, Tensor value, Tensor? bandwidth, Tensor? key_mask, float scale, bool normalize,"
        " bool causal, bool channels_first) -> (Tensor, Tensor, Tensor)",
        _nonlocal_attention_fwd,
    ),
    "nonlocal_attention_bwd": Schema(
        "(Tensor doutput, Tensor query, Tensor key, Tensor value, Tensor? bandwidth, Tensor? key_mask, Tensor output,"
        " Tensor shift, Tensor sum, float scale, bool normalize, bool causal, bool channels_first,"
        " bool need_bandwidth) -> (Tensor, Tensor, Tensor, Tensor)",
        _nonlocal_attention_bwd,
    ),
    "dnl_layer_fwd": Schema(f"({_LAYER_TAIL}) -> Tensor", _dnl_layer_fwd),
    "dnl_layer_bwd": Schema(
        f"(Tensor dout, {_LAYER_TAIL}, bool need_states, bool need_parameters) -> (Tensor[], Tensor)", _dnl_layer_bwd
    ),
    # CPU: the layer's non-local operator with its projections, the result into `out`, and its backward, the gradient of
    # y into `dy`. Never seen by autograd or torch.compile.
    "dnl_layer_attend": Schema(f"(Tensor y, {_ATTEND}, Tensor(a!) out) -> (Tensor, Tensor, Tensor)", _dnl_layer_attend),
    "dnl_layer_attend_pull": Schema(
        f"(Tensor dx, Tensor y, Tensor attended, Tensor shift, Tensor sum, {_ATTEND}, Tensor(a!) dy)"
        " -> (Tensor[], Tensor[], Tensor, Tensor, Tensor)",
        _dnl_layer_attend_pull,
    ),
    "dnl_block_fwd": Schema(f"(Tensor x0, {_BLOCK_TAIL} -> (Tensor, Tensor, Tensor, Tensor)", _dnl_block_fwd),
    "dnl_block_resident": Schema(f"(Tensor x0, {_BLOCK_TAIL} -> Tensor", _dnl_block_resident),
    "dnl_block_bwd": Schema(
        f"(Tensor dstates, Tensor states, Tensor outputs, {_BLOCK_TAIL} -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _dnl_block_bwd,
    ),
    "dnl_bottleneck_fwd": Schema(_BOTTLENECK_FWD, _dnl_bottleneck_fwd),
    "dnl_bottleneck_bwd": Schema(_BOTTLENECK_BWD, _dnl_bottleneck_bwd),
    "dnl_bottleneck_volumes_fwd": Schema(_BOTTLENECK_FWD, _dnl_bottleneck_fwd, _VOLUMES),
    "dnl_bottleneck_volumes_bwd": Schema(_BOTTLENECK_BWD, _dnl_bottleneck_bwd, _VOLUMES),
    # CPU, in evaluation: the layers' weights as the kernels read them, normalisations folded in, and the block with
    # them. Never seen by autograd or torch.compile.
    "dnl_bottleneck_pack": Schema(
        "(Tensor?[] tensors, int[] connectivity, int in_channels, int growth_rate, int bottleneck, bool norm,"
        " float tau, float eps) -> Tensor",
        _dnl_bottleneck_pack,
    ),
    "dnl_bottleneck_eval": Schema(
        "(Tensor x0, Tensor packed, int[] connectivity, int growth_rate, int bottleneck, str activation) -> Tensor",
        _dnl_bottleneck_eval,
    ),
    "dnl_nonlocal_block_fwd": Schema(
        f"(Tensor x0, {_NONLOCAL_TAIL.format(' bool keep,')} -> (Tensor, Tensor, Tensor, Tensor[])",
        _dnl_nonlocal_block_fwd,
        _NONLOCAL,
    ),
    "dnl_nonlocal_block_bwd": Schema(
        "(Tensor dstates, Tensor states, Tensor mean, Tensor var, Tensor[] kept,"
        f" {_NONLOCAL_TAIL.format('')} -> (Tensor, Tensor[])",
        _dnl_nonlocal_block_bwd,
        _NONLOCAL,
    ),
    # CPU, in evaluation: a transition, the pooling behind a stem and that in front of a classifier; never seen by
    # autograd or torch.compile.
    "transition_pack": Schema(
        "(Tensor weight, Tensor? bias, Tensor?[] norm, float eps) -> Tensor",
        lambda weight, *_: weight.new_empty(
            2 * (-(-weight.shape[1] // 16) * 16) + (-(-weight.shape[0] // 16) * 16) * (weight.shape[1] + 1),
            dtype=_accumulation_dtype(weight),
        ),
    ),
    "transition_eval": Schema(
        "(Tensor x, Tensor packed, int outputs, str activation, bool pool) -> Tensor",
        lambda x, packed, outputs, activation, pool: x.new_empty(
            (x.shape[0], outputs, *(n // 2 if pool else n for n in x.shape[2:]))
        ),
    ),
    "norm_activation_max_pool": Schema(
        "(Tensor x, Tensor scale, Tensor shift, str activation) -> Tensor",
        lambda x, *_: x.new_empty((*x.shape[:2], *((n + 1) // 2 for n in x.shape[2:]))),
    ),
    "norm_activation_mean": Schema(
        "(Tensor x, Tensor scale, Tensor shift, str activation) -> Tensor", lambda x, *_: x.new_empty(x.shape[:2])
    ),
    # CPU: the passes over memory of act(norm(x)); never seen by autograd or torch.compile.
    "norm_activation_moments": Schema(
        "(Tensor x) -> (Tensor, Tensor)", lambda x: (x.new_empty(x.shape[1]), x.new_empty(x.shape[1]))
    ),
    "norm_activation_fwd": Schema(
        "(Tensor x, Tensor scale, Tensor shift, str activation, Tensor(a!) out, bool pool=False) -> ()", lambda *_: None
    ),
    "norm_activation_pull": Schema(
        "(Tensor dz, Tensor x, Tensor scale, Tensor shift, Tensor mean, str activation, bool accumulate,"
        " Tensor(a!) total, bool pool=False) -> (Tensor, Tensor)",
        lambda dz, x, *_: (x.new_empty(x.shape[1]), x.new_empty(x.shape[1])),
    ),
    "norm_activation_correct": Schema(
        "(Tensor x, Tensor rate, Tensor mean, Tensor constant, Tensor(a!) total) -> ()", lambda *_: None
    ),
}

TRITON = {
    f"{op}_{way}"
    for op in ("dense_sum", "dense_linear", "dense_conv2d", "nonlocal_attention", "dnl_layer", "dnl_block")
    for way in ("fwd", "bwd")
}

_libraries: list[torch.library.Library] = []  # a Library withdraws its definitions when it is collected


def define(namespaces: tuple[str, ...] = NAMESPACES) -> None:
    """Defines the operators of the table in each namespace. Called once, before the compiled library is loaded."""
    for namespace in namespaces:
        library = torch.library.Library(namespace, "DEF")
        for name, schema in SCHEMAS.items():
            if namespace == "dnl_triton" and name not in TRITON:
                continue
            library.define(name + schema.signature, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{namespace}::{name}", schema.fake, lib=library)
            if namespace == "dnl_triton":
                for device in TRITON_DEVICES:
                    library.impl(name, _in_python(f"ops.{name.rpartition('_')[0]}.triton", name), device.upper())
            elif schema.python:
                library.impl(name, _in_python(schema.python, name), "CPU")
        _libraries.append(library)


def _in_python(module: str, name: str) -> Callable[..., Any]:
    def implementation(*arguments):
        return getattr(importlib.import_module("dnl_kernels." + module), name)(*arguments)

    return implementation
