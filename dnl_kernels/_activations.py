"""The pointwise activations by name: sigma(x), and sigma'(x) * g given x.

Both are differentiable PyTorch, so a derivative of the derivative is right too. It imports torch only.
"""

from __future__ import annotations

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


ACTIVATIONS = {
    "identity": Activation(lambda x: x, lambda g, x: g),
    "relu": Activation(F.relu, lambda g, x: aten.threshold_backward(g, x, 0)),
    "leaky_relu": Activation(
        lambda x: F.leaky_relu(x, LEAKY_SLOPE), lambda g, x: aten.leaky_relu_backward(g, x, LEAKY_SLOPE, False)
    ),
    "tanh": Activation(torch.tanh, lambda g, x: aten.tanh_backward(g, torch.tanh(x))),
    "gelu": Activation(F.gelu, aten.gelu_backward),
    "silu": Activation(F.silu, aten.silu_backward),
}


def activate(x: Tensor, activation: str) -> Tensor:
    """sigma(x), elementwise."""
    return ACTIVATIONS[activation].function(x)
