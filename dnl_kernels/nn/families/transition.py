"""Transitions of DenseNets: normalisation, activation, 1x1 convolution, average pooling.

The pooling acts within channels, the convolution within pixels, both are linear: pooled first, a transition has a
fourth (in three dimensions an eighth) of the products, and norm, activation and pooling are one pass over the input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..._kept import Kept
from ...ops.norm_activation import cpu as norm_activation
from ...ops.transition import cpu as evaluated
from .. import layers, running_statistics
from .base import (
    Executor,
    Skeleton,
    fused_activation,
    get,
    holds_its_activation,
    is_activation,
    is_convolution,
    is_norm,
    origin,
)

POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
SIZES = ((7,), (7, 6), (5, 4, 6))


class Blueprint(NamedTuple):
    skeleton: tuple[Skeleton, ...]
    norm: str
    activation: str | None  # None: within the norm (timm)
    convolution: str
    pool: str


class Transitions:
    name = "transition"
    structure = (
        "transitions: nn.Sequential of a normalisation, an activation, a 1x1 convolution and 2x2 average pooling"
    )

    def blueprints(self, module: nn.Module) -> Iterable[Blueprint | str]:
        names = list(module._modules)
        children: list[Any] = [module._modules[name] for name in names]
        if not isinstance(module, nn.Sequential) or len(names) not in (3, 4) or None in children:
            return
        own = len(names) == 3
        norm, convolution, pool = children[0], children[-2], children[-1]
        if not (is_norm(norm) and is_convolution(convolution) and (own or is_activation(children[1]))):
            return
        if own and not holds_its_activation(norm):
            return
        if origin(module).forward is not nn.Sequential.forward:
            yield "its class has a forward of its own"
        elif (reason := _does_not_commute(convolution, pool)) is not None:
            yield reason
        else:
            skeleton = [Skeleton.of(module, "")] + ([Skeleton.of(module, names[0])] if own else [])
            yield Blueprint(tuple(skeleton), names[0], None if own else names[1], names[-2], names[-1])

    def inputs(self, module: nn.Module, blueprint: Blueprint) -> Iterable[tuple[Any, ...]]:
        convolution = get(module, blueprint.convolution)
        yield ((2, convolution.in_channels, *SIZES[len(convolution.kernel_size) - 1]),)

    def execute_plainly(self, module: nn.Module, blueprint: Blueprint, *inputs: Any) -> Tensor:
        z = inputs[0]
        for path in (blueprint.norm, blueprint.activation, blueprint.pool, blueprint.convolution):
            z = z if path is None else get(module, path)(z)
        return z

    def complete(self, module: nn.Module, blueprint: Blueprint, inputs: tuple[Any, ...]) -> Blueprint | None:
        return blueprint

    def executor(self, module: nn.Module, blueprint: Blueprint, backend: str | None) -> Executor:
        return TransitionExecutor(module, blueprint, backend, self)


def _does_not_commute(convolution: Any, pool: Any) -> str | None:
    """Why the order of the two cannot be changed."""
    rank = len(getattr(convolution, "kernel_size", ()))
    one, zero = (1,) * rank, (0,) * rank
    if type(convolution) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"its convolution is of type {type(convolution).__name__}"
    if (
        convolution.kernel_size != one
        or convolution.stride != one
        or convolution.padding not in (zero, "valid", "same")
    ):
        return "its convolution is not 1x1, of stride 1 and without padding"
    if type(pool) is not POOLS[rank - 1]:
        return f"its pooling is {type(pool).__name__}, not {POOLS[rank - 1].__name__}"
    # A window that is divided by less than its size, at a border, would scale the bias.
    if _all(pool.kernel_size, 2) and _all(pool.stride, 2) and _all(pool.padding, 0) and not pool.ceil_mode:
        return None if getattr(pool, "divisor_override", None) is None else "its pooling overrides the divisor"
    return "its pooling is not of 2x2 windows without padding"


def _all(value: Any, expected: int) -> bool:
    return all(v == expected for v in (value if isinstance(value, tuple) else (value,)))


class TransitionExecutor:
    def __init__(self, owner: nn.Module, blueprint: Blueprint, backend: str | None, family: Transitions):
        self._owner, self._blueprint, self._backend, self._family = owner, blueprint, backend, family
        self._kept = Kept()

    def __call__(self, x: Tensor) -> Tensor | None:
        owner, blueprint = self._owner, self._blueprint
        if not all(skeleton.holds(owner) for skeleton in blueprint.skeleton):
            return None
        convolution, pool = get(owner, blueprint.convolution), get(owner, blueprint.pool)
        if (
            layers.plain(convolution)
            or layers.plain(pool)
            or layers.called_for_every_module()
            or _does_not_commute(convolution, pool) is not None
        ):
            return None
        if min(x.shape[2:], default=0) < 2 or x.dim() != len(convolution.kernel_size) + 2:
            return None
        z = self._fused(x, convolution)
        return self._family.execute_plainly(owner, blueprint, x) if z is None else z

    def _fused(self, x: Tensor, convolution: Any) -> Tensor | None:
        """Where norm and activation are PyTorch's own: one pass in evaluation, else one for the pooled activation in
        front of the convolution."""
        norm: Any = get(self._owner, self._blueprint.norm)
        path = self._blueprint.activation
        activation = fused_activation(norm, path and get(self._owner, path), (2,))
        if activation is None or self._backend not in (None, "cpu"):
            return None
        tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        measures = norm.training or norm.running_mean is None
        if not measures and not evaluated.limit(x, (convolution.weight, convolution.bias, *tensors)):
            return evaluated.transition(
                x, convolution.weight, convolution.bias, tensors, activation, True, norm.eps, self._kept
            )
        mean, var = (None, None) if measures else (norm.running_mean, norm.running_var)
        dtypes = {t.dtype for t in (x, norm.weight, norm.bias, mean, var) if t is not None}
        if len(dtypes) > 1 or norm_activation.limit(x, mean, "floor"):
            return None
        z, mean, var = norm_activation.norm_activation(
            x, norm.weight, norm.bias, mean, var, activation, "floor", norm.eps
        )
        if measures:
            running_statistics.update([(norm, mean, var)], x.numel() // x.shape[1])
        return convolution(z)
