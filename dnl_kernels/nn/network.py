"""DNLNet: dense non-local blocks with transitions between them, for the classification of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .._activations import activate
from .._checks import fail
from .._kept import Kept
from ..ops.norm_activation import cpu as norm_activation
from ..ops.transition import cpu as evaluated
from . import running_statistics
from .block import DNLBlock

OP = "DNLNet"


class NormActivation(nn.Module):
    """act(BN(x)); without BN for norm=None."""

    def __init__(self, channels: int, norm: str | None, activation: str):
        super().__init__()
        self.norm = None if norm is None else nn.BatchNorm2d(channels)
        self.activation = activation

    def forward(self, x: Tensor, pool: str | None = None) -> Tensor:
        """pool: the means of 2x2 pixels, half of an odd size rounded as it says, "ceil" or "floor"."""
        if (fused := self._fused(x, pool)) is not None:
            return fused
        z = activate(x if self.norm is None else running_statistics.normalised(self.norm, x), self.activation)
        return F.avg_pool2d(z, 2, ceil_mode=pool == "ceil") if pool else z

    def _fused(self, x: Tensor, pool: str | None) -> Tensor | None:
        norm = self.norm
        if type(norm) is not nn.BatchNorm2d:  # a subclass, such as SyncBatchNorm's, computes something else
            return None
        measures = norm.training or norm.running_mean is None
        mean, var = (None, None) if measures else (norm.running_mean, norm.running_var)
        if norm_activation.limit(x, mean, pool):
            return None
        z, mean, var = norm_activation.norm_activation(
            x, norm.weight, norm.bias, mean, var, self.activation, pool, norm.eps
        )
        if measures:
            running_statistics.update([(norm, mean, var)], x.numel() // x.shape[1])
        return z


class Transition(nn.Module):
    """BN, activation, 2x2 average pooling, 1x1 convolution.

    DenseNet pools after the convolution. The two commute, both being linear and one acting within channels, the other
    within pixels; this order has a fourth of the products. pool: how half of an odd size is rounded, "ceil" (1x1 stays
    1x1) or "floor", as in torchvision.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str | None, activation: str, pool: str = "ceil"):
        super().__init__()
        self.norm = NormActivation(in_channels, norm, activation)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=norm is None)
        self.pool = pool
        self._kept = Kept()

    def forward(self, x: Tensor) -> Tensor:
        if (fused := self._evaluated(x)) is not None:
            return fused
        return self.conv(self.norm(x, self.pool))

    def _evaluated(self, x: Tensor) -> Tensor | None:
        """In evaluation, without gradients: one pass over x."""
        norm, conv = self.norm.norm, self.conv
        if (
            type(norm) is not nn.BatchNorm2d
            or norm.training
            or norm.running_mean is None
            or type(conv) is not nn.Conv2d
        ):
            return None
        if self.pool != "floor" and (x.shape[-2] % 2 or x.shape[-1] % 2):
            return None
        tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        hooked = (conv, norm, self.norm)
        if any(m._forward_hooks or m._forward_pre_hooks for m in hooked) or min(x.shape[-2:]) < 2:
            return None  # a hook sees what the convolution reads
        if evaluated.limit(x, (conv.weight, conv.bias, *tensors)):
            return None
        return evaluated.transition(
            x, conv.weight, conv.bias, tensors, self.norm.activation, True, norm.eps, self._kept
        )


class DNLNet(nn.Module):
    """Stem, dense non-local blocks with transitions between them, BN, activation, global average pooling, classifier.

    Args:
        in_channels: of the images.
        num_classes: outputs of the classifier.
        num_layers: the number of layers of each block.
        growth_rate: G of every block.
        stem_channels: of the 3x3 convolution in front; 2 * G by default, as in DenseNet.
        compression: a transition turns C channels into max(1, floor(compression * C)), 0 < compression <= 1.
        norm, activation: of the whole network, blocks included.
        block_options: every other keyword of DNLBlock (kernel, preactivation, tau, bottleneck, backend ...).

    `forward` takes images [B, in_channels, H, W] of any size >= 1 and returns logits [B, num_classes].
    The state_dict has stem, blocks.<i> (DNLBlock), transitions.<i>.{norm.norm,conv}, norm.norm and classifier.

    Raises:
        ValueError, TypeError: a value that is not allowed; the errors of DNLBlock.

    Source: DenseNet (Huang et al. 2017) with DNLBlock as its block; DNL, section 5.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        num_layers: Sequence[int],
        growth_rate: int,
        stem_channels: int | None = None,
        compression: float = 0.5,
        norm: str | None = "batch",
        activation: str = "relu",
        **block_options: Any,
    ):
        super().__init__()
        if not num_layers:
            fail(OP, "num_layers", "empty", "the number of layers of each block")
        if not 0 < compression <= 1:
            fail(OP, "compression", compression, "a number in (0, 1]")
        if block_options.get("affine") == "linear":
            fail(OP, "affine", "'linear'", "'conv3x3' or 'conv1x1': the network is for images")
        self.compression = compression
        channels = 2 * growth_rate if stem_channels is None else stem_channels
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=norm is None)
        blocks, transitions = [], []
        for index, layers in enumerate(num_layers):
            if index:
                previous, channels = channels, max(1, int(compression * channels))
                transitions.append(Transition(previous, channels, norm, activation))
            blocks.append(DNLBlock(channels, layers, growth_rate, norm=norm, activation=activation, **block_options))
            channels = blocks[-1].out_channels
        self.blocks, self.transitions = nn.ModuleList(blocks), nn.ModuleList(transitions)
        self.norm = NormActivation(channels, norm, activation)
        self.classifier = nn.Linear(channels, num_classes)
        for module in (self.stem, *(t.conv for t in transitions)):
            nn.init.kaiming_normal_(module.weight)
        for bias in (self.stem.bias, self.classifier.bias, *(t.conv.bias for t in transitions)):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.stem(x))
        for transition, block in zip(self.transitions, self.blocks[1:], strict=True):
            x = block(transition(x))
        return self.classifier(self.norm(x).mean((2, 3)))

    @classmethod
    def paper(
        cls, num_layers: int, growth_rate: int = 6, *, in_channels: int = 3, num_classes: int = 10, **options: Any
    ) -> DNLNet:
        """The network of the paper's section 5: four blocks of `num_layers` layers, growth rate 6.

        The text leaves open what stands around the blocks. Chosen here: a stem of 12 channels, transitions with
        compression 0.5 and 2x2 average pooling, batch normalisation, no bottleneck, the step absorbed (tau = 1).
        `options` are keywords of DNLNet and DNLBlock.
        """
        options = {"stem_channels": 12, **options}
        return cls(in_channels, num_classes, num_layers=[num_layers] * 4, growth_rate=growth_rate, **options)
