"""How a dense block runs: consecutive layers of one kind by one call of a kernel, every other layer by its submodules.

A plan holds no copy of anything: it is read from the modules' state, and read again when that changed (a hook, another
eps, one normalisation in evaluation mode, a module put in the place of another). What a module says is honoured, by a
kernel that computes exactly that, or by calling the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._autograd import recorded
from .._backend import decomposes
from .._kept import PLAIN, Kept
from ..ops.dnl_block import api
from ..ops.dnl_block.config import BlockConfig, LayerParameters, Statistics
from ..ops.dnl_block.statistics import gather
from . import layers as dense_layers
from . import running_statistics
from .layers import DenseLayer, LayerKind, Watch

Description = list[DenseLayer] | str


class Segment(NamedTuple):
    """Consecutive layers that run together: by a kernel with this configuration or, for a reason, by their modules."""

    layers: list[DenseLayer]
    config: BlockConfig | None
    reason: str = ""
    kept: Any = None  # of evaluation: Kept


class Plan:
    """The plan of one block.

    Args:
        describe: reads a block's layers from its modules; a string says why it is no block that a plan knows.
        axis: of the channels.
        tokens: layers of linear maps normalise the channels of tokens [B, N, C] too, which nn.BatchNorm1d alone, called
            with such a tensor, does not.
    """

    def __init__(self, describe: Callable[[Any], Description], axis: int = 1, tokens: bool = True):
        self.describe, self.axis, self.tokens = describe, axis, tokens
        # One tuple, so that threads which share a plan see a watch together with what was read under it.
        self._known: tuple[Watch, list[Segment] | str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"describe": self.describe, "axis": self.axis, "tokens": self.tokens, "_known": None}

    def __call__(self, block: nn.Module, x: Tensor, backend: str | None = None) -> Tensor | None:
        """The concatenation of all states, or None where `describe` does not know the block any more."""
        segments = self.segments(block, x)
        if isinstance(segments, str):
            return None
        states = [x]
        for segment in segments:
            if segment.config is not None:
                found = self._run(segment, states, backend, len(segments) == 1)
                if found is not None:
                    states = found
                    continue
            for layer in segment.layers:
                states = layer.call(layer.module, states)
        return states[0] if len(states) == 1 else torch.cat(states, self.axis)

    def segments(self, block: nn.Module, x: Tensor) -> list[Segment] | str:
        """The layers of the block as they run now for an input like x, or why `describe` does not know it."""
        if torch.compiler.is_compiling():  # Dynamo guards what it reads
            return self._read(self.describe(block), x)
        if why := dense_layers.called_for_every_module():
            described = self.describe(block)
            return described if isinstance(described, str) else [Segment(described, None, why)]
        known = self._known
        if known is None or known[0].modules[0] is not block or not known[0].unchanged():
            described = self.describe(block)
            watched = [block]
            if not isinstance(described, str):
                watched += [m for layer in described for m in layer.modules()]
            self._known = known = (Watch(list(dict.fromkeys(watched))), self._read(described, x))
        return known[1]

    def _read(self, described: Description, x: Tensor) -> list[Segment] | str:
        if isinstance(described, str):
            return described
        width: int | None = x.shape[self.axis]
        kinds, widths = [], []
        for layer in described:
            kind = dense_layers.kind(layer)
            if not isinstance(kind, str):
                width = width or dense_layers.input_width(layer)
                kind = self._misfit(layer, kind, width) or kind
            kinds.append(kind)
            widths.append(width)
            growth = dense_layers.output_width(layer)
            width = width + growth if width and growth else None
        same = next((at for at, kind in enumerate(kinds) if kind != kinds[0]), len(kinds))
        for at, layer in enumerate(described[same:], same):
            partial = layer.reads is not None and not all(layer.reads)
            if partial or layer.options.get("input_skip"):
                kinds[at] = "layers of another kind stand in front of it, and it does not read all states as one"
        segments: list[Segment] = []
        start = 0
        while start < len(kinds):
            kind = kinds[start]
            end = next((at for at in range(start, len(kinds)) if kinds[at] != kind), len(kinds))
            run = described[start:end]
            if isinstance(kind, str):
                segments.append(Segment(run, None, kind))
            else:
                segments.append(_segment(run, kind, widths[start], start == 0))
            start = end
        return segments

    def _misfit(self, layer: DenseLayer, kind: LayerKind, width: int | None) -> str | None:
        """What the place of a layer in its block says against a kernel."""
        if layer.reads is None and (given := dense_layers.input_width(layer)) != width:
            return f"affine reads {given} channels of {width}"
        if kind.spatial_dims != 2 and kind.bottleneck is None:
            return f"the kernels have no layer without a bottleneck in {kind.spatial_dims} dimensions"
        return None

    def _run(self, segment: Segment, states: list[Tensor], backend: str | None, alone: bool) -> list[Tensor] | None:
        """The states after a segment by its kernel; None where only the modules understand its tensors. alone: no other
        segment asks for the single states."""
        given = [dense_layers.tensors(layer) for layer in segment.layers]
        config: Any = segment.config
        if any(map(dense_layers.gained_a_bias, segment.layers)):
            return None
        rank = states[0].dim()
        if config.affine == "linear":
            if rank != 3 and (self.tokens or rank != 2) or rank == 3 and config.norm is not None and not self.tokens:
                return None
        elif rank != config.spatial_dims + 2:
            return None
        if not dense_layers.plain_tensors([t for row in given for t in row.values()]):
            return None
        if config.spatial_dims != 2 and not recorded([*states, *(t for row in given for t in row.values())]):
            return None  # what the kernels save there is memory for a backward pass
        x0 = states[0] if len(states) == 1 else torch.cat(states, self.axis)
        x0 = x0.unsqueeze(0) if rank == 2 else x0
        buffer = self._evaluate(segment, x0, given, backend)
        if buffer is None:
            parameters = [LayerParameters(**row) for row in given]
            buffer, statistics = api.dnl_block_with_statistics(x0, parameters, config, backend=backend)
            if statistics is not None:
                running_statistics.update(_batch_statistics(segment, statistics), statistics.elements)
        buffer = buffer.squeeze(0) if rank == 2 else buffer
        if alone:
            return [buffer]
        found, at = [], 0
        for width in [*(t.shape[self.axis] for t in states), *[config.growth_rate] * config.num_layers]:
            found.append(buffer.narrow(self.axis, at, width))
            at += width
        return found

    def _evaluate(
        self, segment: Segment, x0: Tensor, given: list[dict[str, Tensor | None]], backend: str | None
    ) -> Tensor | None:
        """The states buffer from weights that are kept packed between evaluations; None where nothing is."""
        config: Any = segment.config
        if (config.training and config.norm is not None) or type(x0) not in PLAIN or torch.compiler.is_compiling():
            return None
        tensors = [t for row in given for t in row.values() if t is not None]
        tangents = torch.autograd.forward_ad._current_level >= 0
        if recorded([x0, *tensors]) or tangents or decomposes() or torch.is_autocast_enabled(x0.device.type):
            return None
        if x0.shape[self.axis] != config.in_channels:
            return None

        def make():
            return api.prepare(x0, [LayerParameters(**row) for row in given], config, backend)

        prepared = segment.kept.get(tensors, (backend, x0.dtype, x0.device), make)
        return None if prepared is None else prepared(x0)

    def reasons(self, block: nn.Module, x: Tensor) -> list[tuple[str, str | None]]:
        """Every layer by its name, with None where a kernel runs it, or why its modules are called."""
        segments = self.segments(block, x)
        if isinstance(segments, str):
            return [("all layers", segments)]
        return [(layer.name, segment.reason or None) for segment in segments for layer in segment.layers]

    def explain(self, block: nn.Module, x: Tensor, backend: str | None = None) -> str:
        """One line for every segment: its layers, what runs them, and why nothing faster does."""
        segments = self.segments(block, x)
        if isinstance(segments, str):
            return f"by its own forward: {segments}"
        lines = []
        for segment in segments:
            names = segment.layers[0].name
            if len(segment.layers) > 1:
                names += f" .. {segment.layers[-1].name}"
            if segment.config is None:
                lines.append(f"{names}: by their submodules: {segment.reason}")
                continue
            shape = list(x.shape)
            shape[self.axis] = segment.config.in_channels
            given = [LayerParameters(**dense_layers.tensors(layer)) for layer in segment.layers]
            route, refused = api.explain(x.new_empty(shape), given, segment.config, backend)
            lines.append(f"{names}: {route}")
            lines += [f"    not {name}: {why}" for name, why in refused.items()]
        return "\n".join(lines)


def _segment(run: Sequence[DenseLayer], kind: LayerKind, width: Any, first: bool) -> Segment:
    """first: it begins the block, and a layer may read some of the states only."""
    rows = tuple(
        layer.reads if first and layer.reads is not None else (True,) * (at + 1) for at, layer in enumerate(run)
    )
    fields: dict[str, Any] = {**kind._asdict(), **dict(kind.options)}
    del fields["options"]
    config = BlockConfig(in_channels=width, num_layers=len(run), connectivity=rows, **fields)
    return Segment(list(run), config, kept=Kept())


def _batch_statistics(segment: Segment, found: Statistics) -> list[tuple[Any, Tensor, Tensor]]:
    """Every normalisation of the segment's layers with its mean and biased variance."""
    inner = iter(zip(found.inner_mean, found.inner_var, strict=True))
    output = iter(zip(found.output_mean, found.output_var, strict=True))
    shared: Any = (found.states_mean, found.states_var)
    updates: list[tuple[Any, Tensor, Tensor]] = []
    config: Any = segment.config
    for index, layer in enumerate(segment.layers):
        norm, inner_norm = layer.parts.get("norm"), layer.parts.get("inner_norm")
        if inner_norm is not None:
            updates.append((inner_norm, *next(inner)))
        if norm is not None and config.preactivation:
            spans = config.spans(index)
            mean, var = (gather(v, spans) for v in shared)
            updates.append((norm, mean, var))
        elif norm is not None:
            updates.append((norm, *next(output)))
    return updates
