"""What stands around the blocks in the nn.Sequential of a DenseNet's features: the normalisation, activation and
maximum behind the first convolution, and the normalisation at the end, which final.py has pooled in the same pass."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..._kept import Kept
from ...ops.transition import cpu as evaluated
from .. import layers
from .base import (
    Executor,
    Skeleton,
    evaluated_norm,
    fused_activation,
    get,
    holds_its_activation,
    is_activation,
    is_norm,
    origin,
)

POOL = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False, "return_indices": False}

# The nn.Sequential whose network reads nothing of its output but means of it over all positions: it may return those.
POOLED: ContextVar[nn.Module | None] = ContextVar("POOLED", default=None)


class Blueprint(NamedTuple):
    norm: str | None  # of the stem, where there is one; names of children
    activation: str | None  # None: within the norm
    pool: str | None
    last: str | None  # the normalisation at the end; an activation stands in it or is relu, a function
    own: tuple[Skeleton, ...]  # of the two normalisations, those that hold their activation: of a class that was proved


def last_norm(module: nn.Module) -> str | None:
    """The name of the last child where it is a normalisation."""
    name, last = next(reversed(module._modules.items()), ("", None))
    return name if last is not None and is_norm(last) else None


def is_sequence(module: object) -> bool:
    return isinstance(module, nn.Sequential) and origin(module).forward is nn.Sequential.forward


def own_activations(module: nn.Module, *norms: str | None) -> tuple[Skeleton, ...]:
    return tuple(Skeleton.of(module, name) for name in norms if name and holds_its_activation(get(module, name)))


def is_stem_pool(module: Any) -> bool:
    if type(module) is not nn.MaxPool2d or layers.plain(module):
        return False
    return all(_both(getattr(module, name), value) for name, value in POOL.items())


def _both(value: Any, expected: int) -> bool:
    return all(v == expected for v in (value if isinstance(value, tuple) else (value,)))


class Stems:
    name = "stem"
    structure = "stems: nn.Sequential with a normalisation, an activation and a maximum of 3x3 pixels in a row"
    surroundings = True
    evaluated = True

    def blueprints(self, module: nn.Module) -> Iterable[Blueprint | str]:
        if not is_sequence(module):
            return
        names, children = list(module._modules), list(module._modules.values())
        for at, norm in enumerate(children):
            own = holds_its_activation(norm)
            end = at + (1 if own else 2)
            if end >= len(children) or not is_norm(norm) or not (own or is_activation(children[at + 1])):
                continue
            activation = None if own else children[at + 1]
            if is_stem_pool(children[end]) and fused_activation(norm, activation, (2,)) is not None:
                last = last_norm(module)
                yield Blueprint(names[at], None if own else names[at + 1], names[end], last,
                                own_activations(module, names[at], last))  # fmt: skip
                return

    def subject(self, module: nn.Module, blueprint: Blueprint) -> nn.Module:
        """The stem alone: an nn.Sequential calls its children one after the other, whatever else they are."""
        new = reduced(module)
        names = (blueprint.norm, blueprint.activation, blueprint.pool)
        new.__dict__["_modules"] = {name: module._modules[name] for name in names if name is not None}
        return new

    def inputs(self, module: nn.Module, blueprint: Blueprint) -> Iterable[tuple[Any, ...]]:
        channels = getattr(get(module, blueprint.norm or ""), "num_features", None)
        if channels is not None:
            yield ((2, channels, 7, 6),)

    def execute_plainly(self, module: nn.Module, blueprint: Blueprint, *inputs: Any) -> Tensor:
        z = inputs[0]
        for child in module._modules.values():
            z = child(z)  # type: ignore[misc]
        return z

    def complete(self, module: nn.Module, blueprint: Blueprint, inputs: tuple[Any, ...]) -> Blueprint:
        return blueprint

    def executor(self, module: nn.Module, blueprint: Blueprint, backend: str | None) -> Executor:
        return SequenceExecutor(module, blueprint, backend)


def reduced(module: nn.Module) -> nn.Module:
    """A module of the same class and state, whose children can be others."""
    new: Any = object.__new__(origin(module))
    new.__dict__.update({k: v for k, v in module.__dict__.items() if not k.startswith("_dnl")})
    return new


class SequenceExecutor:
    """Calls the children one after the other, in evaluation those of the stem at once and, where means are all that is
    read, the last one with them."""

    def __init__(self, owner: nn.Module, blueprint: Blueprint, backend: str | None):
        self._owner, self._blueprint, self._backend = owner, blueprint, backend
        self._kept, self._kept_last = Kept(), Kept()

    def __call__(self, x: Tensor) -> Tensor | None:
        owner, blueprint = self._owner, self._blueprint
        if self._backend not in (None, "cpu") or layers.called_for_every_module() or not is_sequence(owner):
            return None
        stem = self._stem()
        last = self._last() if POOLED.get() is owner else None
        if stem is None and last is None:
            return None
        z, done = x, 0
        for at, child in enumerate(owner._modules.values()):
            if at < done:
                continue
            fused = None
            if stem is not None and at == stem[0]:
                fused = self._pooled(z, stem[2], get(owner, blueprint.norm or ""))
                done = at + stem[1] if fused is not None else 0
            elif last is not None and at == len(owner._modules) - 1:
                fused = self._means(z, last, child)
            z = child(z) if fused is None else fused  # type: ignore[misc]
        return z

    def _stem(self) -> tuple[int, int, str] | None:
        """Where the stem begins, how many children it has, and the name of its activation; None where calling them
        would do more than PyTorch's own modules do in evaluation."""
        owner, blueprint = self._owner, self._blueprint
        names = list(owner._modules)
        chain = [name for name in (blueprint.norm, blueprint.activation, blueprint.pool) if name is not None]
        if blueprint.norm not in names:
            return None
        at = names.index(blueprint.norm)
        if names[at : at + len(chain)] != chain or not is_stem_pool(owner._modules[chain[-1]]):
            return None
        norm: Any = owner._modules[blueprint.norm]
        if blueprint.activation is None and not self._as_proved(blueprint.norm):
            return None
        activation = evaluated_norm(norm, blueprint.activation and owner._modules[blueprint.activation], (2,))
        return None if activation is None else (at, len(chain), activation)

    def _last(self) -> str | None:
        name = last_norm(self._owner)
        if name is None or name != self._blueprint.last:
            return None
        norm: Any = self._owner._modules[name]
        if holds_its_activation(norm) != any(s.path == name for s in self._blueprint.own) or not self._as_proved(name):
            return None
        return evaluated_norm(norm, None if holds_its_activation(norm) else nn.ReLU(), (1, 2, 3))

    def _as_proved(self, norm: str) -> bool:
        return all(skeleton.holds(self._owner) for skeleton in self._blueprint.own if skeleton.path == norm)

    def _pooled(self, z: Tensor, activation: str, norm: Any) -> Tensor | None:
        tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        # Of channels in the last place PyTorch's own pooling is faster, and gives back what it takes.
        if not isinstance(z, Tensor) or evaluated.limit(z, tensors) or not z.is_contiguous():
            return None
        return evaluated.norm_activation_max_pool(z, tensors, activation, norm.eps, self._kept)

    def _means(self, z: Tensor, activation: str, norm: Any) -> Tensor | None:
        tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if not isinstance(z, Tensor) or evaluated.limit(z, tensors, (3, 4, 5)) or not z.is_contiguous():
            return None
        means = evaluated.norm_activation_mean(z, tensors, activation, norm.eps, self._kept_last)
        return means.view(*means.shape, *(1,) * (z.dim() - 2))
