"""dnl_block from the operators of its layers. What is kept for backward grows linearly with the depth: the states, and
what each layer makes of its own output; no layer concatenates or normalises what it reads into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dnl_layer import fused
from ..dnl_layer.composition import non_local
from ..dnl_layer.config import LayerConfig
from ..dnl_layer.non_local import affine, folds, non_local_of_affine
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


def _prologue(weight, norm_scale, norm_shift, activation) -> dict:
    """The options of `affine` that normalise and activate; the normalisation arrives in float32 at least."""
    norm_scale, norm_shift = (None if t is None else t.to(weight.dtype) for t in (norm_scale, norm_shift))
    return {"norm_scale": norm_scale, "norm_shift": norm_shift, "activation": activation}


def _fused_layer(states: Sequence[Tensor], layer: int, p: Any, norm: _Norm, config: BlockConfig, backend):
    """N(y_l) as one operator on a GPU, where its kernels take the call: y_l is in no memory; None elsewhere."""
    if states[0].device.type == "cpu" and backend in (None, "cpu"):
        return None
    read = [states[j] for j in config.reads(layer)]
    before = config.activation if config.preactivation else "identity"
    options = _prologue(p.affine_weight, *norm.of_states(layer, p), before)
    named: dict[str, Tensor | None] = {
        "affine_weight": p.affine_weight, "affine_bias": p.affine_bias, "norm_scale": options["norm_scale"],
        "norm_shift": options["norm_shift"], "skip_input": states[0] if config.input_skip else None,
        "skip_weight": p.skip_weight, "skip_bias": p.skip_bias, "output_scale": None, "output_shift": None,
        **{f"theta.{name}": tensor for name, tensor in p.theta()._asdict().items()},
    }  # fmt: skip
    form = LayerConfig(config.kernel, "identity", config.tau, before, config.heads, config.residual)
    chosen = fused.choose(read, named, form, backend)
    return None if chosen is None else fused.dnl_layer(read, named, form, chosen)


def _layer(states: Sequence[Tensor], layer: int, p: Any, norm: _Norm, config: BlockConfig, backend) -> Tensor:
    """N(y_l), with y_l where residual."""
    y: Any = None
    theta = p.theta()
    if config.kernel != "local" and config.bottleneck is None and config.reads(layer):
        found = _fused_layer(states, layer, p, norm, config, backend)
        if found is not None:
            return found
    if reads := config.reads(layer):
        read = [states[j] for j in reads]
        before = config.activation if config.preactivation else "identity"
        options = _prologue(p.affine_weight, *norm.of_states(layer, p), before)
        options |= {"scale": config.tau, "backend": backend}
        if not config.input_skip and folds(p.affine_weight, theta, config, backend):
            return non_local_of_affine(read, p.affine_weight, p.affine_bias, theta, config, **options)
        y = affine(read, p.affine_weight, p.affine_bias, **options)
        if config.bottleneck is not None:
            inner = (p.inner_norm_weight, p.inner_norm_bias, p.inner_norm_mean, p.inner_norm_var)
            prologue = _prologue(p.inner_weight, *norm.of("inner", y, *inner), config.activation)
            y = affine([y], p.inner_weight, None, backend=backend, **prologue)
    if config.input_skip:
        skip = affine(states[:1], p.skip_weight, p.skip_bias, backend=backend)
        y = skip if y is None else y + skip
    x = non_local(y, theta, config.kernel, config.heads, backend)
    return x + y if config.residual else x


def dnl_block(
    x0: Tensor, parameters: Sequence[Any], config: BlockConfig, backend: str | None
) -> tuple[Tensor, Statistics | None]:
    axis = -1 if config.affine == "linear" else 1
    norm = _Norm(config, axis)
    activation = config.activation
    states = [x0.contiguous()]
    for layer, p in enumerate(parameters):
        if config.preactivation:
            norm.observe("states", states[-1])
        x = _layer(states, layer, p, norm, config, backend)
        if not config.preactivation:
            scale, shift = norm.of("output", x, p.norm_weight, p.norm_bias, p.norm_mean, p.norm_var)
            x = normalise_activate(x, scale, shift, activation, axis)
        states.append(x)
    return torch.cat(states, axis), norm.statistics(x0.numel() // max(x0.shape[axis], 1))
