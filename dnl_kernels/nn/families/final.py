"""The normalisation, activation and global pooling in front of a DenseNet's classifier, in evaluation one pass.

They are spread over a network: the normalisation ends an nn.Sequential, the activation and the mean stand in the
network's forward or in further modules. That forward runs as it is; only the nn.Sequential returns the mean of the
activated numbers, [B, C, 1, 1], of which an activation by relu and a mean make the same again. Proved on the network
with everything in front of the normalisation left out, and not done where a module behind it has a hook.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import layers
from .base import (
    Attributes,
    Executor,
    attributes,
    differ,
    evaluated_norm,
    fused_activation,
    get,
    holds_its_activation,
    is_convolution,
    origin,
)
from .dense import DenseBlocks
from .stem import POOLED, is_sequence, last_norm, own_activations, reduced
from .stem import Blueprint as Sequence

SIZES = ((30,), (5, 6), (2, 5, 3))
BEFORE = "input_resolution"  # torchxrayvision's: how an input is resized before anything else


class Blueprint(NamedTuple):
    features: str
    attributes: Attributes  # of the network and of everything behind the features
    behind: tuple[tuple[str, type], ...]


class Source(nn.Module):
    """In the place of all that stands in front of the last normalisation."""

    def __init__(self, z: Tensor):
        super().__init__()
        self.z = z

    def forward(self, x: Tensor) -> Tensor:
        return self.z


class FinalPoolings:
    name = "final pooling"
    structure = "final poolings: a network with dense blocks in an nn.Sequential that ends in a normalisation"
    surroundings = True
    evaluated = True

    def blueprints(self, module: nn.Module) -> Iterable[Blueprint | str]:
        children: dict[str, Any] = dict(module._modules)
        found = [name for name, child in children.items() if is_sequence(child) and last_norm(child) is not None]
        if is_sequence(module) or len(found) != 1:
            return
        features: Any = module._modules[found[0]]
        blocks = DenseBlocks()
        if not any(child is not None and blocks.layers(child) is not None for child in features._modules.values()):
            return
        norm = features._modules[last_norm(features) or ""]
        if fused_activation(norm, None if holds_its_activation(norm) else nn.ReLU(), (1, 2, 3)) is None:
            return
        behind = tuple((path, origin(m)) for path, m in _behind(module, found[0]))
        if len(behind) > 1:
            yield Blueprint(found[0], attributes(module, [path for path, _ in behind]), behind)

    def subject(self, module: nn.Module, blueprint: Blueprint) -> nn.Module:
        features: Any = module._modules[blueprint.features]
        name = last_norm(features)
        norm = features._modules[name]
        rank = _rank(features)
        z = torch.randn((2, norm.num_features, *SIZES[rank - 1]), generator=torch.Generator().manual_seed(5))
        short, new = reduced(features), reduced(module)
        short.__dict__["_modules"] = {"source": Source(z.double()), name: norm}
        new.__dict__["_modules"] = {**module._modules, blueprint.features: short}
        new.__dict__.pop(BEFORE, None)
        return new

    def inputs(self, module: nn.Module, blueprint: Blueprint) -> Iterable[tuple[Any, ...]]:
        rank = get(module, f"{blueprint.features}.source").z.dim() - 2
        for channels in (3, 1):
            yield ((2, channels, *SIZES[rank - 1]),)

    def execute_plainly(self, module: nn.Module, blueprint: Blueprint, *inputs: Any) -> Tensor:
        return module(*inputs)

    def complete(self, module: nn.Module, blueprint: Blueprint, inputs: tuple[Any, ...]) -> Blueprint:
        return blueprint

    def executor(self, module: nn.Module, blueprint: Blueprint, backend: str | None) -> Executor:
        return FinalExecutor(module, blueprint)

    def inner(self, module: nn.Module, blueprint: Blueprint) -> tuple[str, str, Any]:
        """What is accelerated together with it: a path, a family, a blueprint."""
        features = get(module, blueprint.features)
        last = last_norm(features)
        return blueprint.features, "stem", Sequence(None, None, None, last, own_activations(features, last))


def _rank(features: nn.Module) -> int:
    convolution: Any = next((m for m in features.modules() if is_convolution(m)), None)
    return len(convolution.kernel_size) if convolution is not None else 2


def _behind(module: nn.Module, features: str) -> list[tuple[str, nn.Module]]:
    """The network and its modules but for the features and what is in them."""
    found = [("", module)]
    for name, child in module._modules.items():
        if name != features and child is not None:
            found += child.named_modules(prefix=name)
    return found


class FinalExecutor:
    def __init__(self, owner: nn.Module, blueprint: Blueprint):
        self._owner, self._blueprint = owner, blueprint

    def __call__(self, *args: Any) -> Any:
        owner, blueprint = self._owner, self._blueprint
        features = get(owner, blueprint.features)
        if not self._norm_is_evaluated(features) or layers.called_for_every_module():
            return None
        behind = _behind(owner, blueprint.features)
        if tuple((path, origin(m)) for path, m in behind) != blueprint.behind or differ(owner, blueprint.attributes):
            return None
        if layers.plain(features) or any(layers.plain(m) for _, m in behind if m is not owner):
            return None
        token = POOLED.set(features)
        try:
            return origin(owner).forward(owner, *args)
        finally:
            POOLED.reset(token)

    def _norm_is_evaluated(self, features: Any) -> bool:
        name = last_norm(features) if isinstance(features, nn.Sequential) else None
        norm: Any = features._modules[name] if name else None
        if norm is None or torch.is_grad_enabled() and any(p.requires_grad for p in norm.parameters()):
            return False
        return evaluated_norm(norm, None if holds_its_activation(norm) else nn.ReLU(), (1, 2, 3)) is not None
