"""The subclass of its own class that an accelerated module gets, as torch.nn.utils.parametrize and FSDP2 do.

It has the same name, parameters, children, hooks and state_dict; its forward asks an executor first and is the
inherited one wherever that declines, or where something other than numbers flows: tracing, export, compilation,
function transforms, dispatch modes, subclasses of tensors.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .families import FAMILIES
from .families.base import MUST, get, origin

SETTINGS, EXECUTOR = "_dnl_settings", "_dnl_executor"
_classes: weakref.WeakKeyDictionary[type, dict[str, type]] = weakref.WeakKeyDictionary()


class Settings(NamedTuple):
    """What is pickled with an accelerated module."""

    family: str
    blueprint: Any
    backend: str | None


class Declined(Exception):
    """An executor that had to run declined."""


def ordinary(x: object) -> bool:
    """Whether `x` is a tensor of numbers, on which kernels may run now."""
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and x.is_floating_point()
        and x.layout is torch.strided
        and x.device.type != "meta"
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def _overriding(cls: type, method: str) -> Callable[..., Any]:
    inherited = getattr(cls, method)

    @functools.wraps(inherited)
    def override(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = getattr(cls, method)
        if not torch.compiler.is_compiling() and current is inherited and args and ordinary(args[0]) and not kwargs:
            state = self.__dict__
            if (executor := _executor_of(self)) is not None:
                run = executor if method == "forward" else getattr(executor, method)
                if (out := run(*args)) is not None:
                    return out
                if state.get(MUST):
                    raise Declined(method)
        return current(self, *args, **kwargs)

    return override


def _executor_of(module: nn.Module) -> Any:
    """Made once per module, and again after it was loaded, copied or replicated; None for one that was restored."""
    owner, executor = module.__dict__.get(EXECUTOR, (None, None))
    if owner is module:
        return executor
    if (settings := module.__dict__.get(SETTINGS)) is None:
        return None
    executor = FAMILIES[settings.family].executor(module, settings.blueprint, settings.backend)
    module.__dict__[EXECUTOR] = module, executor
    return executor


def summary(module: nn.Module) -> str:
    """What the executor of an accelerated module says of its layers, if anything."""
    executor = _executor_of(module)
    return executor.summary() if hasattr(executor, "summary") else ""


class Accelerated:
    """What the subclasses have in common."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the class of the user's would be: the subclass is made anew where the module is loaded or copied."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple):
            return reduced
        make, args, *rest = reduced
        generated, base = type(self), origin(self)
        args = tuple(base if arg is generated else arg for arg in args)
        if rest and isinstance(rest[0], dict):
            rest[0] = {key: value for key, value in rest[0].items() if key != EXECUTOR}
        family = self.__dict__[SETTINGS].family if SETTINGS in self.__dict__ else None
        return (_rebuild, (family, make, args), *rest)

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script compiles the module as it was."""
        new: Any = object.__new__(origin(self))
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k not in (SETTINGS, EXECUTOR)})
        return new


def _rebuild(family: str | None, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    module = make(*args)
    if family is not None:
        module.__class__ = subclass(type(module), family)
    return module


def subclass(cls: type, family: str) -> type:
    """The accelerated subclass of `cls`; one per class and family."""
    known = _classes.setdefault(cls, {})
    if family not in known:
        methods = getattr(FAMILIES[family], "methods", ("forward",))
        namespace: dict[str, Any] = {
            **{method: _overriding(cls, method) for method in methods},
            "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
            "_dnl_origin": cls,
        }  # fmt: skip
        known[family] = types.new_class(cls.__name__, (Accelerated, cls), {}, lambda body: body.update(namespace))
    return known[family]


def put_on(module: nn.Module, settings: Settings) -> None:
    """Accelerates one module, and what belongs to it."""
    module.__class__ = subclass(origin(module), settings.family)
    module.__dict__[SETTINGS] = settings
    module.__dict__.pop(EXECUTOR, None)
    family: Any = FAMILIES[settings.family]
    if hasattr(family, "inner"):
        path, name, blueprint = family.inner(module, settings.blueprint)
        put_on(get(module, path), Settings(name, blueprint, settings.backend))


def take_off(module: nn.Module) -> bool:
    """Undoes `put_on`; whether there was anything to undo. A class derived from the accelerated one since, by FSDP2 for
    example, stays and inherits a forward that only calls the original."""
    if SETTINGS not in module.__dict__:
        return False
    if "_dnl_origin" in type(module).__dict__:
        module.__class__ = origin(module)
    for name in (SETTINGS, EXECUTOR):
        module.__dict__.pop(name, None)
    return True
