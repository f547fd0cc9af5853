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

from .. import layers

Executor = Callable[..., Tensor | None]
Attributes = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
MUST = "_dnl_must"  # in the __dict__ of a module whose executor may not decline: in the proof
OWN = frozenset(nn.Module().__dict__)  # what every module has


class Family(Protocol):
    """One kind of module. `blueprints` yields what `module` may be, likeliest first, or a string: it looks like one of
    this family, but is none, and why. Nothing: it has no likeness. One with `unsure` is not reported if it fails."""

    name: str
    structure: str  # what is looked for, for the error where nothing is found

    def blueprints(self, module: nn.Module) -> Iterable[Any]: ...

    def execute_plainly(self, module: nn.Module, blueprint: Any, *inputs: Any) -> Tensor:
        """The blueprint's meaning in plain PyTorch, by calling the submodules."""

    def complete(self, module: nn.Module, blueprint: Any, inputs: tuple[Any, ...]) -> Any:
        """The blueprint with what only a run of the module tells, such as a scale; None if the run contradicts it."""

    def executor(self, module: nn.Module, blueprint: Any, backend: str | None) -> Executor: ...

    # Optional: `methods`, those to override besides forward; `drive(module, *inputs)`, a use of the module where it is
    # more than one call; `prepare(copy)`, before the proof; `subject(module, blueprint)`, what is proved in the place
    # of the whole module; `inner(module, blueprint)`, what is accelerated with it: a path, a family, a blueprint;
    # `evaluated = True`: it runs without gradients only; `surroundings = True`: what stands around blocks, whose own
    # modules are looked at too, and which is not reported where it is left as it is.

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


def attributes(owner: nn.Module, paths: Iterable[str], known: Iterable[str] = ()) -> Attributes:
    """The plain attributes (res_scale, ..) of the modules at these paths but for those that are `known`."""
    ignored = OWN.union(known)
    return tuple(
        (path, tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in get(owner, path).__dict__.items()
                     if k not in ignored and layers.is_simple(v)))
        for path in paths if get(owner, path) is not None
    )  # fmt: skip


def differ(owner: nn.Module, recorded: Attributes, known: Iterable[str] = ()) -> list[str]:
    """The names of attributes that are not what they were when they were recorded; what is new and private may be."""
    now = attributes(owner, [path for path, _ in recorded], known)
    if now == recorded:
        return []
    before = {(path, k): v for path, values in recorded for k, v in values}
    after = {(path, k): v for path, values in now for k, v in values}
    gone = [k for at, k in before if (at, k) not in after]
    return gone + [k for (at, k), v in after.items() if (before[at, k] != v if (at, k) in before else k[:1] != "_")]


def holds_its_activation(norm: object) -> bool:
    """Whether it is a normalisation with an activation in it, as timm's."""
    return isinstance(norm, nn.Module) and norm._modules.get("act") is not None


def fused_activation(norm: Any, activation: Any, ranks: Iterable[int]) -> str | None:
    """The name of the activation where calling the two is act(batch_norm(x)) of this many dimensions and nothing else.
    activation: None where it stands in the norm, whose class was proved."""
    classes = tuple(layers.NORMS[rank][0] for rank in ranks)
    if activation is None:
        drop, activation = norm._modules.get("drop"), norm._modules.get("act")
        if not isinstance(norm, classes) or type(drop) is not nn.Identity or layers.plain(drop):
            return None
    elif type(norm) not in classes:
        return None
    read = layers.ACTIVATIONS.get(type(activation))
    return None if read is None or layers.plain(norm) or layers.plain(activation) else read(activation)


def evaluated_norm(norm: Any, activation: Any, ranks: Iterable[int]) -> str | None:
    """`fused_activation` where the normalisation is by running statistics."""
    name = fused_activation(norm, activation, ranks)
    return None if name is None or layers.uses_batch_statistics(norm) else name


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
