"""The experiments of `dnl converge`: each computes tables of errors over L and facts, and draws nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bounds import (
    convergence_constant,
    growth_constant,
    lipschitz_constant,
    parameter_lipschitz_constant,
    state_bound,
    trajectory_bound,
)
from .curves import ParameterCurves, derivative
from .dynamics import RATES, descend
from .extension import distance
from .integral import solve_integral_equation
from .learning import LearningProblem, Minimizer
from .operators import LayerMap
from .orders import OrderTable
from .regularization import (
    one_index_terms,
    regularizer,
    regularizer_continuous,
    regularizer_continuous_terms,
    regularizer_terms,
)
from .sampling import sample_cell_average, sample_pointwise
from .solvers import LayerFunction, Trajectory, forward

Reference = Callable[[ParameterCurves, Tensor, LayerFunction, Tensor], Tensor]
SCHEME_ORDERS = {"euler": 1.0, "trapezoid": 2.0, "trapezoid_implicit": 2.0}
POSITIONS, CHANNELS = 4, 3


class Watch:
    """Hears of the progress; a front end shows it."""

    def begin(self, what: str, total: int) -> None: ...

    def advance(self, steps: int = 1) -> None: ...


@dataclass
class Study:
    """Tables of errors over L with their observed orders, and everything else under `facts` (plain values)."""

    name: str
    tables: list[OrderTable] = field(default_factory=list)
    facts: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        return {"study": self.name, "tables": [table.to_dict() for table in self.tables], **self.facts}


def forward_study(
    kernels: Sequence[str],
    activations: Sequence[str],
    levels: Sequence[int],
    *,
    schemes: Sequence[str] = tuple(SCHEME_ORDERS),
    seed: int = 7,
    reference: Reference | None = None,
    watch: Watch | None = None,
) -> Study:
    """max_{1<=l<=L} |x^l - x(t_l)| of eq. (1) and of the second-order schemes, on smooth random curves, n = 4, c = 3.

    Args:
        levels: multiples of the first, at whose grid points the errors are taken.
        reference: (curves, x, phi, times) -> x(times) from elsewhere, e.g. an ODE solver for the separable curves used
            here; by default extrapolation, and for ReLU the implicit trapezoid on a grid 4 times finer.
    """
    watch = watch or Watch()
    study, agreement = Study("forward"), {}
    for kernel in kernels:
        for activation in activations:
            phi = LayerMap.of(kernel, activation, POSITIONS)
            dim = POSITIONS * CHANNELS
            curves = ParameterCurves.random_smooth(dim, seed, vartheta=phi.parameter_count(dim))
            x = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
            name = f"{kernel} {activation}"
            watch.begin(f"reference: {name}", 1)
            exact, gap = _reference(curves, x, phi, levels, reference, activation == "relu")
            if gap is not None:
                agreement[name] = gap
            watch.begin(name, len(schemes) * sum(levels))
            for scheme in schemes:
                errors = []
                for layers in levels:
                    errors.append(forward(curves, x, phi, layers=layers, scheme=scheme).distance(exact))
                    watch.advance(layers)
                expected = SCHEME_ORDERS[scheme]
                study.tables.append(OrderTable(f"{name}, {scheme}", tuple(levels), tuple(errors), expected))
    study.facts = {
        "reference": "given solver" if reference else "collocation",
        "reference_against_extrapolation": agreement,
    }
    return study


def _reference(curves, x, phi, levels, reference, rough) -> tuple[Trajectory, float | None]:
    times = torch.arange(levels[0] + 1, dtype=torch.float64) / levels[0]
    own: Trajectory | None = None
    if not rough:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = solve_integral_equation(curves, x, phi, rtol=1e-12, layers=levels[0])
    if reference is None:
        if own is None:
            fine = forward(curves, x, phi, layers=4 * levels[-1], scheme="trapezoid_implicit")
            own = Trajectory(times, fine.states[:: 4 * levels[-1] // levels[0]])
        return own, None
    given = Trajectory(times, reference(curves, x, phi, times))
    return given, None if own is None else own.distance(given)


def regularizer_study(
    exponents: Sequence[float], levels: Sequence[int], *, dim: int = 3, seed: int = 3, watch: Watch | None = None
) -> Study:
    """|R_L - R| for point samples and cell averages, R_L(averages) <= R term by term, and the 1-D leading constants."""
    watch = watch or Watch()
    watch.begin("samples", 2 * len(levels))
    curves = ParameterCurves.random_smooth(dim, seed)
    samples: dict[str, list] = {"point": [], "average": []}
    for layers in levels:
        for how, sample in (("point", sample_pointwise), ("average", sample_cell_average)):
            samples[how].append(sample(curves, layers))
            watch.advance()
    study, holds = Study("regularizer"), {}
    for p in exponents:
        exact, terms = regularizer_continuous(curves, p).item(), regularizer_continuous_terms(curves, p)
        for how, parameters in samples.items():
            errors = tuple(abs(regularizer(P, p).item() - exact) for P in parameters)
            study.tables.append(OrderTable(f"p = {p:g}, {how}", tuple(levels), errors, 1.0))
        holds[f"p = {p:g}"] = all(
            bool(value <= terms[name] * (1 + 1e-12))
            for P in samples["average"]
            for name, value in regularizer_terms(P, p).items()
        )
    study.facts = {
        "averages_below_limit": holds,
        "one_dimensional_constants": _one_dimensional(curves, samples, levels),
    }
    return study


def _one_dimensional(curves: ParameterCurves, samples: dict, levels: Sequence[int]) -> dict:
    """(R_L - R) L for the two terms of A at the finest level against their leading Taylor terms."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    value = curves.A(ends).flatten(1).square().sum(1)
    slope = derivative(curves.A, ends).flatten(1).square().sum(1)
    exact = regularizer_continuous_terms(curves, 2)
    predicted = {
        "point": (-(value[1] - value[0]).item() / 2, -slope[1].item()),
        "average": (0.0, -slope.sum().item() / 2),
    }
    found = {}
    for how, parameters in samples.items():
        pair = one_index_terms(parameters[-1].A)
        for ours, name, constant in zip(pair, ("value", "derivative"), predicted[how], strict=True):
            measured = (ours - exact[f"A {name}"]).item() * levels[-1]
            found[f"{how} {name}"] = {"measured": measured, "predicted": constant}
    return found


def constants_study(levels: Sequence[int], *, trials: int = 200, seed: int = 0, watch: Watch | None = None) -> Study:
    """Largest observed / bound over random cases (each must be <= 1), and Corollary 5's error against its C tau."""
    watch = watch or Watch()
    watch.begin("random operators", trials)
    generator = torch.Generator().manual_seed(seed)
    worst: dict[str, float] = {}

    def observe(name: str, observed: Tensor | float, bound: Tensor | float) -> None:
        worst[name] = max(worst.get(name, 0.0), float(observed) / float(bound))

    dim = POSITIONS * CHANNELS
    for trial in range(trials):
        kernel = ("local", "gaussian", "softmax", "rbf")[trial % 4]
        phi = LayerMap.of(kernel, "identity", POSITIONS, value="curve")
        v = torch.randn(phi.parameter_count(dim), generator=generator, dtype=torch.float64) / 2
        y = torch.randn(dim, generator=generator, dtype=torch.float64)
        y = y * torch.exp(2 * torch.rand((), generator=generator, dtype=torch.float64) - 1)
        radius = y.reshape(POSITIONS, CHANNELS).norm(dim=1).max().item()
        in_y, in_v = torch.autograd.functional.jacobian(phi, (y, v))
        observe(f"growth, {kernel}", phi(y, v).norm(), growth_constant(phi.operator, dim, v) * y.norm())
        norm = torch.linalg.matrix_norm(in_y, 2)
        observe(f"Lipschitz in y, {kernel}", norm, lipschitz_constant(phi.operator, dim, radius, v))
        norm = torch.linalg.matrix_norm(in_v, 2)
        observe(f"Lipschitz in vartheta, {kernel}", norm, parameter_lipschitz_constant(phi.operator, dim, radius, v))
        layered = LayerMap.of(kernel, "tanh", POSITIONS)
        scale = torch.exp(torch.randn((), generator=generator)).item()
        curves = ParameterCurves.random_smooth(dim, seed + trial, scale=scale, vartheta=layered.parameter_count(dim))
        parameters = sample_pointwise(curves, 4 + trial % 13)
        sizes = forward(parameters, y, layered).states[1:].norm(dim=-1)
        observe("Lemma 2", (sizes / state_bound(parameters, y, layered).per_layer).max(), 1.0)
        watch.advance()
    phi = LayerMap.of("local")
    curves = ParameterCurves.random_smooth(dim, 7, scale=0.5)
    x = torch.randn(dim, dtype=torch.float64, generator=generator) / 2
    solution = solve_integral_equation(curves, x, phi, layers=levels[0])
    bound = trajectory_bound(curves, x, phi)
    observe("Proposition 3", (solution.states.norm(dim=-1) / bound(solution.times)).max(), 1.0)
    paths = {layers: forward(curves, x, phi, layers=layers) for layers in levels}
    largest = max(path.states.norm(dim=-1).max().item() for path in (*paths.values(), solution))
    constant = convergence_constant(curves, x, phi, sup_state=largest)
    errors = tuple(path.distance(solution) for path in paths.values())
    for layers, error in zip(levels, errors, strict=True):
        observe("Corollary 5", error * layers, constant.C)
    table = OrderTable("Corollary 5: local tanh", tuple(levels), errors, 1.0)
    facts = {
        "observed_over_bound": worst,
        "corollary_5": {
            "C": constant.C,
            "C_from_proposition_3": convergence_constant(curves, x, phi).C,
            "error_over_tau": [error * layers for layers, error in zip(levels, errors, strict=True)],
            "sup_state": largest,
            "proposition_3_bound": bound.sup,
        },
    }
    return Study("constants", [table], facts)


def learning_study(
    problem: LearningProblem,
    name: str,
    levels: Sequence[int],
    *,
    base: int = 8,
    restarts: int = 4,
    agree_up_to: int = 16,
    branches: int = 3,
    seed: int = 0,
    watch: Watch | None = None,
) -> Study:
    """Optimal values and interpolated minimisers over L: several starts on one grid, then continuation in L.

    Args:
        base: the grid of the random starts, whose distinct branches (the best `branches`) are followed over `levels`.
        restarts: random starts on the base grid; half as many on every other grid up to `agree_up_to`, to see whether
            independent starts reach the continued value.
    """
    watch = watch or Watch()
    watch.begin(f"{name}: {restarts} starts at L = {base}", 0)
    pool = problem.minimize(base, restarts=restarts, seed=seed, on_progress=watch.advance)
    tracks: list[dict[int, Minimizer]] = []
    for index, branch in enumerate(pool.branches[:branches]):
        watch.begin(f"{name}: branch {index + 1} over L", 0)
        tracks.append(problem.continuation(levels, branch.parameters, on_progress=watch.advance))
    rows, best = [], {}
    for layers in levels:
        candidates = [track[layers] for track in tracks]
        best[layers] = min(candidates, key=lambda m: m.value)
        row = {
            "layers": layers,
            "value": best[layers].value,
            "data": best[layers].data,
            "penalty": best[layers].penalty,
            "gradient": best[layers].gradient,
            "iterations": best[layers].iterations,
            "branches": [m.value for m in candidates],
        }
        if layers <= agree_up_to:
            count = restarts if layers == base else max(1, restarts // 2)
            watch.begin(f"{name}: {count} starts at L = {layers}", 0)
            fresh = (
                pool
                if layers == base
                else problem.minimize(layers, restarts=count, seed=seed + 1, on_progress=watch.advance)
            )
            row["independent_starts"] = list(fresh.starts)
            row["independent_starts_agree"] = all(abs(v - best[layers].value) <= 1e-8 for v in fresh.starts)
        rows.append(row)
    study = Study("learning", facts={"problem": name, "base": base, "rows": rows})
    tracked = tracks[0]  # one branch throughout: differences between branches are not errors
    pairs = list(zip(levels[:-1], levels[1:], strict=True))
    columns = {
        "|J_L - J_2L|": [abs(tracked[a].value - tracked[b].value) for a, b in pairs],
        "L2 distance of minimisers": [distance(tracked[a].parameters, tracked[b].parameters).item() for a, b in pairs],
        "sup distance of minimisers": [
            distance(tracked[a].parameters, tracked[b].parameters, "sup").item() for a, b in pairs
        ],
    }
    for label, errors in columns.items():
        study.tables.append(OrderTable(label, tuple(levels[:-1]), tuple(errors), 1.0))
    return study


def dynamics_study(
    problem: LearningProblem,
    levels: Sequence[int],
    rules: Sequence[str],
    *,
    steps: int = 300,
    seed: int = 2,
    rates: dict[str, float] | None = None,
    watch: Watch | None = None,
) -> Study:
    """sup over the steps of |loss_L - loss_2L| for each rule of `dynamics.RULES`, from one smooth start.

    Args:
        seed: of the start. From some starts problem A's descent sits on a plateau for all 300 steps; the default is one
            from which the Sobolev descent fits the data.
    """
    watch = watch or Watch()
    study, losses, facts = Study("dynamics"), {}, []
    curves = ParameterCurves.random_smooth(problem.dim, seed, vartheta=problem.vartheta)
    for rule in rules:
        rate = (rates or {}).get(rule, RATES[rule])
        runs = {}
        for layers in levels:
            watch.begin(f"{rule}, L = {layers}", steps)
            start = sample_pointwise(curves, layers)
            runs[layers] = descend(problem, start, rule, steps=steps, rate=rate, on_step=watch.advance)
            facts.append(
                {
                    "rule": rule,
                    "rate": rate,
                    "layers": layers,
                    "final_loss": runs[layers].losses[-1],
                    "moved": runs[layers].moved,
                    "last_A_moved": runs[layers].last_layer,
                    "other_A_moved": runs[layers].others,
                }
            )
        losses[rule] = {layers: [float(f"{v:.6g}") for v in run.losses] for layers, run in runs.items()}
        gaps = []
        for a, b in zip(levels[:-1], levels[1:], strict=True):
            pair = zip(runs[a].losses, runs[b].losses, strict=True)
            gaps.append(max((abs(x - y) for x, y in pair), default=math.nan))
        study.tables.append(OrderTable(f"sup |loss_L - loss_2L|, {rule}", tuple(levels[:-1]), tuple(gaps), None))
    study.facts = {"runs": facts, "losses": losses}
    return study
