"""DenseFormer's depth-weighted averages: states are kept as they come, not copied into one tensor, and each average is
one read of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops.dense_sum.api import dense_sum
from .base import Attributes, Executor, Skeleton, attributes, differ, is_linear

NAMES = ("n_blocks", "dilation", "period", "accumulators")
CHANGE = ("accumulators", "dtype")  # with every pass


class Blueprint(NamedTuple):
    skeleton: tuple[Skeleton, ...]
    attributes: Attributes


class States(list):
    """What stands in `accumulators` of an accelerated module: one list of states per residue of the dilation."""


class DepthWeightedAverages:
    name = "depth-weighted average"
    structure = (
        "depth-weighted averages of DenseFormer: attributes n_blocks, dilation, period, accumulators, child alphas"
    )
    methods = ("forward", "init_accumulators")

    def blueprints(self, module: nn.Module) -> Iterable[Blueprint | str]:
        alphas = module._modules.get("alphas")
        if all(hasattr(module, name) for name in (*NAMES, "init_accumulators")) and alphas is not None:
            if all(alpha is None or is_linear(alpha) for alpha in alphas._modules.values()):
                yield Blueprint(
                    (Skeleton.of(module, ""), Skeleton.of(module, "alphas")), attributes(module, [""], CHANGE)
                )

    def inputs(self, module: Any, blueprint: Blueprint) -> Iterable[tuple[Any, ...]]:
        return [tuple((2, 3, 4) for _ in range(module.n_blocks + 1))]

    def drive(self, module: Any, *inputs: Tensor) -> Tensor:
        """A pass as a transformer makes it, with the states given."""
        module.init_accumulators(inputs[0])
        return torch.cat([module(x, index) for index, x in enumerate(inputs[1:])])

    def execute_plainly(self, module: Any, blueprint: Blueprint, *inputs: Any) -> Tensor:
        def average(index: int) -> Tensor:
            if (index + 1) % module.period:
                return inputs[index + 1]
            seen = inputs[(index + 1) % module.dilation : index + 2 : module.dilation]
            return torch.tensordot(module.alphas[index].weight.view(-1), torch.stack(seen), dims=1)

        return torch.cat([average(index) for index in range(len(inputs) - 1)])

    def complete(self, module: nn.Module, blueprint: Blueprint, inputs: tuple[Any, ...]) -> Blueprint | None:
        return blueprint

    def executor(self, module: Any, blueprint: Blueprint, backend: str | None) -> Executor:
        return AverageExecutor(module, blueprint, backend)


class AverageExecutor:
    def __init__(self, owner: Any, blueprint: Blueprint, backend: str | None):
        self._owner, self._blueprint, self._backend = owner, blueprint, backend

    def init_accumulators(self, x: Tensor) -> bool | None:
        owner, blueprint = self._owner, self._blueprint
        # Under autocast the original's product has another dtype than its states.
        if torch.is_autocast_enabled(x.device.type) or not all(s.holds(owner) for s in blueprint.skeleton):
            return None
        if differ(owner, blueprint.attributes, CHANGE):  # it may mean anything
            return None
        owner.accumulators = States([[x], *([] for _ in range(owner.dilation - 1))])
        return True

    def __call__(self, x: Tensor, block_idx: int) -> Tensor | None:
        owner, at = self._owner, block_idx + 1
        if not isinstance(owner.accumulators, States):
            return None
        if x.dtype != owner.accumulators[0][0].dtype:  # as it is kept in one tensor with the first
            x = x.to(owner.accumulators[0][0].dtype)
        states = owner.accumulators[at % owner.dilation]
        place = at // owner.dilation
        del states[place:]
        states.extend(torch.zeros_like(x) for _ in range(place - len(states)))
        states.append(x)
        if at % owner.period:
            return x
        return dense_sum(states, owner.alphas[block_idx].weight.view(-1), backend=self._backend)
