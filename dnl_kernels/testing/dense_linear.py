"""Named cases of dense_linear."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.dense_linear.api import dense_linear
from .operator import Operator


class Case(NamedTuple):
    shape: tuple[int, ...]  # of a state without its channels
    channels: tuple[int, ...]
    width: int
    bias: bool = True
    norm: bool = False
    activation: str = "identity"
    scale: float = 1.0


CASES = {
    "tiny": Case((), (3,), 2),
    "one-state": Case((4,), (5,), 6, bias=False, scale=0.25),
    "unequal": Case((2, 7), (5, 1, 13), 9, scale=0.5),
    "preactivation": Case((3, 6), (8, 4, 4), 4, bias=False, norm=True, activation="relu", scale=0.125),
    "leaky_relu": Case((3, 6), (2, 3), 4, norm=True, activation="leaky_relu"),
    "tanh": Case((3, 6), (2, 3), 4, activation="tanh"),
    "gelu": Case((3, 6), (2, 3), 4, norm=True, activation="gelu"),
    "silu": Case((3, 6), (2, 3), 4, norm=True, activation="silu"),
    "empty-batch": Case((0, 3), (2, 3), 4, norm=True),
    "no-channels": Case((4,), (0, 3), 2),
}


# For the benchmarks, beside the cases above.
SIZES = {
    "tokens-8-states": Case((8, 256), (64,) * 8, 64),
    "tokens-8-states-preactivation": Case((8, 256), (64,) * 8, 64, norm=True, activation="relu"),
    "wide": Case((4, 256), (512,) * 4, 512),
    "cache-busting": Case((32, 1024), (64,) * 8, 32, norm=True, activation="relu"),
}


def inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | list[Tensor] | None]:
    """The tensors of the case by argument name, drawn from torch's generator."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    channels = sum(case.channels)
    return {
        "states": [draw(*case.shape, c) for c in case.channels],
        "weight": draw(case.width, channels),
        "bias": draw(case.width) if case.bias else None,
        "norm_scale": draw(channels) if case.norm else None,
        "norm_shift": draw(channels) if case.norm else None,
    }


def _leaves(dtype: torch.dtype, batch: int) -> list[Tensor]:
    tensors = inputs(Case((batch, 3), (4, 2), 3, norm=True), dtype)
    states = tensors.pop("states")
    return [*tensors.values(), *states]  # type: ignore[list-item, misc]


def _call(weight, bias, norm_scale, norm_shift, *states, backend=None):
    return dense_linear(
        states,
        weight,
        bias,
        norm_scale=norm_scale,
        norm_shift=norm_shift,
        activation="silu",
        scale=0.5,
        backend=backend,
    )


OPERATOR = Operator(
    name="dense_linear",
    leaves=_leaves,
    names=("weight", "bias", "norm_scale", "norm_shift", "states[0]", "states[1]"),
    call=_call,
    batched=(4, 5),
    registered=lambda *leaves: {},
)
