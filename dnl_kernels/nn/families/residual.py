"""Residual dense blocks of super-resolution: five convolutions that read all states, the last one added to the input
with a factor (BasicSR, Real-ESRGAN, spandrel)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import DenseLayer
from ..plan import Plan
from .base import Attributes, Executor, Skeleton, attributes, differ, get, is_activation, is_convolution, join
from .dense import Layer, describe_layer, summarise, widths

SIZES = ((5, 6), (12, 12))


class Blueprint(NamedTuple):
    skeleton: tuple[Skeleton, ...]
    layers: tuple[Layer, ...]
    shared: str | None  # the activation behind every convolution but the last, where it is a child of the block
    last: str
    attributes: Attributes
    scale: float | None  # known after a run


class ResidualDenseBlocks:
    name = "residual dense block"
    structure = (
        "residual dense blocks: children conv1, conv2, .. of growing width, the last one back to the first width"
    )

    def blueprints(self, module: nn.Module) -> Iterable[Blueprint | str]:
        children = {name: child for name, child in module._modules.items() if child is not None}
        numbered = [f"conv{i + 1}" for i in range(len(children))]
        numbered = [name for name in numbered if name in children]
        if len(numbered) < 3:
            return
        others = [name for name in children if name not in numbered]
        pairs = [pair for name in numbered if (pair := self._pair(module, name)) is not None]
        if len(pairs) < len(numbered):
            return
        shared = next((name for name in others if is_activation(children[name])), None)
        *before, last = pairs
        layers = []
        for name, (convolution, activation) in zip(numbered[:-1], before, strict=True):
            path, act = f"{name}{convolution}", shared if activation is None else f"{name}{activation}"
            if act is None:
                return
            layers.append(
                Layer(name, (Skeleton.of(module, name),), (("affine", path),), (act,), None, False, (),
                      attributes(module, [name] if convolution else []))
            )  # fmt: skip
        channels = first = widths(module, layers[0])[0]
        final = layers[0]._replace(parts=(("affine", numbered[-1] + last[0]),))
        for layer in (*layers, final):
            read, new = widths(module, layer)
            if read is None or new is None or read != channels:
                return
            channels = read + new
        if new != first or last[1] is not None:
            return
        if unknown := [name for name in others if name != shared]:
            yield f"it has further submodules: {', '.join(unknown)}"
            return
        used = shared if any(activation is None for _, activation in before) else None
        yield Blueprint((Skeleton.of(module, ""),), tuple(layers), used, numbered[-1], attributes(module, [""]), None)

    def _pair(self, module: nn.Module, name: str) -> tuple[str, str | None] | None:
        """The paths of a convolution and of its own activation, below the child called `name`."""
        child = module._modules[name]
        if is_convolution(child):
            return "", None
        inner = list(child._modules.items()) if isinstance(child, nn.Sequential) else []
        if len(inner) == 2 and is_convolution(inner[0][1]) and is_activation(inner[1][1]):
            return f".{inner[0][0]}", f".{inner[1][0]}"
        return (f".{inner[0][0]}", None) if len(inner) == 1 and is_convolution(inner[0][1]) else None

    def inputs(self, module: nn.Module, blueprint: Blueprint) -> Iterable[tuple[Any, ...]]:
        channels, _ = widths(module, blueprint.layers[0])
        return [((2, channels, *sizes),) for sizes in SIZES]

    def execute_plainly(self, module: nn.Module, blueprint: Blueprint, *inputs: Any) -> Tensor:
        states = [inputs[0]]
        call = self.call(module, blueprint)
        for layer in blueprint.layers:
            states = call(get(module, layer.path), states)
        return self.finish(module, blueprint, join(states), inputs[0])

    def complete(self, module: nn.Module, blueprint: Blueprint, inputs: tuple[Any, ...]) -> Blueprint | None:
        """The factor of the last convolution's output, from one run of the block: the shortest decimal."""
        x = inputs[0]
        body = self.execute_plainly(module, blueprint._replace(scale=1.0), x) - x
        rest = module(x) - x
        scale = float(f"{(rest * body).sum() / (body * body).sum():.6g}")
        return blueprint._replace(scale=scale)

    def executor(self, module: nn.Module, blueprint: Blueprint, backend: str | None) -> Executor:
        return ResidualExecutor(module, blueprint, backend, self)

    def call(self, owner: nn.Module, blueprint: Blueprint) -> Callable[[Any, list[Tensor]], list[Tensor]]:
        if blueprint.shared is None:
            return lambda layer, states: [*states, layer(join(states))]
        activation = get(owner, blueprint.shared)
        return lambda layer, states: [*states, activation(layer(join(states)))]

    def finish(self, owner: nn.Module, blueprint: Blueprint, states: Tensor, x: Tensor) -> Tensor:
        out = get(owner, blueprint.last)(states)
        return out + x if blueprint.scale == 1.0 else out * blueprint.scale + x


class ResidualExecutor:
    def __init__(self, owner: nn.Module, blueprint: Blueprint, backend: str | None, family: ResidualDenseBlocks):
        self._owner, self._blueprint, self._family = owner, blueprint, family
        self._backend, self.plan = backend, Plan(self.describe)

    def __call__(self, x: Tensor) -> Tensor | None:
        if not isinstance(get(self._owner, self._blueprint.last), nn.Module):
            return None
        states = self.plan(self._owner, x, self._backend)
        return None if states is None else self._family.finish(self._owner, self._blueprint, states, x)

    def summary(self) -> str:
        channels, _ = widths(self._owner, self._blueprint.layers[0])
        return summarise(self.plan.segments(self._owner, torch.empty(1, channels or 0, device="meta")))

    def describe(self, owner: nn.Module) -> list[DenseLayer] | str:
        blueprint = self._blueprint
        if not all(skeleton.holds(owner) for skeleton in blueprint.skeleton):
            return "it has other children than when it was accelerated"
        if changed := differ(owner, blueprint.attributes):
            return f"{changed[0]} is not what it was when it was accelerated"
        call = self._family.call(owner, blueprint)
        return [describe_layer(owner, layer, call) for layer in blueprint.layers]
