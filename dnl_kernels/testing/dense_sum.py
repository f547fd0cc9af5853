"""Named cases of dense_sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.dense_sum.api import dense_sum
from .operator import Operator


class Case(NamedTuple):
    shape: tuple[int, ...]
    states: int
    channel_dim: int | None = None  # None: one weight per state


CASES = {
    "tiny": Case((3,), 2),
    "one-state": Case((4, 5), 1),
    "odd": Case((3, 7, 13), 5),
    "tokens-channels": Case((2, 9, 35), 4, -1),
    "images-channels": Case((2, 6, 5, 7), 3, 1),
    "seven": Case((2, 8, 7, 7), 3, 1),  # samples start at multiples of 16 bytes, channels do not
    "empty-batch": Case((0, 4, 3), 3, 1),
    "no-channels": Case((2, 0), 2, 1),
    "longer-than-a-tile": Case((3, 40, 61), 9, 1),
    "scalar-state": Case((), 3),
}


# For the benchmarks, beside the cases above: from what fits in a cache to what does not.
SIZES = {
    "transformer-12-layers": Case((8, 256, 512), 12),
    "tokens-48-layers": Case((1024, 512), 48),
    "images-channels-8": Case((16, 64, 28, 28), 8, 1),
    "cache-busting": Case((32, 1024, 512), 4),
}


def inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
    """weight and states of the case, drawn from torch's generator."""
    channels = () if case.channel_dim is None else (case.shape[case.channel_dim],)
    weight = torch.randn(case.states, *channels, dtype=torch.float64)
    states = [torch.randn(case.shape, dtype=torch.float64) for _ in range(case.states)]
    return weight.to(device, dtype), [state.to(device, dtype) for state in states]


def _leaves(dtype: torch.dtype, batch: int) -> list[Tensor]:
    weight, states = inputs(Case((batch, 5, 3), 3, 1), dtype)
    return [weight, *states]


OPERATOR = Operator(
    name="dense_sum",
    leaves=_leaves,
    names=("weight", "states[0]", "states[1]", "states[2]"),
    call=lambda weight, *states, backend=None: dense_sum(states, weight, channel_dim=1, backend=backend),
    batched=(1, 2, 3),
    registered=lambda weight, *states: {
        "dense_sum_fwd": (list(states), weight, 1),
        "dense_sum_bwd": (torch.ones_like(states[0]), list(states), weight, 1, True, True),
    },
    narrows=False,
)
