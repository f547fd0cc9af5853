"""Non-local blocks of mmcv: the matrix of all pairs of positions is replaced, all else is the block's own modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._autograd import recorded
from ...ops.nonlocal_attention.api import nonlocal_attention
from .. import layers
from .base import Attributes, Executor, Skeleton, attributes, differ, get

MODES = {"gaussian": "softmax", "embedded_gaussian": "softmax", "dot_product": "dot"}
CONCATENATION = "concatenation"
SIZES = ((9,), (6, 4), (3, 4, 6))


class Blueprint(NamedTuple):
    skeleton: tuple[Skeleton, ...]
    attributes: Attributes


class NonLocalBlocks:
    name = "non-local block"
    modes: tuple[str, ...] = tuple(MODES)
    structure = "non-local blocks of mmcv: children g, conv_out, theta and phi, attributes mode, use_scale, sub_sample"

    def blueprints(self, module: nn.Module) -> Iterable[Blueprint | str]:
        wanted = ("mode", "use_scale", "sub_sample", "in_channels", "inter_channels")
        if not {"g", "conv_out"} <= set(module._modules) or not all(hasattr(module, name) for name in wanted):
            return
        if module.mode not in self.modes:
            if module.mode not in (*MODES, CONCATENATION):
                yield f"mode '{module.mode}' is not one of {', '.join(map(repr, (*MODES, CONCATENATION)))}"
            return
        yield Blueprint((Skeleton.of(module, ""),), attributes(module, [""]))

    def inputs(self, module: Any, blueprint: Blueprint) -> Iterable[tuple[Any, ...]]:
        return [((2, module.in_channels, *sizes),) for sizes in SIZES]

    def execute_plainly(self, module: Any, blueprint: Blueprint, *inputs: Any) -> Any:
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

    def _execute(self, module: Any, x: Tensor, backend: str | None) -> Tensor | None:
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


def positions(features: Tensor) -> Tensor:
    return features.flatten(2).unsqueeze(1)


class ConcatenatedNonLocalBlocks(NonLocalBlocks):
    """Weights relu(v . [theta_i, phi_j]) / N. In evaluation: mmcv's own forward cannot be differentiated."""

    name = "concatenated non-local block"
    structure = "those of mode 'concatenation'"
    modes = (CONCATENATION,)
    evaluated = True

    def execute_plainly(self, module: Any, blueprint: Blueprint, *inputs: Any) -> Tensor:
        if (y := self._execute(module, inputs[0], None)) is None:
            raise ValueError("concat_project is not a 1x1 convolution to one channel and a ReLU")
        return y

    def _execute(self, module: Any, x: Tensor, backend: str | None) -> Tensor | None:
        convolution = _projection(module)
        if convolution is None or torch.is_autocast_enabled(x.device.type) or recorded([x, *module.parameters()]):
            return None
        value, query, key = (child(x).flatten(2) for child in (module.g, module.theta, module.phi))
        weight = convolution.weight.flatten().to(torch.float64)
        if query.shape[1] + key.shape[1] != len(weight):
            return None
        a, b = (torch.einsum("c,bcn->bn", w, z.double()) for w, z in
                zip(weight.split([query.shape[1], key.shape[1]]), (query, key), strict=True))  # fmt: skip
        y = rectified_sums(a if convolution.bias is None else a + convolution.bias, b, value.double())
        return x + get(module, "conv_out")((y / key.shape[2]).to(x.dtype).unflatten(2, x.shape[2:]))


def _projection(module: Any) -> Any:
    """The 1x1 convolution of the concatenated features to one number, where a relu and nothing else follows it."""
    found: Any = get(module, "concat_project")
    inner = [m for m in found.modules() if m is not found] if found is not None else []
    if [type(m) for m in inner] != [nn.Conv2d, nn.ReLU] or any(map(layers.plain, (found, *inner))):
        return None
    convolution: Any = inner[0]
    plain = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "groups": 1, "out_channels": 1}
    return convolution if all(getattr(convolution, name) == value for name, value in plain.items()) else None


def rectified_sums(a: Tensor, b: Tensor, value: Tensor) -> Tensor:
    """sum_j max(a_i + b_j, 0) value_j for a [B, N], b [B, M] and value [B, C, M]: [B, C, N].

    Only those j count whose b_j is larger than -a_i. Sorted by b they are the last ones, so that
    a_i sum_j value_j + sum_j b_j value_j are two sums from the end: M log M, and no N x M matrix.
    """
    ordered, order = b.sort(dim=1)
    place = torch.searchsorted(ordered, -a, right=True).unsqueeze(1).expand(-1, value.shape[1], -1)
    value = value.gather(2, order.unsqueeze(1).expand_as(value))

    def from_the_end(x: Tensor) -> Tensor:
        return nn.functional.pad(x.flip(2).cumsum(2).flip(2), (0, 1)).gather(2, place)

    return a.unsqueeze(1) * from_the_end(value) + from_the_end(ordered.unsqueeze(1) * value)
