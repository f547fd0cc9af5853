"""Named cases of dnl_layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.dnl_layer.api import dnl_layer
from .operator import Operator


class Case(NamedTuple):
    positions: tuple[int, ...]  # (H, W) of images, (N,) of tokens
    channels: tuple[int, ...] = (3, 2)
    width: int = 4
    size: int = 3  # of the convolution
    kernel: str = "local"
    heads: int = 1
    tau: float = 1.0
    preactivation: bool = False  # normalise and activate the states
    output_norm: bool = False
    skip: bool = False
    residual: bool = False
    activation: str = "identity"
    biases: bool = True
    batch: int = 2


CASES = {
    "one-state": Case((4, 3), (3,), activation="relu"),
    "preactivation": Case((3, 5), preactivation=True, biases=False, tau=0.25),
    "equation-1": Case((3, 4), tau=0.5, skip=True, output_norm=True, activation="tanh"),
    "conv1x1": Case((5, 2), size=1, output_norm=True, activation="leaky_relu"),
    "tokens": Case((7,), tau=0.5, skip=True, activation="gelu"),
    "tokens-preactivation": Case((5,), preactivation=True, output_norm=True, activation="silu"),
    "softmax": Case((3, 4), kernel="softmax", heads=2, residual=True, activation="silu"),
    "softmax-tokens": Case((6,), kernel="softmax", heads=2, preactivation=True, skip=True),
    "gaussian": Case((4, 3), kernel="gaussian", heads=2, biases=False, output_norm=True, activation="tanh"),
    "gaussian-tokens": Case((5,), kernel="gaussian", residual=True, tau=0.125),
    "dot": Case((3, 3), kernel="dot", skip=True, activation="silu"),
    "dot-tokens": Case((4,), kernel="dot", heads=2, biases=False),
    "empty-batch": Case((3, 3), kernel="softmax", batch=0, output_norm=True),
}


# For the benchmarks, beside the cases above.
_POINTWISE = Case((16, 16), (16,) * 4, 16, size=1, kernel="softmax", preactivation=True, biases=False, batch=16)
SIZES = {
    "local-16x16": Case((16, 16), (16,) * 4, 16, preactivation=True, biases=False, batch=16),
    "softmax-16x16": _POINTWISE,
    "softmax-32x32": _POINTWISE._replace(positions=(32, 32), batch=8),
    "gaussian-32x32": _POINTWISE._replace(positions=(32, 32), batch=8, kernel="gaussian"),
    "softmax-tokens-2048": Case((2048,), (32,) * 4, 32, kernel="softmax", heads=4, activation="relu", batch=2),
}


def inputs(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The states, and every other tensor by the name of its argument (theta's as "theta.query_weight" ..)."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    images = len(case.positions) == 2
    window = (case.size, case.size) if images else ()
    inner, total = 3 * case.heads, sum(case.channels)

    def state(channels: int) -> Tensor:
        shape = (channels, *case.positions) if images else (*case.positions, channels)
        return draw(case.batch, *shape)

    tensors = {"affine_weight": draw(case.width, total, *window) / 2}
    if case.biases:
        tensors["affine_bias"] = draw(case.width)
    if case.preactivation:
        tensors |= {"norm_scale": draw(total), "norm_shift": draw(total)}
    if case.skip:
        tensors |= {
            "skip_input": state(5),
            "skip_weight": draw(case.width, 5, *window) / 2,
            "skip_bias": draw(case.width),
        }
    if case.output_norm:
        tensors |= {"output_scale": draw(case.width), "output_shift": draw(case.width)}
    if case.kernel != "local":
        names = ["query", "value"] if case.kernel == "gaussian" else ["query", "key", "value"]
        for name in names:
            tensors[f"theta.{name}_weight"] = draw(inner, case.width) / 2
            if case.biases:
                tensors[f"theta.{name}_bias"] = draw(inner)
        tensors["theta.output_weight"] = draw(case.width, inner)
        if case.kernel == "gaussian":
            tensors["theta.rho"] = 1 + draw(case.heads) / 4  # a bandwidth of the order of the distances
    return [state(c) for c in case.channels], tensors


def call(case: Case, states: list[Tensor], tensors: dict[str, Tensor], backend: str | None = None) -> Tensor:
    theta = {name.removeprefix("theta."): t for name, t in tensors.items() if name.startswith("theta.")}
    others: dict[str, Any] = {name: t for name, t in tensors.items() if not name.startswith("theta.")}
    return dnl_layer(
        states, **others, theta=theta or None, kernel=case.kernel, activation=case.activation, tau=case.tau,
        input_activation="relu" if case.preactivation else "identity", heads=case.heads, residual=case.residual,
        backend=backend,
    )  # fmt: skip


# Without biases: the gradient of a query's bias is zero under a kernel of distances.
_CASE = Case(
    (2, 3),
    kernel="gaussian",
    heads=2,
    tau=0.5,
    skip=True,
    output_norm=True,
    activation="tanh",
    residual=True,
    biases=False,
)
_NAMES = list(inputs(_CASE, torch.float32)[1])


def _leaves(dtype: torch.dtype, batch: int) -> list[Tensor]:
    states, tensors = inputs(_CASE._replace(batch=batch), dtype)
    return [*tensors.values(), *states]


def _call(*leaves: Tensor, backend: str | None = None) -> Tensor:
    return call(_CASE, list(leaves[len(_NAMES) :]), dict(zip(_NAMES, leaves, strict=False)), backend)


OPERATOR = Operator(
    name="dnl_layer",
    leaves=_leaves,
    names=(*_NAMES, "states[0]", "states[1]"),
    call=_call,
    batched=(_NAMES.index("skip_input"), len(_NAMES), len(_NAMES) + 1),
    registered=lambda *leaves: {},
)
