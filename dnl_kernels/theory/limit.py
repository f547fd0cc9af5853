"""Theorem 1 with its limit: minima and minimisers of the discrete problems (4) against those of (11) itself.

The experiment has to tell right from wrong, so it is repeated with two faults in R_L that one could make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from .curves import NAMES, ParameterCurves
from .extension import extend
from .galerkin import ContinuousMinimizer, certify, minimize_continuous
from .learning import LearningProblem, Minimizer
from .orders import OrderTable
from .parameters import ONE_INDEX, DiscreteParameters
from .quadrature import composite_rule, triangle_rule
from .studies import Study, Watch

CERTIFIED = 14  # the largest degree whose certificate is computed: Hessians of the next take minutes
PATIENCE = 300  # iterations for a fault, whose problem may have no minimum to find


class PenaltyOnA(LearningProblem):
    """A fault: R_L holds lambda_A R1(A) and nothing else."""

    def penalty(self, parameters: DiscreteParameters) -> Tensor:
        return super().penalty(
            DiscreteParameters(
                **{name: value if name == "A" else torch.zeros_like(value) for name, value in parameters.items()}
            )
        )


class BoundaryWeight(LearningProblem):
    """A fault: in the value sum of R1 the last sample, u^{L-1}, is weighted 1 instead of tau."""

    def penalty(self, parameters: DiscreteParameters) -> Tensor:
        last = sum(getattr(parameters, name)[-1].square().sum() for name in ONE_INDEX)
        return super().penalty(parameters) + float(self.weight) * (1 - parameters.tau) * last  # type: ignore[arg-type]


FAULTS: dict[str, type[LearningProblem]] = {"penalty on A only": PenaltyOnA, "boundary weight 1": BoundaryWeight}


class Ruler:
    """L2 and sup distances between extensions I_1 Theta_L, L a divisor of `cells`, and one set of curves.

    Args:
        curves: theta, evaluated once.
        cells: of the quadrature (3 Gauss points per direction and cell); the sup is taken over its points.
    """

    def __init__(self, curves: ParameterCurves, cells: int):
        t, self.line = composite_rule(cells, 3)
        tt, ss, weights = triangle_rule(cells, 3)
        self.triangle, self.points = 2 * weights, {1: (t,), 2: (tt, ss)}
        with torch.no_grad():
            self.values = {n: self._at(n, curve) for n in NAMES if (curve := getattr(curves, n)) is not None}

    def _at(self, name: str, curve: Callable[..., Tensor]) -> Tensor:
        points = self.points[1 if name in ONE_INDEX else 2]
        return torch.cat([curve(*part) for part in zip(*(p.split(1 << 14) for p in points), strict=True)])

    def __call__(self, parameters: DiscreteParameters) -> tuple[float, float]:
        square, worst = 0.0, 0.0
        for name, own in extend(parameters).items():
            if name not in self.values:
                continue
            gap = (self._at(name, own) - self.values[name]).flatten(1).square().sum(1)
            square += ((self.line if name in ONE_INDEX else self.triangle) @ gap).item()
            worst = max(worst, gap.max().item())
        return square**0.5, worst**0.5


def limit_study(
    build: Callable[[str], LearningProblem],
    name: str,
    levels: Sequence[int],
    degrees: Sequence[int],
    *,
    firsts: Sequence[str] = ("lifted", "input"),
    base: int = 8,
    restarts: int = 4,
    certified: int = CERTIFIED,
    patience: int = PATIENCE,
    seed: int = 0,
    watch: Watch | None = None,
) -> Study:
    """|J_L - J*| and the distances of I_1 Theta_L to theta*, with the right R_L and with each of `FAULTS`.

    Args:
        build: first ("lifted" or "input") -> the learning problem, whose limit does not depend on it.
        levels: L, each a divisor of the largest.
        degrees: of the polynomials that theta* is sought among, increasing; each starts from the one before. The last
            is the reference.
        certified: the largest degree whose certificate is computed.
        patience: iterations for a problem with a fault.
        base, restarts: random starts of the discrete problem; its best branch is followed over `levels`, and the
            continuous problem starts from there too.
    """
    watch = watch or Watch()
    problem = build(firsts[0])
    watch.begin(f"{name}: {restarts} starts at L = {base}", 0)
    start = problem.minimize(base, restarts=restarts, seed=seed, on_progress=watch.advance).parameters
    found: list[ContinuousMinimizer] = []
    rows = []
    for degree in degrees:
        watch.begin(f"{name}: polynomials of degree {degree}", 0)
        found.append(minimize_continuous(problem, degree, start=found[-1] if found else start))
        own = {key: getattr(found[-1], key) for key in ("degree", "value", "data", "penalty", "gradient", "iterations")}
        if degree <= certified:
            certificate = certify(problem, found[-1])
            bounds = {"value_error": certificate.value_error, "distance_error": certificate.distance_error}
            own["certificate"] = asdict(certificate) | bounds
        rows.append(own)
    limit, ruler = found[-1], Ruler(found[-1].curves, max(levels))
    study = Study("limit", facts={"problem": name, "continuous": rows, "values": {}})

    def follow(label: str, problem: LearningProblem, expected: float | None) -> None:
        watch.begin(f"{name}: {label}", 0)
        budget = 4000 if expected else patience
        track = problem.continuation(levels, start, max_iterations=budget, on_progress=watch.advance)
        _record(study, label, track, limit.value, ruler, expected)

    for first in firsts:
        follow(f"x0 {first}", build(first), 1.0)
    for fault, kind in FAULTS.items():
        wrong = kind(
            problem.inputs,
            problem.targets,
            problem.phi,
            weight=problem.weight,
            p=problem.p,
            first=problem.first,
            loss=problem.loss,
        )
        follow(f"fault: {fault}", wrong, None)
    return study


def _record(
    study: Study, label: str, track: dict[int, Minimizer], limit: float, ruler: Ruler, expected: float | None
) -> None:
    levels = tuple(track)
    distances = [ruler(found.parameters) for found in track.values()]
    columns = {
        "|J_L - J*|": [abs(found.value - limit) for found in track.values()],
        "L2 distance to theta*": [pair[0] for pair in distances],
        "sup distance to theta*": [pair[1] for pair in distances],
    }
    for what, errors in columns.items():
        study.tables.append(OrderTable(f"{label}, {what}", levels, tuple(errors), expected))
    study.facts["values"][label] = [found.value for found in track.values()]
