"""dense_conv2d: validate -> select -> autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import affine_in_autocast, differentiable
from ..._checks import check_affine, check_states, check_vectors, fail, shape
from . import reference

OP = "dense_conv2d"
CUDA_LIMITS = {"states": 96, "outputs": 32, "pixels in a row": 128}  # kConvMax*
CUDA_SIZES = (1, 3)


def _cuda_limit(states: int, outputs: int, size: int, width: int) -> str | None:
    for (name, most), given in zip(CUDA_LIMITS.items(), (states, outputs, width), strict=True):
        if given > most:
            return f"takes at most {most} {name}, not {given}"
    return None if size in CUDA_SIZES else f"takes filters of 1x1 and 3x3, not {size}x{size}"


_CUDA = _backend.CUDA._replace(limit=_cuda_limit)
_backend.declare(OP, cpu=_backend.CPU, triton=_backend.TRITON, cuda=_CUDA)


class Config(NamedTuple):
    activation: str
    scale: float
    backend: str
    tf32: bool = False  # float32 is multiplied as tf32: only the CUDA kernels' own choice, Triton's asks by itself


def dense_conv2d(
    states: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    activation: str = "identity",
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """y = scale * sum_j W_j (*) act(norm_scale x_j + norm_shift) + bias, a convolution over J states.

    The concatenation of the states is never made. The zero padding, as wide as keeps H and W, comes after the
    activation, as in a DenseNet layer.

    Args:
        states: J >= 1 tensors [B, C_j, H, W] of one dtype and device, any strides; C = sum C_j.
        weight: [D, C, k, k], k odd, blocks W_j in the order of the states; dtype and device of the states.
        bias: [D], or None.
        norm_scale, norm_shift: [C] each, the folded normalisation of every channel, or None for 1 and 0.
        activation: "identity", "relu", "leaky_relu" (slope 0.01), "leaky_relu(0.2)" (any slope),
            "tanh", "gelu" (exact) or "silu".
        scale: a number, the step tau of a DNL layer.
        backend: None (the best), "reference", "cpu", "triton" or "cuda".

    Returns:
        [B, D, H, W], contiguous, in the dtype of the states. Half types accumulate in float32. On a GPU float32 is
        multiplied as tf32 where `torch.backends.cuda.matmul.fp32_precision` is "tf32", and as float32 by default.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value, named in the message.

    Source: DNL Def. 1 with K_{l,j} a convolution (concatenation is a sum over blocks); DenseNet's BN-ReLU-Conv.
    """
    if torch._C._is_any_autocast_enabled():
        tensors = (states, weight, bias, norm_scale, norm_shift)
        y = affine_in_autocast(dense_conv2d, *tensors, activation=activation, scale=scale, backend=backend)
        if y is not None:
            return y
    states = check_states(OP, states)
    first, channels = states[0], 0
    check_affine(OP, first, weight, bias, norm_scale, norm_shift, activation, scale)
    batch, image = first.shape[:1], first.shape[2:]
    for j, state in enumerate(states):
        size = state.shape
        if len(size) != 4:
            fail(OP, f"states[{j}]", shape(state), "4 dimensions [B, C_j, H, W]")
        if size[:1] != batch or size[2:] != image:
            expected = [*batch, "C_j", *image]
            fail(OP, f"states[{j}]", shape(state), f"[{', '.join(map(str, expected))}], as states[0]")
        channels += size[1]
    size = weight.shape
    if len(size) != 4:
        fail(OP, "weight", shape(weight), "4 dimensions [D, sum C_j, k, k]")
    outputs, given, height, width = size
    if height % 2 == 0:
        fail(OP, "weight", shape(weight), f"[D, {channels}, k, k] with k odd")
    if given != channels or height != width:
        fail(OP, "weight", shape(weight), f"{[outputs, channels, height, height]} (D, sum C_j, k, k)")
    check_vectors(OP, outputs, channels, bias, norm_scale, norm_shift)
    chosen = _backend.select(OP, backend, first, states=len(states), outputs=outputs, size=width, width=image[1])
    if chosen == "reference":
        return reference.dense_conv2d(states, weight, bias, norm_scale, norm_shift, activation, scale)
    tf32 = chosen.startswith("cuda") and _backend.allows_tf32(weight.dtype)
    return _function(Config(activation, float(scale), chosen, tf32), weight, bias, norm_scale, norm_shift, *states)


def _kernel(config: Config, way: str) -> Callable:
    return _backend.kernel(config.backend, f"dense_conv2d{'_tf32' if config.tf32 else ''}_{way}")


def _forward(config, tensors):
    weight, bias, norm_scale, norm_shift, *states = tensors
    return (_kernel(config, "fwd")(states, weight, bias, norm_scale, norm_shift, config.activation, config.scale),)


def _backward(config, dy, tensors, extra, needs):
    weight, _, norm_scale, norm_shift, *states = tensors
    dstates, dweight, dbias, dscale, dshift = _kernel(config, "bwd")(
        dy, states, weight, norm_scale, norm_shift, config.activation, config.scale,
        any(needs[4:]), needs[0], needs[1], needs[2] or needs[3],
    )  # fmt: skip
    return dweight, dbias, dscale, dshift, *(dstates or [None] * len(states))


def _reference(config, tensors):
    weight, bias, norm_scale, norm_shift, *states = tensors
    return reference.dense_conv2d(states, weight, bias, norm_scale, norm_shift, config.activation, config.scale)


_function = differentiable(_forward, _backward, _reference)
