"""Named cases of dnl_block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.dnl_block.api import dnl_block
from ..ops.dnl_block.config import BlockConfig, LayerParameters
from .operator import Operator

DENSE3 = ((True,), (True, True), (True, True, True))
WINDOW3 = ((True,), (True, True), (False, True, True))
SPARSE3 = ((True,), (False, True), (True, False, True))
NOTHING3 = ((True,), (False, False), (True, False, True))


class Case(NamedTuple):
    config: BlockConfig
    positions: tuple[int, ...] = (4, 5)
    batch: int = 3


def _config(**options) -> BlockConfig:
    return BlockConfig(**{"in_channels": 3, "num_layers": 3, "growth_rate": 2, "connectivity": DENSE3, **options})


CASES = {
    "densenet": Case(_config(training=True)),
    "densenet-eval": Case(_config()),
    "densenet-bc": Case(_config(bottleneck=4, training=True)),
    "densenet-bc-eval": Case(_config(bottleneck=2, activation="silu"), (7, 3)),
    "equation-1": Case(_config(preactivation=False, norm=None, tau=1 / 3, input_skip=True, activation="tanh"), (1, 1)),
    "equation-1-batch-norm": Case(_config(preactivation=False, training=True, connectivity=WINDOW3)),
    "post-activation-bottleneck": Case(_config(preactivation=False, training=True, bottleneck=2, activation="gelu")),
    "no-norm": Case(_config(norm=None, activation="leaky_relu", connectivity=SPARSE3)),
    "conv1x1-softmax": Case(_config(affine="conv1x1", kernel="softmax", heads=2, head_dim=3, training=True)),
    "tokens-gaussian": Case(_config(affine="linear", kernel="gaussian", head_dim=2, training=True, tau=0.5), (7,)),
    "tokens-dot-residual": Case(
        _config(affine="linear", kernel="dot", head_dim=2, residual=True, preactivation=False, training=True), (6,)
    ),
    "a-layer-that-reads-nothing": Case(_config(connectivity=NOTHING3, input_skip=True, training=True)),
    "one-layer": Case(_config(num_layers=1, connectivity=((True,),), training=True)),
    "empty-batch": Case(_config(training=True), batch=0),
}


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """x0, and the tensors of each layer by name, drawn from torch's generator."""

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        value = torch.randn(shape, dtype=torch.float64)
        if name.endswith("_var"):
            value = value.square() + 0.1
        elif len(shape) > 1:
            value = value * torch.tensor(shape[1:]).prod() ** -0.5
        elif name.endswith("norm_weight"):
            value = value + torch.sign(value)
        return value.to(dtype)

    config = case.config
    layers = [
        {name: draw(name, shape) for name, shape in config.shapes(layer).items()} for layer in range(config.num_layers)
    ]
    shape = (
        (*case.positions, config.in_channels) if config.affine == "linear" else (config.in_channels, *case.positions)
    )
    return torch.randn(case.batch, *shape, dtype=torch.float64).to(dtype), layers


def trainable(layers: list[dict[str, Tensor]]) -> list[tuple[int, str]]:
    """Layer and name of every tensor that has a gradient: all but running statistics."""
    return [
        (i, name) for i, layer in enumerate(layers) for name in layer if not name.endswith(("norm_mean", "norm_var"))
    ]


# Eq. (1) to the letter: well conditioned, and no gradient is zero, as that of a bias in front of a batch norm would be.
_CASE = Case(
    BlockConfig(3, 2, 2, DENSE3[:2], preactivation=False, norm=None, input_skip=True, activation="tanh", tau=0.5),
    (3, 2),
)
_TRAINABLE = trainable(inputs(_CASE, torch.float32)[1])


def _leaves(dtype: torch.dtype, batch: int) -> list[Tensor]:
    x0, layers = inputs(_CASE._replace(batch=batch), dtype)
    return [x0, *(layers[i][name] for i, name in _TRAINABLE)]


def _call(x0: Tensor, *leaves: Tensor, backend: str | None = None) -> Tensor:
    layers: list[dict[str, Tensor]] = [{}, {}]
    for (i, name), leaf in zip(_TRAINABLE, leaves, strict=True):
        layers[i][name] = leaf
    return dnl_block(x0, [LayerParameters(**layer) for layer in layers], _CASE.config, backend=backend)


OPERATOR = Operator(
    name="dnl_block",
    leaves=_leaves,
    names=("x0", *(f"layer {i}: {name}" for i, name in _TRAINABLE)),
    call=_call,
    batched=(0,),
    registered=lambda *leaves: {},
)
