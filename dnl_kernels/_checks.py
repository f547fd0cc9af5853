"""Argument checks shared by the operators. Each error names the operator, the argument, what was given and what is
allowed, and is raised before any work. What passes is only looked at: words are made for what does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from . import _activations

FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
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
    if isinstance(given, Tensor):
        if like is None:
            if given.dtype in FLOATS:
                return given
        elif given.dtype == like.dtype and given.device == like.device:
            return given
    else:
        raise TypeError(f"{op}: {argument} is of type {type(given).__name__}; expected a tensor")
    if given.dtype not in FLOATS:
        raise TypeError(f"{op}: {argument} is of {given.dtype}; expected float64, float32, bfloat16 or float16")
    if like is not None:
        if given.dtype != like.dtype:
            raise TypeError(f"{op}: {argument} is of {given.dtype}; expected {like.dtype}, as {like_name}")
        if given.device != like.device:
            fail(op, argument, f"on {given.device}", f"{like.device}, as {like_name}")
    return given


def check_affine(
    op: str, like: Tensor, weight: object, bias: object, norm_scale: object, norm_shift: object, activation: object,
    scale: object,
) -> None:  # fmt: skip
    """The arguments of a dense accumulation beside its states, of which `like` is the first; shapes apart."""
    check_tensor(op, "weight", weight, like, "states[0]")
    if bias is not None:
        check_tensor(op, "bias", bias, like, "states[0]")
    if norm_scale is not None:
        check_tensor(op, "norm_scale", norm_scale, like, "states[0]")
    if norm_shift is not None:
        check_tensor(op, "norm_shift", norm_shift, like, "states[0]")
    if activation not in _activations.KINDS:
        check_activation(op, "activation", activation)
    check_number(op, "scale", scale)


def check_vectors(
    op: str, outputs: int, channels: int, bias: Tensor | None, norm_scale: Tensor | None, norm_shift: Tensor | None
) -> None:
    """Their shapes: one number per output, and per channel of all states."""
    if bias is not None:
        check_shape(op, "bias", bias, (outputs,), meaning="D")
    if norm_scale is not None:
        check_shape(op, "norm_scale", norm_scale, (channels,), meaning="sum C_j")
    if norm_shift is not None:
        check_shape(op, "norm_shift", norm_shift, (channels,), meaning="sum C_j")


def check_states(op: str, states: object, mixed: bool = False) -> list[Tensor]:
    """A non-empty list or tuple of floating-point tensors of one device and, unless `mixed`, dtype."""
    if not isinstance(states, (list, tuple)):
        raise TypeError(f"{op}: states is of type {type(states).__name__}; expected a list or tuple of tensors")
    if not states:
        fail(op, "states", "empty", "at least one tensor")
    first = states[0]
    check_tensor(op, "states[0]", first)
    dtype, device = first.dtype, first.device
    for j, state in enumerate(states):
        if not isinstance(state, Tensor) or state.dtype is not dtype or state.device != device:
            check_tensor(op, f"states[{j}]", state, None if mixed else first, "states[0]")
            if state.device != device:
                fail(op, f"states[{j}]", f"on {state.device}", f"{device}, as states[0]")
    return list(states)


def check_states_alike(op: str, states: object) -> tuple[Tensor, torch.Size]:
    """`check_states` of states that have one shape; the first of them, and the shape."""
    if isinstance(states, (list, tuple)) and states and isinstance(states[0], Tensor) and states[0].dtype in FLOATS:
        first = states[0]
        size, dtype, device = first.shape, first.dtype, first.device
        for state in states:
            if state is not first and not (
                isinstance(state, Tensor) and state.shape == size and state.dtype is dtype and state.device == device
            ):
                break
        else:
            return first, size
    first = check_states(op, states)[0]
    for j, state in enumerate(states):  # type: ignore[arg-type]
        if state.shape != first.shape:
            fail(op, f"states[{j}]", shape(state), f"{list(first.shape)}, as states[0]")
    return first, first.shape


def check_shape(op: str, argument: str, tensor: Tensor, *allowed: Iterable[int], meaning: str = "") -> None:
    """`tensor` has one of the `allowed` shapes; `meaning` writes them in symbols."""
    given = tensor.shape
    for sizes in allowed:
        if given == sizes:
            return
    shapes = [list(a) for a in allowed]
    if list(given) not in shapes:
        expected = " or ".join(str(s) for s in shapes) + (f" ({meaning})" if meaning else "")
        fail(op, argument, shape(tensor), expected)
