"""dnl_block from the operators of its layers. What is kept for backward grows linearly with the depth: the states, and
what each layer makes of its own output; no layer concatenates or normalises what it reads into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dnl_layer.composition import affine, non_local
from ..dnl_layer.pointwise import normalise_activate
from .config import BlockConfig, Statistics
from .statistics import channel_statistics, fold


class _Norm:
    """The batch normalisations of one call: statistics of this batch (kept for the caller), or the given ones."""

    def __init__(self, config: BlockConfig, axis: int):
        self.config, self.axis = config, axis
        self.kept: dict[str, list[tuple[Tensor, Tensor]]] = {"states": [], "inner": [], "output": []}

    def observe(self, name: str, x: Tensor) -> None:
        if self.config.norm is not None and self.config.training:
            self.kept[name].append(channel_statistics(x, self.axis))

    def of_states(self, layer: int, p: Any) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of the states that a layer reads, each channel's statistics shared by all layers."""
        if self.config.norm is None or not self.config.preactivation:
            return None, None
        mean, var = p.norm_mean, p.norm_var
        if self.config.training:
            kept, reads = self.kept["states"], self.config.reads(layer)
            mean, var = (torch.cat([kept[j][i] for j in reads]) for i in (0, 1))
        return fold(mean, var, p.norm_weight, p.norm_bias, self.config.eps)

    def of(self, name: str, x: Tensor, weight, bias, mean, var) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of a tensor with one consumer."""
        if self.config.norm is None:
            return None, None
        self.observe(name, x)
        if self.config.training:
            mean, var = self.kept[name][-1]
        return fold(mean, var, weight, bias, self.config.eps)

    def statistics(self, elements: int) -> Statistics | None:
        if self.config.norm is None or not self.config.training:
            return None

        def kept(name: str, i: int) -> list[Tensor]:
            return [pair[i].detach() for pair in self.kept[name]]

        states = [torch.cat(kept("states", i)) if self.kept["states"] else None for i in (0, 1)]
        inner, output = ([kept(name, i) for i in (0, 1)] for name in ("inner", "output"))
        return Statistics(states[0], states[1], inner[0], inner[1], output[0], output[1], elements)


def accumulate(states, weight, bias, norm_scale, norm_shift, activation, **options) -> Tensor:
    """`affine` of normalised states; the normalisation arrives in float32 at least."""
    norm_scale, norm_shift = (None if t is None else t.to(weight.dtype) for t in (norm_scale, norm_shift))
    prologue = {"norm_scale": norm_scale, "norm_shift": norm_shift, "activation": activation}
    return affine(states, weight, bias, **prologue, **options)


def dnl_block(
    x0: Tensor, parameters: Sequence[Any], config: BlockConfig, backend: str | None
) -> tuple[Tensor, Statistics | None]:
    axis = -1 if config.affine == "linear" else 1
    norm = _Norm(config, axis)
    activation = config.activation
    before = activation if config.preactivation else "identity"
    states = [x0.contiguous()]
    for layer, p in enumerate(parameters):
        if config.preactivation:
            norm.observe("states", states[-1])
        y: Any = None
        if reads := config.reads(layer):
            scale, shift = norm.of_states(layer, p)
            read = [states[j] for j in reads]
            y = accumulate(
                read, p.affine_weight, p.affine_bias, scale, shift, before, scale=config.tau, backend=backend
            )
            if config.bottleneck is not None:
                scale, shift = norm.of(
                    "inner", y, p.inner_norm_weight, p.inner_norm_bias, p.inner_norm_mean, p.inner_norm_var
                )
                y = accumulate([y], p.inner_weight, None, scale, shift, activation, backend=backend)
        if config.input_skip:
            skip = affine(states[:1], p.skip_weight, p.skip_bias, backend=backend)
            y = skip if y is None else y + skip
        x = non_local(y, p.theta(), config.kernel, config.heads, backend)
        x = x + y if config.residual else x
        if not config.preactivation:
            scale, shift = norm.of("output", x, p.norm_weight, p.norm_bias, p.norm_mean, p.norm_var)
            x = normalise_activate(x, scale, shift, activation, axis)
        states.append(x)
    return torch.cat(states, axis), norm.statistics(x0.numel() // max(x0.shape[axis], 1))
