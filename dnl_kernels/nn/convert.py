"""torchvision's DenseNets, block by block and transition by transition. torchvision is imported by `convert_densenet`
only."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._checks import fail
from .block import DNLBlock
from .network import Transition

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
            _copy(getattr(old, old_name), getattr(layer, name))
    return new


def convert_transition(transition: nn.Module) -> Transition:
    """The Transition equal to a torchvision `_Transition`, with copies as of `convert_dense_block`."""
    norm: Any = transition.norm
    conv: Any = transition.conv
    new = Transition(conv.in_channels, conv.out_channels, "batch", "relu", pool="floor")
    new.norm.norm = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.conv = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
    new.to(conv.weight.device, conv.weight.dtype).train(transition.training)
    for source, target in ((norm, new.norm.norm), (conv, new.conv)):
        _copy(source, target)
    return new


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())
    target.train(source.training)
    for parameter, given in zip(target.parameters(), source.parameters(), strict=True):
        parameter.requires_grad_(given.requires_grad)


def convert_densenet(model: nn.Module, *, backend: str | None = None) -> nn.Module:
    """`model` with every torchvision `_DenseBlock` and `_Transition` in it replaced in place by the equal DNLBlock and
    Transition; returns `model`.

    Raises:
        ValueError: there is no `_DenseBlock` in the model, or one with drop_rate > 0.
    """
    from torchvision.models.densenet import _DenseBlock, _Transition

    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if isinstance(child, (_DenseBlock, _Transition))]  # fmt: skip
    if not any(isinstance(child, _DenseBlock) for _, _, child in found):
        fail("convert_densenet", "model", f"of type {type(model).__name__} without a _DenseBlock", "a DenseNet")
    new = [
        convert_dense_block(child, backend=backend) if isinstance(child, _DenseBlock) else convert_transition(child)
        for _, _, child in found
    ]
    for (parent, name, _), module in zip(found, new, strict=True):
        setattr(parent, name, module)
    return model
