"""torchvision's DenseNets with their dense blocks replaced. torchvision is imported by `convert_densenet` only."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._checks import fail
from .block import DNLBlock

NAMES = {"norm": "norm1", "affine": "conv1", "inner_norm": "norm2", "inner": "conv2"}  # ours: torchvision's


def convert_dense_block(block: nn.Module, *, backend: str | None = None) -> DNLBlock:
    """The DNLBlock equal to a torchvision `_DenseBlock`: copies of weights and statistics, modes and requires_grad.

    Its `memory_efficient` has no meaning here: less is kept for backward in any case.

    Raises:
        TypeError: it is no `_DenseBlock`.
        ValueError: drop_rate > 0; there is no dropout inside a block.
    """
    op = "convert_dense_block"
    layers: list[Any] = list(block.children())
    if not layers or not all(hasattr(layer, name) for layer in layers for name in NAMES.values()):
        raise TypeError(f"{op}: block is of type {type(block).__name__}; expected torchvision's _DenseBlock")
    first = layers[0]
    if first.drop_rate > 0:
        fail(op, "drop_rate", first.drop_rate, "0: there is no dropout inside a block")
    growth = first.conv2.out_channels
    new = DNLBlock(
        first.conv1.in_channels,
        len(layers),
        growth,
        bottleneck=first.conv1.out_channels // growth,
        eps=first.norm1.eps,
        momentum=first.norm1.momentum,
        track_running_stats=first.norm1.track_running_stats,
        backend=backend,
        device=first.conv1.weight.device,
        dtype=first.conv1.weight.dtype,
    )
    new.train(block.training)
    for layer, old in zip(new.layers, layers, strict=True):
        for name, old_name in NAMES.items():
            source, target = getattr(old, old_name), getattr(layer, name)
            target.load_state_dict(source.state_dict())
            target.train(source.training)
            for parameter, given in zip(target.parameters(), source.parameters(), strict=True):
                parameter.requires_grad_(given.requires_grad)
    return new


def convert_densenet(model: nn.Module, *, backend: str | None = None) -> nn.Module:
    """`model` with every torchvision `_DenseBlock` in it replaced in place by the equal DNLBlock; returns `model`.

    Raises:
        ValueError: there is no `_DenseBlock` in the model, or one with drop_rate > 0.
    """
    from torchvision.models.densenet import _DenseBlock

    found = [(parent, name) for parent in model.modules() for name, child in parent.named_children()
             if isinstance(child, _DenseBlock)]  # fmt: skip
    if not found:
        fail("convert_densenet", "model", f"of type {type(model).__name__} without a _DenseBlock", "a DenseNet")
    for parent, name in found:
        setattr(parent, name, convert_dense_block(getattr(parent, name), backend=backend))
    return model
