"""Gradient descent on the data loss in the parametrisations that a deep network may be trained in, compared over L."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_choice, check_count
from .curves import NAMES
from .learning import LearningProblem
from .parameters import DiscreteParameters
from .spectral import SobolevPreconditioner

RULES = {
    "sobolev": "the H^1 gradient: steps of one function, whatever the mesh",
    "absorbed": "plain descent on W = tau K, the step absorbed, as a DenseNet is trained",
    "explicit": "plain descent on K, the step explicit",
    "l2": "the L^2 gradient: partial derivatives over the cell sizes tau and tau^2",
}
RATES = {"sobolev": 1.0, "absorbed": 0.3, "explicit": 0.3, "l2": 0.3}  # where each is stable on problem A at L = 4


@dataclass(frozen=True)
class Descent:
    """One run.

    Attributes:
        losses: the data loss before each step, [steps].
        moved: how far each parameter moved: root mean square over its entries.
        last_layer: |A^{L-1} - start| and others: the root mean square over the other layers.
        parameters: at the end.
    """

    losses: tuple[float, ...]
    moved: dict[str, float]
    last_layer: float
    others: float
    parameters: DiscreteParameters


def descend(
    problem: LearningProblem,
    start: DiscreteParameters,
    rule: str,
    *,
    steps: int = 300,
    rate: float | None = None,
    on_step: Callable[[], None] | None = None,
) -> Descent:
    """Full-batch gradient descent on the data loss (no regularizer) from `start`.

    sobolev: Theta -= rate * grad_{H^1} J. explicit: Theta -= rate * dJ/dTheta. absorbed: A, a as explicit, and
    W = tau K by rate * dJ/dW, that is K -= rate / tau^2 dJ/dK (b alike). l2: A, a by rate / tau, K, b by rate / tau^2.

    x(1) is a point value, so dJ/dA^{L-1} = O(1) while the others are O(tau) (`adjoint`): the L^2 gradient has a Dirac
    at t = 1, and only the Sobolev gradient has a limit as L grows.

    Source: section 12 of the specification (our experiment; the paper trains DenseNets with SGD).
    """
    check_choice("rule", rule, RULES)
    check_count("steps", steps)
    rate = RATES[rule] if rate is None else rate
    if not rate > 0:
        raise ValueError(f"rate must be > 0, got {rate}")
    tau, preconditioner = start.tau, SobolevPreconditioner.of(start)
    two_index = {"explicit": 1.0, "absorbed": tau**-2, "l2": tau**-2}
    one_index = {"explicit": 1.0, "absorbed": 1.0, "l2": 1 / tau}
    current, losses = start.map(torch.Tensor.detach), []
    for _ in range(steps):
        free = current.requires_grad_()
        names = [name for name in NAMES if getattr(free, name).numel()]
        loss = problem.data_loss(free)
        found = torch.autograd.grad(loss, [getattr(free, name) for name in names], allow_unused=True)
        losses.append(loss.item())
        gradient = current.map(torch.zeros_like)
        for name, value in zip(names, found, strict=True):
            if value is not None:
                getattr(gradient, name).copy_(value)
        if rule == "sobolev":
            direction = preconditioner.sobolev_gradient(gradient)
        else:
            scale = {name: (two_index if name in ("K", "b") else one_index)[rule] for name in NAMES}
            direction = DiscreteParameters(**{name: scale[name] * value for name, value in gradient.items()})
        current = current.zip_map(lambda u, g: u - rate * g, direction)
        if on_step is not None:
            on_step()
    gap = current.zip_map(torch.sub, start.map(torch.Tensor.detach))
    by_layer = gap.A.flatten(1).norm(dim=1)
    others = _rms(by_layer[:-1]) if start.layers > 1 else 0.0
    moved = {name: _rms(value) for name, value in gap.items() if value.numel()}
    return Descent(tuple(losses), moved, by_layer[-1].item(), others, current)


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
