"""What the blocks share that are one autograd node around torch's products (bottleneck.py, non_local.py): one buffer
of all states, the normalisation that a layer applies to what it reads of it, and the deferred correction of gradients
for batch statistics (idea 3 of the fused kernels)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import BlockConfig
from .statistics import gather, moments


class Norm(NamedTuple):
    """act(scale * x + shift), and what its gradient needs: gamma, the mean and 1 / sqrt(var + eps)."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rate: Tensor
    gamma: Tensor


def flattened(connectivity: Sequence[Sequence[bool]]) -> list[int]:
    """The lower triangle row by row, as an operator's argument; `triangle_of` is its inverse."""
    return [int(read) for row in connectivity for read in row]


def triangle_of(connectivity: Sequence[int]) -> tuple[tuple[bool, ...], ...]:
    found: list[tuple[bool, ...]] = []
    while connectivity:
        size = len(found) + 1
        found, connectivity = [*found, tuple(map(bool, connectivity[:size]))], connectivity[size:]
    return tuple(found)


def keeps(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a forward pass keeps what a backward pass would need: always where it is traced."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return traced or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Prefix:
    """The states of a block in one buffer [B, C, H, W] or [B, N, C]; numbers per channel are in float32 at least."""

    def __init__(self, config: BlockConfig, states: Tensor, layers: Sequence[Any]):
        self.config, self.states, self.layers = config, states, layers
        self.dtype = wide_dtype(states)
        self.images = config.affine != "linear"
        self.axis = 1 if self.images else states.dim() - 1
        self.spans = [config.spans(layer) for layer in range(config.num_layers)]
        self.zero, self.one = states.new_zeros(1, dtype=self.dtype), states.new_ones(1, dtype=self.dtype)
        self.ops: Any = torch.ops.dnl

    @property
    def measures(self) -> bool:
        """Whether normalisations use statistics of this batch."""
        return self.config.norm is not None and self.config.training

    @property
    def share(self) -> float:
        """1 / how many numbers a channel has."""
        return self.states.shape[self.axis] / max(self.states.numel(), 1)

    def slot(self, layer: int) -> slice:
        start = self.config.in_channels + layer * self.config.growth_rate
        return slice(start, start + self.config.growth_rate)

    def channels(self, buffer: Tensor, of: slice) -> Tensor:
        return buffer[:, of] if self.images else buffer[..., of]

    def norm(self, layer: int, mean: Tensor, rate: Tensor) -> Norm:
        """That of the states which the layer reads; mean and rate: of the batch, where the block measures them."""
        p, spans = self.layers[layer], self.spans[layer]
        if self.config.training:
            mean, rate = gather(mean, spans), gather(rate, spans)
        else:
            mean, rate = self.given(p.norm_mean, p.norm_var)
        return self.normalisation(self.config.layer_channels(layer), p.norm_weight, p.norm_bias, mean, rate)

    def given(self, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
        if mean is None or var is None:
            return self.zero, self.one
        return mean.to(self.dtype).contiguous(), self.rate(var.to(self.dtype))

    def rate(self, var: Tensor) -> Tensor:
        return torch.rsqrt(var + self.config.eps)

    def normalisation(self, width: int, weight, bias, mean: Tensor, rate: Tensor) -> Norm:
        if self.config.norm is None:
            one, zero = self.one.repeat(width), self.zero.repeat(width)
            return Norm(one, zero, zero, one, one)
        scale = rate if weight is None else weight.to(self.dtype) * rate
        shift = torch.addcmul(self.zero if bias is None else bias.to(self.dtype), mean, scale, value=-1)
        return Norm(scale, shift, mean, rate, self.one if weight is None else weight.to(self.dtype))

    def measure(self, x: Tensor, at: Any, found: tuple[Tensor, Tensor, Tensor]) -> None:
        """Mean, variance and rate of x [B, C, H, W] or [B, N, C] into the rows `at` of `found`."""
        if self.measures:
            x = x.to(self.dtype)
            average, variance = self.ops.norm_activation_moments(x) if self.images else moments(x, self.axis)
            found[0][at], found[1][at], found[2][at] = average, variance, self.rate(variance)


class Corrections:
    """S1 and S2 of every channel: means of g and of g * xhat, g the gradients that consumers pulled before the
    division by sigma. What a batch's statistics take from a channel's gradient is known when all of them have."""

    def __init__(self, run: Prefix, total: Tensor, mean: Tensor, rate: Tensor):
        self.run, self.total, self.mean, self.rate = run, total, mean, rate
        self.plain, self.moment = (run.states.new_zeros(total.shape[run.axis], dtype=run.dtype) for _ in range(2))

    def collect(self, layer: int, norm: Norm, dbeta: Tensor, dgamma: Tensor) -> None:
        """What a layer's own normalisation found: the gradients of its gamma and beta."""
        if not self.run.measures:
            return
        for sums, of in ((self.plain, dbeta * norm.gamma), (self.moment, dgamma * norm.gamma)):
            at = 0
            for start, end in self.run.spans[layer]:
                sums[start:end].add_(of[at : at + end - start], alpha=self.run.share)
                at += end - start

    def apply(self, channels: slice) -> None:
        """total = its part that is left after the mean and the variance of the channels have been differentiated."""
        if not self.run.measures:
            return
        r, mean = self.rate[channels], self.mean[channels]
        x = self.run.channels(self.run.states, channels).to(self.run.dtype)
        factor, constant = -r * r * self.moment[channels], -r * self.plain[channels]
        total = self.run.channels(self.total, channels)
        if self.run.images:
            self.run.ops.norm_activation_correct(x, factor, mean, constant, total)
        else:
            total += torch.addcmul(constant, x - mean, factor)
