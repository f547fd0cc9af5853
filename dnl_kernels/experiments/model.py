"""The network of a sweep: the paper's, with the variants that the settings name."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .config import Config
from .data import Images
from .errors import UsageError


def build(config: Config, depth: int, data: Images) -> nn.Module:
    """DNLNet.paper with `depth` layers in each of its four blocks."""
    from ..nn import DNLNet

    try:
        return DNLNet.paper(
            num_layers=depth,
            growth_rate=config.growth_rate,
            in_channels=data.images.shape[1],
            num_classes=data.classes,
            kernel=config.kernel,
            preactivation=config.order == "pre",
            norm="batch" if config.norm == "batch" else None,
            input_skip=config.input_skip,
            tau=1.0 if config.tau == "absorbed" else "1/L",
            backend=config.backend,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def regularizer(network: nn.Module) -> Tensor:
    """The sum over the blocks of eq. (5) with all weights 1, p = 4."""
    from ..nn import DNLBlock
    from ..theory import regularizer as of_block

    return torch.stack([of_block(block) for block in network.modules() if isinstance(block, DNLBlock)]).sum()


def flops(config: Config, depth: int, data: Images) -> float:
    """Floating-point operations of a training step per image, forward and backward, as eager PyTorch does them."""
    with torch.device("meta"):
        network = build(dataclasses.replace(config, backend="reference"), depth, data)
        images = torch.empty(2, *data.images.shape[1:])
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    return counter.get_total_flops() / len(images)
