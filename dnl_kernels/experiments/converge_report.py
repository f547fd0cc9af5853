"""Tables and figures of `dnl converge`, from its records: a JSON file can be shown again without computing."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .errors import require

Result = Mapping[str, Any]
Panel = tuple[str, Callable[[Any], None]]
HEADERS = {
    "forward": "largest state error (order)",
    "regularizer": "|R_L - R| (order)",
    "constants": "largest state error (order)",
    "learning": "difference to the next level (order)",
    "limit": "difference to the limit (order)",
    "dynamics": "largest loss difference to the next level (order)",
}
AXES = {
    "forward": "$\\max_l\\ |x^l - x(t_l)|$",
    "regularizer": "$|R_L - R|$",
    "constants": "$\\max_l\\ |x^l - x(t_l)|$",
    "learning": "difference between $L$ and the next level",
    "limit": "difference to the limit",
    "dynamics": "$\\sup\\ |\\mathrm{loss}_L - \\mathrm{loss}_{\\mathrm{next}}|$",
}
SCHEMES = {
    "euler": "eq. (1)",
    "trapezoid": "trapezoid, explicit",
    "trapezoid_implicit": "trapezoid, implicit",
}
RULES = {
    "sobolev": "Sobolev: $H^1$ gradient",
    "absorbed": "absorbed: descent on $W = \\tau K$",
    "explicit": "explicit: descent on $K$",
    "l2": "$L^2$ gradient",
}
# Okabe and Ito's palette: told apart by all readers, and by their lightness in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


@dataclass(frozen=True)
class Table:
    """Text cells; the last columns of a row may be empty."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str = ""


def tables(result: Result) -> list[Table]:
    """Errors with observed orders, and what the study found besides."""
    name = result["study"]
    levels = [f"L = {level}" for level in result["tables"][0]["levels"]]
    rows = []
    for table in result["tables"]:
        first, *others = _errors(table)
        cells = [f"{first:.1e}", *[f"{e:.1e} ({_order(o)})" for e, o in zip(others, table["orders"], strict=True)]]
        rows.append((table["name"], *cells, _order(table["fitted_order"])))
    title = result.get("problem", "")
    found = [Table((HEADERS[name], *levels, "fitted order"), rows, title)]
    return found + DETAILS[name](result)


def _errors(table: Result) -> list[float]:
    """JSON has null where a run diverged."""
    return [math.nan if value is None else value for value in table["errors"]]


def _order(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _forward(result: Result) -> list[Table]:
    rows = [(name, f"{gap:.0e}") for name, gap in result["reference_against_extrapolation"].items()]
    return [Table(("reference against own extrapolation", "largest difference"), rows)] if rows else []


def _regularizer(result: Result) -> list[Table]:
    rows = [
        (name, f"{pair['measured']:.4f}", f"{pair['predicted']:.4f}")
        for name, pair in result["one_dimensional_constants"].items()
    ]
    holds = [(name, "yes" if value else "NO") for name, value in result["averages_below_limit"].items()]
    return [
        Table(("(R_L - R) L for A at the last level", "measured", "leading Taylor term"), rows),
        Table(("R_L(averages) <= R, every term and level", "holds"), holds),
    ]


def _constants(result: Result) -> list[Table]:
    rows = [(name, f"{ratio:.3f}") for name, ratio in result["observed_over_bound"].items()]
    cor = result["corollary_5"]
    scaled = cor["error_over_tau"]
    return [
        Table(("invariant", "largest observed / bound"), rows),
        Table(
            ("Corollary 5", "value"),
            [
                ("error / tau", f"{min(scaled):.2f} to {max(scaled):.2f}"),
                ("C with the observed sup of the states", f"{cor['C']:.3g}"),
                ("C with Proposition 3's and Lemma 2's bounds", f"{cor['C_from_proposition_3']:.3g}"),
            ],
        ),
    ]


def _learning(result: Result) -> list[Table]:
    rows = []
    for row in result["rows"]:
        starts = row.get("independent_starts")
        agree = ""
        if starts is not None:
            agree = f"{len(starts)}, " + (
                "agree" if row["independent_starts_agree"] else f"differ, best {min(starts):.8f}"
            )
        numbers = (f"{row['value']:.10f}", f"{row['data']:.3e}", f"{row['penalty']:.3e}", f"{row['gradient']:.0e}")
        branches = " ".join(f"{value:.8f}" for value in row["branches"])
        rows.append((str(row["layers"]), *numbers, str(row["iterations"]), branches, agree))
    header = ("L", "J_L", "data", "R part", "gradient", "iterations", "branches", "independent starts")
    return [Table(header, rows, result["problem"])]


def _limit(result: Result) -> list[Table]:
    rows = []
    for row in result["continuous"]:
        found = row.get("certificate")
        keys = ("residual", "curvature", "decrement", "value_error", "distance_error")
        certificate = [f"{found[key]:.1e}" for key in keys] if found else [""] * len(keys)
        parts = (f"{row['data']:.4e}", f"{row['penalty']:.4e}", f"{row['gradient']:.0e}")
        rows.append((str(row["degree"]), f"{row['value']:.13f}", *parts, *certificate))
    found_by = ("degree N", "J_N", "data", "R part", "gradient")
    certified = (
        "residual in N + 4",
        "smallest eigenvalue of J''",
        "predicted fall",
        "bound of it",
        "of the H^1 distance",
    )
    return [Table((*found_by, *certified), rows, result["problem"])]


def _dynamics(result: Result) -> list[Table]:
    rows = []
    for row in result["runs"]:
        moved = (row["final_loss"], row["moved"]["K"], row["last_A_moved"], row["other_A_moved"])
        rows.append((row["rule"], f"{row['rate']:g}", str(row["layers"]), *[f"{value:.2e}" for value in moved]))
    return [Table(("rule", "rate", "L", "final loss", "K moved (rms)", "A^{L-1} moved", "other A moved (rms)"), rows)]


DETAILS = {
    "forward": _forward,
    "regularizer": _regularizer,
    "constants": _constants,
    "learning": _learning,
    "limit": _limit,
    "dynamics": _dynamics,
}


def markdown(table: Table) -> str:
    """GitHub's tables, for the documentation."""
    lines = [table.header, ("---",) * len(table.header), *table.rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return text.replace("| --- ", "|---").replace("|--- |", "|---|").replace("|  |", "| |")


def show(table: Table, screen: Any) -> None:
    from rich.markup import escape
    from rich.table import Table as Rich

    rich = Rich(*map(escape, table.header), title=escape(table.title) or None)
    for row in table.rows:
        rich.add_row(*map(escape, row))
    screen.print(rich)


def draw(results: Sequence[Result], path: pathlib.Path) -> None:
    """A PNG: log-log panels with reference slopes, loss curves, or ratios to bounds."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
    }
    name = results[0]["study"]
    with plt.rc_context(style):
        painters = {"forward": _schemes, "dynamics": _descents, "constants": _bounds, "limit": _limits}
        panels = painters.get(name, _groups)(results)
        columns = 2 if len(panels) == 4 else len(panels)
        rows = -(-len(panels) // columns)
        size = (1.2 + 4.4 * columns, 0.3 + 3.9 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, (title, paint) in zip(axes.flat, panels, strict=True):
            paint(axis)
            axis.set_title(title, loc="left", fontsize=10.5)
            axis.grid(True, color="0.92", linewidth=0.6)
        shared = name == "forward"
        for axis in axes.flat[-1:] if shared else axes.flat:
            if axis.get_legend_handles_labels()[0]:
                place = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)} if shared else {}
                axis.legend(frameon=False, fontsize=8.5, **place)
        figure.savefig(path, dpi=130, format="png")
        plt.close(figure)


def _schemes(results: Sequence[Result]) -> list[Panel]:
    """One panel per scheme; the colour is the kernel, the line the activation."""
    groups: dict[str, list[tuple[str, Result]]] = {}
    for table in results[0]["tables"]:
        problem, scheme = table["name"].split(", ")
        groups.setdefault(scheme, []).append((problem, table))
    panels: list[Panel] = []
    for index, (scheme, group) in enumerate(groups.items()):
        kernels = list(dict.fromkeys(problem.split()[0] for problem, _ in group))
        looks = [(COLOURS[kernels.index(p.split()[0])], "--" if p.endswith("relu") else "-") for p, _ in group]
        label = AXES["forward"] if index == 0 else ""
        panels.append((SCHEMES[scheme], partial(_loglog, group=group, label=label, looks=looks)))
    return panels


def _groups(results: Sequence[Result]) -> list[Panel]:
    """One panel per result."""
    name = results[0]["study"]
    panels: list[Panel] = []
    for index, result in enumerate(results):
        group = [(_label(table["name"]), table) for table in result["tables"]]
        title = f"problem {result['problem']}" if "problem" in result else "discrete regularizer to continuous"
        label = AXES[name] if index in (0, 2) or len(results) != 4 else ""
        panels.append((title.replace("x0", "$x^0$:"), partial(_loglog, group=group, label=label)))
    return panels


def _limits(results: Sequence[Result]) -> list[Panel]:
    """Values and L2 distances to the limit; the right regularizer in blue, faults in red and dashed."""
    panels: list[Panel] = []
    for result in results:
        for quantity, label in (("|J_L - J*|", "$|J_L - J^*|$"), ("L2 distance to theta*", "$L^2$ distance")):
            group = [(t["name"].split(", ")[0], t) for t in result["tables"] if t["name"].endswith(quantity)]
            group = [(name.replace("x0", "$x^0$:"), table) for name, table in group]
            looks = [(COLOURS[i], "--" if name.startswith("fault") else "-") for i, (name, _) in enumerate(group)]
            title = f"problem {result['problem']}"
            panels.append((title, partial(_loglog, group=group, label=label, looks=looks)))
    return panels


def _label(name: str) -> str:
    return {"|J_L - J_2L|": "optimal value, $|J_L - J_{2L}|$"}.get(name, name.replace("L2", "$L^2$"))


def _loglog(
    axis: Any, group: Sequence[tuple[str, Result]], label: str, looks: Sequence[tuple[str, str]] | None = None
) -> None:
    axis.set(xscale="log", yscale="log", xlabel="layers $L$", ylabel=label)
    looks = looks or [(COLOURS[i % len(COLOURS)], "--" if "average" in n else "-") for i, (n, _) in enumerate(group)]
    for (name, table), (colour, line) in zip(group, looks, strict=True):
        axis.plot(table["levels"], _errors(table), line, color=colour, marker="o", markersize=3.5, label=name)
    levels, errors = group[0][1]["levels"], [_errors(table) for _, table in group]
    for order in sorted({table["expected_order"] for _, table in group if table["expected_order"] is not None}):
        # The reference slope starts where it stays below all curves.
        fall = [(level / levels[0]) ** order for level in levels]
        start = min(e * f for curve in errors for e, f in zip(curve, fall, strict=True) if e > 0) / 1.8
        axis.plot(levels, [start / f for f in fall], color="0.4", linestyle=":")
        middle = (len(levels) - 1) // 2
        at = {"xytext": (-3, -3), "textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 8.5}
        axis.annotate(f"slope $-{order:g}$", (levels[middle], start / fall[middle]), **at)
    axis.set_xticks(levels, [str(level) for level in levels])
    axis.minorticks_off()


def _bounds(results: Sequence[Result]) -> list[Panel]:
    result = results[0]
    ratios = sorted(result["observed_over_bound"].items(), key=lambda pair: pair[1])

    def ratio(axis: Any) -> None:
        names, values = [name for name, _ in ratios], [value for _, value in ratios]
        axis.hlines(names, min(values) / 2, values, color="0.8", linewidth=1)
        axis.plot(values, names, "o", color=COLOURS[0], markersize=5)
        axis.axvline(1, color=COLOURS[1], linewidth=1.4)
        axis.annotate("bound ", (1, 0), color=COLOURS[1], ha="right", va="center", fontsize=8.5)
        axis.set(xscale="log", xlabel="largest observed / bound", xlim=(min(values) / 2, 1.4))

    def orders(axis: Any) -> None:
        (table,) = result["tables"]
        _loglog(axis, [(table["name"].split(": ")[1], table)], AXES["constants"])
        bound = [result["corollary_5"]["C"] / level for level in table["levels"]]
        axis.plot(table["levels"], bound, color=COLOURS[1], label="bound $C\\tau$")

    return [("bounds as invariants", ratio), ("Corollary 5", orders)]


def _descents(results: Sequence[Result]) -> list[Panel]:
    result = results[0]
    shades = require("matplotlib.pyplot").get_cmap("viridis")

    def curves(axis: Any, losses: Mapping[str, Sequence[float]]) -> None:
        for index, (layers, values) in enumerate(losses.items()):
            shade = shades(0.87 * (1 - index / max(1, len(losses) - 1)))
            axis.semilogy(values, color=shade, linewidth=1.4, label=f"$L = {layers}$")
        axis.set(xlabel="step", ylabel="data loss")

    def gaps(axis: Any) -> None:
        group = [(table["name"].rsplit(", ", 1)[1], {**table, "expected_order": 1.0}) for table in result["tables"]]
        _loglog(axis, group, AXES["dynamics"])

    panels: list[Panel] = [(RULES[rule], partial(curves, losses=losses)) for rule, losses in result["losses"].items()]
    return [*panels, ("largest difference between $L$ and the next level", gaps)]
