"""Non-local blocks of mmcv: the matrix of all pairs of positions is replaced, all else is the block's own modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...ops.nonlocal_attention.api import nonlocal_attention
from .base import Attributes, Executor, Skeleton, attributes, differ, get

MODES = {"gaussian": "softmax", "embedded_gaussian": "softmax", "dot_product": "dot"}
SIZES = ((9,), (6, 4), (3, 4, 6))


class Blueprint(NamedTuple):
    skeleton: tuple[Skeleton, ...]
    attributes: Attributes


class NonLocalBlocks:
    name = "non-local block"
    structure = "non-local blocks of mmcv: children g, conv_out, theta and phi, attributes mode, use_scale, sub_sample"

    def blueprints(self, module: nn.Module) -> Iterable[Blueprint | str]:
        wanted = ("mode", "use_scale", "sub_sample", "in_channels", "inter_channels")
        if not {"g", "conv_out"} <= set(module._modules) or not all(hasattr(module, name) for name in wanted):
            return
        if module.mode not in MODES:
            yield f"mode '{module.mode}' has no kernel; {', '.join(map(repr, MODES))} have"
            return
        yield Blueprint((Skeleton.of(module, ""),), attributes(module, [""]))

    def inputs(self, module: Any, blueprint: Blueprint) -> Iterable[tuple[Any, ...]]:
        return [((2, module.in_channels, *sizes),) for sizes in SIZES]

    def execute_plainly(self, module: Any, blueprint: Blueprint, *inputs: Any) -> Tensor:
        return self._execute(module, inputs[0], "reference")

    def complete(self, module: nn.Module, blueprint: Blueprint, inputs: tuple[Any, ...]) -> Blueprint | None:
        return blueprint

    def executor(self, module: Any, blueprint: Blueprint, backend: str | None) -> Executor:
        def execute(x: Tensor) -> Tensor | None:
            if not all(skeleton.holds(module) for skeleton in blueprint.skeleton):
                return None
            if differ(module, blueprint.attributes):  # it may mean anything
                return None
            return self._execute(module, x, backend)

        return execute

    def _execute(self, module: Any, x: Tensor, backend: str | None) -> Tensor:
        def positions(features: Tensor) -> Tensor:
            return features.flatten(2).unsqueeze(1)

        value = positions(module.g(x))
        if module.mode == "gaussian":
            query, key = positions(x), positions(module.phi(x) if module.sub_sample else x)
        else:
            query, key = positions(module.theta(x)), positions(module.phi(x))
        scale = None
        if MODES[module.mode] == "softmax":
            scaled = module.mode == "embedded_gaussian" and module.use_scale
            scale = query.shape[2] ** -0.5 if scaled else 1.0
        y = nonlocal_attention(query, key, value, kernel=MODES[module.mode], scale=scale, layout="channels_first",
                               backend=backend)  # fmt: skip
        return x + get(module, "conv_out")(y.squeeze(1).unflatten(2, x.shape[2:]))
