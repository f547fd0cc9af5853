"""Argument checks shared by the operators. Each error names the operator, the argument, what was given and what is
allowed, and is raised before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from . import _activations

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KERNELS = ("local", "softmax", "gaussian", "dot")


def fail(op: str, argument: str, given: object, expected: str) -> NoReturn:
    raise ValueError(f"{op}: {argument} is {given}; expected {expected}")


def shape(tensor: Tensor) -> str:
    return f"of shape {list(tensor.shape)}"


def check_choice(op: str, argument: str, given: object, allowed: Sequence[str | None]) -> None:
    if given not in allowed:
        fail(op, argument, repr(given), "one of " + ", ".join(map(str, allowed)))


def check_activation(op: str, argument: str, given: object) -> None:
    """A name that `_activations.parse` reads."""
    if not isinstance(given, str):
        raise TypeError(f"{op}: {argument} is of type {type(given).__name__}; expected a string")
    try:
        _activations.parse(given)
    except ValueError:
        fail(op, argument, repr(given), f"one of {_activations.NAMES}")


def check_positive(op: str, argument: str, given: object) -> None:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{op}: {argument} is of type {type(given).__name__}; expected a number")
    if not given > 0:
        fail(op, argument, given, "a number > 0")


def check_number(op: str, argument: str, given: object) -> None:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{op}: {argument} is of type {type(given).__name__}; expected a number")


def check_tensor(op: str, argument: str, given: object, like: Tensor | None = None, like_name: str = "") -> Tensor:
    """A floating-point tensor, on the device and of the dtype of `like` where that is given."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{op}: {argument} is of type {type(given).__name__}; expected a tensor")
    if given.dtype not in FLOATS:
        raise TypeError(f"{op}: {argument} is of {given.dtype}; expected float64, float32, bfloat16 or float16")
    if like is not None:
        if given.dtype != like.dtype:
            raise TypeError(f"{op}: {argument} is of {given.dtype}; expected {like.dtype}, as {like_name}")
        if given.device != like.device:
            fail(op, argument, f"on {given.device}", f"{like.device}, as {like_name}")
    return given


def check_states(op: str, states: object) -> list[Tensor]:
    """A non-empty list or tuple of floating-point tensors of one dtype and device."""
    if not isinstance(states, (list, tuple)):
        raise TypeError(f"{op}: states is of type {type(states).__name__}; expected a list or tuple of tensors")
    if not states:
        fail(op, "states", "empty", "at least one tensor")
    for j, state in enumerate(states):
        check_tensor(op, f"states[{j}]", state, states[0] if j else None, "states[0]")
    return list(states)


def check_shape(op: str, argument: str, tensor: Tensor, *allowed: Iterable[int], meaning: str = "") -> None:
    """`tensor` has one of the `allowed` shapes; `meaning` writes them in symbols."""
    shapes = [list(a) for a in allowed]
    if list(tensor.shape) not in shapes:
        expected = " or ".join(str(s) for s in shapes) + (f" ({meaning})" if meaning else "")
        fail(op, argument, shape(tensor), expected)
