"""What a family of modules gives to `accelerate`: how it is recognised, and another way to run it.

A recogniser looks at the structure of a module and writes a blueprint: paths, roles and classes, plain data that is
pickled with the model. An executor runs a module by its blueprint; it reads the submodules behind the paths anew
whenever they have changed, and returns None where it does not know what they mean (any more).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Executor = Callable[..., Tensor | None]
SIMPLE = (bool, int, float, str, type(None))
OWN = frozenset(nn.Module().__dict__)  # what every module has


class Family(Protocol):
    """One kind of module. `blueprints` yields what `module` may be, likeliest first, or a string: it looks like one of
    this family, but is none, and why. Nothing: it has no likeness."""

    name: str
    structure: str  # what is looked for, for the error where nothing is found

    def blueprints(self, module: nn.Module) -> Iterable[Any]: ...

    def execute_plainly(self, module: nn.Module, blueprint: Any, *inputs: Any) -> Tensor:
        """The blueprint's meaning in plain PyTorch, by calling the submodules."""

    def complete(self, module: nn.Module, blueprint: Any, inputs: tuple[Any, ...]) -> Any:
        """The blueprint with what only a run of the module tells, such as a scale; None if the run contradicts it."""

    def executor(self, module: nn.Module, blueprint: Any, backend: str | None) -> Executor: ...

    # Optional: `methods`, those to override besides forward; `drive(module, *inputs)`, a use of the module where it is
    # more than one call; `prepare(copy)`, before the proof.

    def inputs(self, module: nn.Module, blueprint: Any) -> Iterable[tuple[Any, ...]]:
        """Shapes of small inputs: tried in turn until the module takes one."""


def origin(module: object) -> Any:
    """The class that the user gave it, also where it is accelerated."""
    return getattr(type(module), "_dnl_origin", type(module))


def get(owner: nn.Module, path: str) -> Any:
    """The submodule, or None."""
    found: Any = owner
    for name in path.split(".") if path else ():
        found = found._modules.get(name) if isinstance(found, nn.Module) else None
    return found


class Skeleton(NamedTuple):
    """A module whose class and children's names are part of the structure that was proved."""

    path: str
    kind: type
    children: tuple[str, ...]

    @classmethod
    def of(cls, owner: nn.Module, path: str) -> Skeleton:
        module = get(owner, path)
        return cls(path, origin(module), tuple(module._modules))

    def holds(self, owner: nn.Module) -> bool:
        module = get(owner, self.path)
        return module is not None and origin(module) is self.kind and tuple(module._modules) == self.children


class Attributes:
    """The plain attributes of modules (drop_rate, res_scale, ..) as they were."""

    def __init__(self, modules: Iterable[nn.Module]):
        found = [(m.__dict__, k) for m in modules for k, v in m.__dict__.items() if k not in OWN and _simple(v)]
        self._where, self.values = found, [d.get(k) for d, k in found]

    def changed(self) -> list[str]:
        """The names of those that are different now."""
        now = [d.get(k) for d, k in self._where]
        if now == self.values:
            return []
        return [k for (_, k), a, b in zip(self._where, now, self.values, strict=True) if a != b]


def _simple(value: object) -> bool:
    return isinstance(value, SIMPLE) or (isinstance(value, (tuple, list)) and all(isinstance(v, SIMPLE) for v in value))


def is_convolution(module: object) -> bool:
    """By what it has, so that wrappers that pass attributes on and quantised ones count too."""
    return hasattr(module, "kernel_size") and hasattr(module, "out_channels")


def is_linear(module: object) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def is_norm(module: object) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) or "Norm" in type(module).__name__


def is_activation(module: object) -> bool:
    return type(module).__module__.endswith("modules.activation") and not isinstance(module, nn.MultiheadAttention)


def is_dropout(module: object) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)


def join(states: list[Tensor], dim: int = 1) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states, dim)
