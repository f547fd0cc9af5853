"""L-BFGS with a line search that keeps working down to rounding errors of the objective."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Oracle = Callable[[Tensor], tuple[float, Tensor]]
DECREASE, CURVATURE = 1e-4, 0.9  # the constants of the Wolfe conditions


@dataclass(frozen=True)
class LBFGSResult:
    point: Tensor
    value: float
    gradient: Tensor
    iterations: int
    evaluations: int
    converged: bool


def minimize_lbfgs(
    oracle: Oracle, start: Tensor, *, tolerance: float = 1e-9, max_iterations: int = 4000, memory: int = 30
) -> LBFGSResult:
    """Minimise a smooth function until max |gradient| <= tolerance.

    The step satisfies the strong Wolfe conditions or, where the decrease drowns in rounding, the approximate ones of
    Hager and Zhang (2005), which ask the same of the slopes alone.

    Args:
        oracle: z -> (value, gradient), detached.
        start: [n].
        tolerance: on the largest gradient entry.
        max_iterations: outer iterations.
        memory: pairs of (step, gradient change) kept.
    """
    z = start.detach().clone()
    value, gradient = oracle(z)
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=memory)
    evaluations, iteration = 1, 0
    while iteration < max_iterations and gradient.abs().max().item() > tolerance:
        direction = -_inverse_hessian(pairs, gradient)
        slope = torch.dot(direction, gradient).item()
        if not slope < 0:  # lost to rounding: start over from steepest descent
            if not pairs:
                break
            pairs.clear()
            continue
        first = 1.0 if pairs else min(1.0, 1 / gradient.norm().item())
        step, trial, used = _line_search(oracle, z, direction, value, slope, first)
        evaluations += used
        if trial is None:
            if not pairs:
                break
            pairs.clear()
            continue
        change = step * direction
        difference = trial[1] - gradient
        curvature = torch.dot(change, difference).item()
        if curvature > 1e-14 * change.norm().item() * difference.norm().item():
            pairs.append((change, difference, 1 / curvature))
        z, (value, gradient) = z + change, trial
        iteration += 1
    return LBFGSResult(z, value, gradient, iteration, evaluations, gradient.abs().max().item() <= tolerance)


def _inverse_hessian(pairs: deque[tuple[Tensor, Tensor, float]], gradient: Tensor) -> Tensor:
    """The two-loop recursion."""
    q, factors = gradient.clone(), []
    for change, difference, rho in reversed(pairs):
        alpha = rho * torch.dot(change, q)
        q -= alpha * difference
        factors.append(alpha)
    if pairs:
        _, difference, rho = pairs[-1]
        q /= rho * torch.dot(difference, difference)
    for (change, difference, rho), alpha in zip(pairs, reversed(factors), strict=True):
        q += (alpha - rho * torch.dot(difference, q)) * change
    return q


def _line_search(
    oracle: Oracle, z: Tensor, direction: Tensor, value: float, slope: float, step: float
) -> tuple[float, tuple[float, Tensor] | None, int]:
    """Bracket, then secant steps on the slope, kept inside the bracket. (0, None, n) if nothing acceptable is found."""
    low, low_slope, high, high_slope = 0.0, slope, None, None
    noise = 1e-14 * (1 + abs(value))
    for used in range(1, 41):
        trial = oracle(z + step * direction)
        new_slope = torch.dot(direction, trial[1]).item()
        finite = trial[0] == trial[0] and abs(trial[0]) != float("inf")
        enough = finite and trial[0] <= value + DECREASE * step * slope
        enough = enough or (finite and trial[0] <= value + noise and new_slope <= (2 * DECREASE - 1) * slope)
        if enough and abs(new_slope) <= -CURVATURE * slope:
            return step, trial, used
        if enough and new_slope < 0:
            low, low_slope = step, new_slope
        else:
            high, high_slope = step, new_slope if finite else None
        if high is None:
            step *= 2.5
            continue
        width = high - low
        if width <= 1e-16 * high:
            break
        step = low + width / 2
        if high_slope is not None and high_slope > low_slope:
            secant = low - low_slope * width / (high_slope - low_slope)
            step = min(max(secant, low + 0.1 * width), high - 0.1 * width)
    return 0.0, None, 40
