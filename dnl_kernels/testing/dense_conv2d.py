"""Named cases of dense_conv2d."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from .._activations import activate
from ..ops.dense_conv2d.api import dense_conv2d
from .operator import Operator


class Case(NamedTuple):
    batch: int
    channels: tuple[int, ...]
    height: int
    width: int
    outputs: int
    size: int = 3
    activation: str = "relu"
    norm: bool = True
    bias: bool = True
    scale: float = 1.0


CASES = {
    "densenet-layer": Case(3, (12, 6, 6), 8, 8, 6),
    "one-pixel": Case(2, (3, 2), 1, 1, 4, activation="gelu"),
    "seven": Case(5, (4, 1), 7, 7, 5, activation="silu"),
    "cut-into-bands": Case(2, (3, 2), 41, 67, 7, activation="tanh"),
    "many-small-images": Case(37, (2, 3), 5, 3, 3),
    "row": Case(2, (3,), 1, 33, 2, activation="leaky_relu"),
    "column": Case(2, (3,), 33, 1, 13, activation="identity"),
    "five-by-five": Case(2, (2, 5), 9, 4, 8, size=5, scale=0.5),
    "filter-larger-than-image": Case(2, (2,), 2, 3, 1, size=7, activation="silu", scale=-2.0),
    "pointwise": Case(2, (7, 19), 6, 11, 9, size=1, activation="gelu"),
    "plain": Case(2, (3, 2), 6, 5, 2, norm=False, activation="identity", bias=False),
    "plain-relu": Case(3, (13,), 17, 16, 12, norm=False, bias=False),
    "no-channels-in-a-state": Case(2, (3, 0, 2), 4, 5, 3, activation="tanh"),
    "empty-batch": Case(0, (3, 2), 4, 5, 3),
    "wide-rows": Case(1, (2,), 3, 1500, 2, activation="gelu"),
}
# For the benchmarks, beside the cases above.
SIZES = {
    "growth-6": Case(32, (12, *(6,) * 8), 32, 32, 6, bias=False),
    "growth-12": Case(32, (24, *(12,) * 8), 16, 16, 12, bias=False),
    "bottleneck-1x1": Case(4, (64, 32, 32, 32), 56, 56, 128, size=1, bias=False),
    "bottleneck-3x3": Case(4, (128,), 56, 56, 32, bias=False),
    "cache-busting": Case(16, (32, 32), 112, 112, 12, bias=False),
}


NAMES = ("weight", "bias", "norm_scale", "norm_shift")


def inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor | None], list[Tensor]]:
    """[weight, bias, norm_scale, norm_shift] (None where the case has none) and the states."""
    total = sum(case.channels)

    def draw(*shape: int, offset: float = 0.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) + offset).to(device, dtype)

    parameters = [
        draw(case.outputs, total, case.size, case.size),
        draw(case.outputs) if case.bias else None,
        draw(total, offset=1.0) if case.norm else None,
        draw(total) if case.norm else None,
    ]
    return parameters, [draw(case.batch, c, case.height, case.width) for c in case.channels]


# Each operand is rounded to 10 bits behind its leading one: by half a unit, 2^-11 of itself. Two make 2^-10 of a
# product, and the float32 sum adds its own rounding. A sum is bounded by that of the absolute values of its products.
TF32_ERROR = 2.0**-10 * (1 + 2.0**-10) + 1e-5


def tf32_bounds(
    parameters: list[Tensor | None], states: list[Tensor], activation: str, scale: float, dy: Tensor
) -> dict[str, Tensor]:
    """The largest errors of y and its gradients where float32 is multiplied as tf32, element by element."""
    weight, _, norm_scale, norm_shift = (None if p is None else p.double() for p in parameters)
    assert weight is not None
    x, padding = torch.cat([s.double() for s in states], 1), weight.shape[-1] // 2
    ones = x.new_ones(x.shape[1])
    rate = (ones if norm_scale is None else norm_scale)[:, None, None]
    u = (x * rate + (0 if norm_shift is None else norm_shift[:, None, None])).requires_grad_()
    a = activate(u, activation)
    (slope,) = torch.autograd.grad(a.sum(), u)
    a, dy, w, unit = a.detach().abs(), dy.double().abs(), weight.abs(), TF32_ERROR * abs(scale)
    # The slope is of float32, with an absolute error that other cancellation than tf32's explains.
    pulled = conv2d_input(x.shape, w, dy, padding=padding) * (unit * slope.abs() + 1e-6 * abs(scale))
    found = {
        "y": unit * F.conv2d(a, w, padding=padding),
        "weight": unit * conv2d_weight(a, w.shape, dy, padding=padding),
        "norm_scale": (pulled * x.abs()).sum((0, 2, 3)),
        "norm_shift": pulled.sum((0, 2, 3)),
    }
    for j, part in enumerate((pulled * rate.abs()).split([s.shape[1] for s in states], 1)):
        found[f"states[{j}]"] = part
    return found


def _leaves(dtype: torch.dtype, batch: int) -> list[Tensor]:
    parameters, states = inputs(Case(batch, (2, 3), 3, 4, 3), dtype)
    return [*(p for p in parameters if p is not None), *states]


def _call(weight, bias, norm_scale, norm_shift, *states, backend=None):
    return dense_conv2d(
        states, weight, bias, norm_scale=norm_scale, norm_shift=norm_shift, activation="tanh", scale=0.5,
        backend=backend,
    )  # fmt: skip


OPERATOR = Operator(
    name="dense_conv2d",
    leaves=_leaves,
    names=(*NAMES, "states[0]", "states[1]"),
    call=_call,
    batched=(4, 5),
    registered=lambda weight, bias, norm_scale, norm_shift, *states: {
        "dense_conv2d_fwd": (list(states), weight, bias, norm_scale, norm_shift, "tanh", 0.5),
        "dense_conv2d_bwd": (
            torch.ones(states[0].shape[0], weight.shape[0], *states[0].shape[2:], dtype=weight.dtype),
            list(states), weight, norm_scale, norm_shift, "tanh", 0.5, True, True, True, True,
        ),
    },
)  # fmt: skip
