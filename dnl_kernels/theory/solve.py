"""x = phi(f + int K x): an integral equation from the functions in it to its solution, without parameter curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .curves import ParameterCurves
from .depth import DepthKernel, WeaklySingularKernel
from .integral import Solution, solve_integral_equation


@dataclass(frozen=True)
class IntegralProblem:
    """x(t) = phi(f(t) + int_0^t (t - s)^(-alpha) K(t, s) x(s) ds) for 0 <= t <= 1, x(t) in R^d.

    Args:
        kernel: K, (t, s) -> [..., d, d], or [...] for d = 1; or a DepthKernel (then alpha must be 0).
        forcing: f, t -> [..., d], or [...] for d = 1; a tensor [d] for a constant.
        phi: y [B, d] -> [B, d], pointwise or not; None for the identity.
        alpha: 0 <= alpha < 1, the weak singularity.
        dim: d.

    All functions are written in torch and vectorised over t, s of any shape; the solution is differentiable in what
    they close over.
    """

    kernel: Callable[[Tensor, Tensor], Tensor] | DepthKernel
    forcing: Callable[[Tensor], Tensor] | Tensor
    phi: Callable[[Tensor], Tensor] | None = None
    alpha: float = 0.0
    dim: int = 1

    def curves(self) -> ParameterCurves:
        """The same as parameters of eq. (7): A = 0, a = f."""
        d, forcing = self.dim, self.forcing

        def shaped(values: Tensor, points: Tensor, *tail: int) -> Tensor:
            return values.reshape(*points.shape, *tail) if d == 1 else values

        def a(t: Tensor) -> Tensor:
            if callable(forcing):
                return shaped(forcing(t), t, d)
            return forcing.to(t).expand(*t.shape, d)

        if isinstance(self.kernel, DepthKernel):
            if self.alpha:
                raise ValueError("alpha must be 0 with a DepthKernel: give a WeaklySingularKernel")
            kernel: Any = self.kernel
        else:
            function = self.kernel

            def K(t: Tensor, s: Tensor) -> Tensor:
                return shaped(function(t, s), torch.broadcast_tensors(t, s)[0], d, d)

            kernel = WeaklySingularKernel(K, self.alpha, (d, d)) if self.alpha else K
        return ParameterCurves(lambda t: t.new_zeros(*t.shape, d, d), a, kernel, dim=d)


def solve(problem: IntegralProblem, *, rtol: float = 1e-8, atol: float = 0.0, **options: Any) -> Solution:
    """The solution x(t) on all of [0, 1], good to atol + rtol max |x|.

    Args:
        problem: an IntegralProblem.
        rtol, atol: the accuracy wanted everywhere.
        options: `layers`, `panels`, `max_points` of `solve_integral_equation`; dtype (float64) and device of the work.

    Returns:
        A `Solution`: call it with times; `info` holds the error estimate, in all and by panel.

    Examples:
        >>> problem = IntegralProblem(lambda t, s: -torch.cos(3 * (t - s)), torch.sin, torch.tanh)
        >>> x = solve(problem, rtol=1e-10)
        >>> t = torch.linspace(0, 1, 500, dtype=torch.float64)
        >>> plt.plot(t, x(t))
    """
    if not isinstance(problem, IntegralProblem):
        raise TypeError(f"problem must be an IntegralProblem, got {type(problem).__name__}")
    start = torch.zeros(problem.dim, dtype=options.pop("dtype", torch.float64), device=options.pop("device", None))
    phi = problem.phi or (lambda y: y)
    return solve_integral_equation(problem.curves(), start, lambda y, _: phi(y), rtol=rtol, atol=atol, **options)
