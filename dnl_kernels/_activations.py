"""The pointwise activations by name: sigma(x), and sigma'(x) * g given x.

Both are differentiable PyTorch, so a derivative of the derivative is right too. It imports torch only.

A name is one of KINDS, or "leaky_relu(s)" with a number s, as torch.nn.LeakyReLU(s); "leaky_relu" alone has torch's
default. `parse` is where names are read; the C++ operators take them as they are, having been read here before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
LEAKY_SLOPE = 0.01


class Activation(NamedTuple):
    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]  # (g, x) -> sigma'(x) * g


KINDS: dict[str, Callable[[float], Activation]] = {  # given the slope, which only leaky_relu has
    "identity": lambda _: Activation(lambda x: x, lambda g, x: g),
    "relu": lambda _: Activation(F.relu, lambda g, x: aten.threshold_backward(g, x, 0)),
    "leaky_relu": lambda slope: Activation(
        lambda x: F.leaky_relu(x, slope), lambda g, x: aten.leaky_relu_backward(g, x, slope, False)
    ),
    "tanh": lambda _: Activation(torch.tanh, lambda g, x: aten.tanh_backward(g, torch.tanh(x))),
    "gelu": lambda _: Activation(F.gelu, aten.gelu_backward),
    "silu": lambda _: Activation(F.silu, aten.silu_backward),
}
NAMES = "identity, relu, leaky_relu, leaky_relu(SLOPE), tanh, gelu, silu"  # for messages


def parse(activation: str) -> tuple[str, float]:
    """(kind, slope) of an activation's name. Raises ValueError for any other string."""
    if activation in KINDS:
        return activation, LEAKY_SLOPE
    kind, slope = activation, LEAKY_SLOPE
    if activation.startswith("leaky_relu(") and activation.endswith(")"):
        kind, number = "leaky_relu", activation[len("leaky_relu(") : -1]
        if not all(c in "+-.0123456789eE" for c in number):  # what Python and C++ read alike
            raise ValueError(f"the slope of {activation!r} is not a number")
        slope = float(number)
    if kind not in KINDS or not math.isfinite(slope):
        raise ValueError(f"unknown activation {activation!r}")
    return kind, slope


def activation_of(activation: str) -> Activation:
    kind, slope = parse(activation)
    return KINDS[kind](slope)


def activate(x: Tensor, activation: str) -> Tensor:
    """sigma(x), elementwise."""
    return activation_of(activation).function(x)
