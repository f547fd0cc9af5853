"""Argument checks shared by the theory modules: one wording for what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """An integer >= minimum, or ValueError/TypeError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
    return value


def check_choice(name: str, value: object, allowed: Iterable[str]) -> str:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return str(value)


def check_exponent(p: float) -> float:
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"p must be a number, got {type(p).__name__}")
    if not 2 <= p < float("inf"):
        raise ValueError(f"p must satisfy 2 <= p < inf (the theory needs p > 2), got {p}")
    return float(p)


def as_samples(value: object) -> object:
    """A numpy array as a float64 tensor; everything else unchanged."""
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        return torch.as_tensor(value, dtype=torch.float64)
    return value


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {value.dtype}")
    return value


def check_shape(name: str, value: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    """Compare with a shape in which None allows any size."""
    given = tuple(value.shape)
    if len(given) != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, given, strict=False)
    ):
        wanted = "[" + ", ".join("any" if want is None else str(want) for want in shape) + "]"
        raise ValueError(f"{name} must have shape {wanted}, got {list(given)}")
    return value


def check_finite(name: str, value: Tensor) -> Tensor:
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        first = torch.nonzero(~finite)[0].tolist()
        raise ValueError(f"{name} must be finite, got {value[tuple(first)].item()} at index {first}")
    return value


def check_grid(name: str, times: Tensor) -> Tensor:
    """A strictly increasing grid from 0 to 1 with at least two points."""
    check_tensor(name, times)
    if times.ndim != 1 or times.numel() < 2:
        raise ValueError(f"{name} must be a 1-D grid with at least 2 points, got shape {list(times.shape)}")
    check_finite(name, times)
    steps = times[1:] - times[:-1]
    if bool((steps <= 0).any()):
        at = int(torch.nonzero(steps <= 0)[0])
        raise ValueError(f"{name} must be strictly increasing, got {times[at].item()} then {times[at + 1].item()}")
    if times[0] != 0 or times[-1] != 1:
        raise ValueError(f"{name} must run from 0 to 1, got {times[0].item()} to {times[-1].item()}")
    return times
