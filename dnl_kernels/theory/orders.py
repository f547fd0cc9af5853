"""Observed orders of convergence and Richardson extrapolation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


def observed_order(errors: Sequence[float], levels: Sequence[int]) -> list[float]:
    """log(e_i / e_{i+1}) / log(L_{i+1} / L_i) for each pair of neighbouring levels.

    Args:
        errors: one positive error per level; an error of 0 gives the order nan (nothing is measured by it).
        levels: increasing layer counts L.

    Returns:
        len(levels) - 1 orders.

    Raises:
        ValueError: fewer than 2 levels, different lengths, levels not increasing, or a negative error.
    """
    if len(errors) != len(levels):
        raise ValueError(f"errors and levels must have one length, got {len(errors)} and {len(levels)}")
    if len(levels) < 2:
        raise ValueError(f"levels must hold at least 2 entries, got {len(levels)}")
    if any(b <= a for a, b in zip(levels[:-1], levels[1:], strict=True)) or levels[0] <= 0:
        raise ValueError(f"levels must be positive and strictly increasing, got {list(levels)}")
    if any(e < 0 for e in errors):
        raise ValueError(f"errors must be >= 0, got {list(errors)}")
    orders = []
    for i in range(len(levels) - 1):
        pair = errors[i], errors[i + 1]
        usable = all(e > 0 and math.isfinite(e) for e in pair)
        orders.append(math.log(pair[0] / pair[1]) / math.log(levels[i + 1] / levels[i]) if usable else math.nan)
    return orders


def fitted_order(errors: Sequence[float], levels: Sequence[int]) -> float:
    """Minus the least-squares slope of log e over log L: one number for a whole table."""
    observed_order(errors, levels)
    x = [math.log(level) for level in levels]
    y = [math.log(e) if e > 0 else math.nan for e in errors]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return -sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


@dataclass(frozen=True)
class OrderTable:
    """Errors over levels with their observed orders; `expected` is the order that the theory states, if it does."""

    name: str
    levels: tuple[int, ...]
    errors: tuple[float, ...]
    expected: float | None = None
    orders: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "orders", tuple(observed_order(self.errors, self.levels)))

    def to_dict(self) -> dict:
        return {
            "name": self.name,
            "levels": list(self.levels),
            "errors": list(self.errors),
            "orders": list(self.orders),
            "fitted_order": fitted_order(self.errors, self.levels),
            "expected_order": self.expected,
        }

    def __str__(self) -> str:
        lines = [f"{self.name}", f"{'L':>7} {'error':>11} {'order':>7}"]
        for i, (level, error) in enumerate(zip(self.levels, self.errors, strict=True)):
            order = f"{self.orders[i - 1]:7.3f}" if i else " " * 7
            lines.append(f"{level:7d} {error:11.3e} {order}")
        return "\n".join(lines)


def richardson(coarse: Tensor, fine: Tensor, order: float, ratio: float = 2.0) -> Tensor:
    """(r^q u_fine - u_coarse) / (r^q - 1): removes the error term of order q when the step was divided by r."""
    if coarse.shape != fine.shape:
        raise ValueError(f"coarse and fine must have one shape, got {list(coarse.shape)} and {list(fine.shape)}")
    factor = ratio**order
    if factor <= 1:
        raise ValueError(f"ratio ** order must be > 1, got {factor}")
    return fine + (fine - coarse) / (factor - 1)
