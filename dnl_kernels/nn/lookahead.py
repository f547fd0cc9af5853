"""Sums over a growing list that are asked for one after the other, with every member read once for several of them.

    s_t = sum_i w_{t,i} z_i,  t = 0, 1, 2, .. (or downwards), over the z_i that are there when s_t is asked for

One after the other, the sums of L calls read L^2 / 2 tensors. Here one pass over what is there makes the first of
AHEAD sums and begins the others, to which is added what arrived in between: a fourth of the reads, for AHEAD - 1 sums
that wait. DenseSum asks for its sums in this order forward, and for the gradients of its states backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backend

AHEAD = 4  # kDenseSumTargets: as many sums as a pass keeps in registers
WORTH = 8  # members from which on beginning other sums costs less than it saves


class _Begun(NamedTuple):
    sum: Tensor
    members: dict[int, tuple[Tensor, int]]  # what is in it, and the version of each


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def applies(x: Tensor, backend: str | None) -> bool:
    """Whether these sums would be those of the CPU kernels, called one by one with nothing else looking on."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and _backend.select("dense_sum", backend, x, count=1) == "cpu"
    )


class Lookahead:
    """step: 1 for targets that ascend, -1 for targets that descend."""

    def __init__(self, step: int):
        self.step = step
        self.begun: dict[int, _Begun] = {}
        self.weight: tuple[Tensor, int] | None = None  # of the last sum, and its version then

    def sum(
        self,
        target: int,
        members: Mapping[int, Tensor],
        weight: Tensor,
        weights: Callable[[list[int], list[int]], Tensor],
        last: int,
        channel_dim: int,
    ) -> Tensor:
        """s_target over `members`, of which every later target sees all. weights(targets, members): their part of
        `weight`, [targets, members] or [targets, members, C]; last: the last target there is."""
        same = self.weight is not None and self.weight[0] is weight and self.weight[1] == _version(weight)
        if not same:  # changed in place, or made anew for each call (a parametrisation)
            self.begun, self.weight = {}, (weight, _version(weight))
        first = next(iter(members.values()))
        begun = self.begun.pop(target, None)
        if begun is not None and all(
            members.get(i) is z and _version(z) == version for i, (z, version) in begun.members.items()
        ):
            rest = [i for i in members if i not in begun.members]
            if rest:
                self._add([begun.sum], rest, members, weights([target], rest), True, channel_dim)
            return begun.sum.to(first.dtype)
        targets = [target]
        if same and len(members) >= WORTH:
            targets = list(range(target, last + self.step, self.step))[:AHEAD]
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        sums = [torch.empty(first.shape, dtype=wide) for _ in targets]
        self._add(sums, list(members), members, weights(targets, list(members)), False, channel_dim)
        inside = {i: (z, _version(z)) for i, z in members.items()}
        self.begun |= {t: _Begun(s, inside) for t, s in zip(targets[1:], sums[1:], strict=True)}
        return sums[0].to(first.dtype)

    @staticmethod
    def _add(sums, which, members, weight, accumulate, channel_dim):
        states = [members[i].detach() for i in which]
        channel_dim = channel_dim % states[0].dim() if weight.dim() == 3 else 0
        torch.ops.dnl.dense_sum_add(sums, states, weight.to(states[0].dtype), accumulate, channel_dim)
