"""`dnl report`: figure, table and a plain statement of how the training loss changes with the depth."""

from __future__ import annotations

import argparse
import itertools
import math
import pathlib
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import against, metrics
from .errors import UsageError, require
from .run import Record
from .screen import console

LEVEL = 0.05  # a difference is called clear below this p-value of Welch's test


class Curve(NamedTuple):
    """The runs of one depth. losses[r][e]: training loss of repeat r in epoch e + 1, of equal length for all r."""

    depth: int
    parameters: int
    losses: list[list[float]]
    rate: float  # images/s, the median over epochs
    share: float  # of a large matrix product's FLOP/s, likewise

    @property
    def epochs(self) -> int:
        return len(self.losses[0])

    def mean(self) -> list[float]:
        return [statistics.fmean(epoch) for epoch in zip(*self.losses, strict=True)]

    def spread(self) -> list[float]:
        """Standard deviation over the repeats, by epoch."""
        return [statistics.stdev(e) if len(e) > 1 else 0.0 for e in zip(*self.losses, strict=True)]

    def error(self) -> float:
        """Standard error of the final mean; not a number for a single repeat."""
        return self.spread()[-1] / math.sqrt(len(self.losses)) if len(self.losses) > 1 else math.nan


Group = dict[int, Curve]  # by depth
Runs = dict[tuple[int, int, int], dict[int, Record]]  # (depth, seed, repeat) -> epoch -> record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="--out of a dnl train; those of equal settings are merged"
    )
    parser.add_argument("--figure", default=None, metavar="FILE", help="default: loss.png in the first DIR")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=list(against.UNITS),
        help="one figure over time and operations instead, and what the other DIRs spend until the first DIR's loss",
    )


def run(args: argparse.Namespace) -> int:
    folders = [pathlib.Path(folder) for folder in args.folders]
    figure = pathlib.Path(args.figure) if args.figure else folders[0] / "loss.png"
    if args.against:
        publish_against(folders, args.against, figure, console())
    else:
        publish(folders, figure, console())
    return 0


def publish_against(
    folders: Sequence[pathlib.Path], quantities: Sequence[str], figure: pathlib.Path, screen: Any
) -> None:
    """Of each sweep and depth the loss over time and operations, and when it reaches that of the first."""
    if len(set(quantities)) < len(quantities):
        raise UsageError(f"--against is {' '.join(quantities)}; expected different quantities")
    histories = {}
    for name, runs in found(folders).items():
        for depth in sorted({depth for depth, _, _ in runs}):
            own = [[run[epoch] for epoch in sorted(run)] for key, run in sorted(runs.items()) if key[0] == depth]
            histories[f"{name}, L = {depth}"] = own
    for words in against.statements(histories, quantities):
        screen.print(words, highlight=False, soft_wrap=True)
    against.draw(histories, quantities, figure)
    screen.print(f"figure: {figure}", highlight=False, soft_wrap=True)


def publish(folders: Sequence[pathlib.Path], figure: pathlib.Path, screen: Any) -> None:
    """Table and statement on the screen for each variant, and one figure of all."""
    groups = collect(folders)
    for name, curves in groups.items():
        screen.print(table(name, curves))
        screen.print(statement(curves), highlight=False, soft_wrap=True)
    draw(groups, figure)
    screen.print(f"figure: {figure}", highlight=False, soft_wrap=True)


def collect(folders: Sequence[pathlib.Path]) -> dict[str, Group]:
    """The curves in the folders: variant -> depth -> Curve. Folders of the same settings are one variant."""
    return {name: curves(runs) for name, runs in found(folders).items()}


def found(folders: Sequence[pathlib.Path]) -> dict[str, Runs]:
    """The records in the folders, by variant."""
    runs = [metrics.read(folder / metrics.NAME) for folder in folders]
    # A run is known by its depth, seed and repeat; one that is found twice counts once.
    records: dict[str, Runs] = defaultdict(lambda: defaultdict(dict))
    for name, (header, own) in zip(names([header for header, _ in runs]), runs, strict=True):
        for record in own:
            records[name][record["depth"], header["seed"], record["repeat"]][record["epoch"]] = record
    if not records:
        raise UsageError(f"no epoch is finished in {', '.join(map(str, folders))}")
    return records


def names(headers: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each sweep: its data set, and the settings in which the sweeps differ."""
    sweeps = ("depths", "repeats", "epochs", "data", "seed", "device", "threads")  # these do not make a variant
    configs = [{k: v for k, v in header["config"].items() if k not in sweeps} for header in headers]
    differ = [
        k
        for k in dict.fromkeys(itertools.chain(*configs))
        if k != "dataset" and any(c.get(k) != configs[0].get(k) for c in configs)
    ]
    return [", ".join([c["dataset"], *(f"{k} {_said(c.get(k))}" for k in differ)]) for c in configs]


def _said(value: Any) -> str:
    return "none" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def curves(runs: Runs) -> Group:
    """One curve per depth, over the epochs that all its repeats have finished."""
    group = {}
    for depth in sorted({depth for depth, _, _ in runs}):
        histories = [[run[epoch] for epoch in sorted(run)] for key, run in sorted(runs.items()) if key[0] == depth]
        epochs = min(map(len, histories))
        losses = [[record["train_loss"] for record in history[:epochs]] for history in histories]
        speed = [
            statistics.median(record[name] for record in itertools.chain(*histories))
            for name in ("images_per_second", "share_of_matmul_rate")
        ]
        group[depth] = Curve(depth, histories[0][-1]["parameters"], losses, *speed)
    return group


def table(name: str, curves: Group) -> Any:
    """Final mean training loss of each depth, with its standard error."""
    found = require("rich.table").Table(title=f"{name}: mean training loss", title_justify="left")
    for heading in ("L", "parameters", "epochs", "repeats", "final loss", "standard error", "images/s", "of matmul"):
        found.add_column(heading, justify="right")
    for curve in curves.values():
        error = "-" if math.isnan(curve.error()) else f"{curve.error():.2g}"
        cells = (
            curve.depth,
            f"{curve.parameters:,}",
            curve.epochs,
            len(curve.losses),
            f"{curve.mean()[-1]:.4g}",
            error,
        )
        found.add_row(*map(str, cells), f"{curve.rate:,.0f}", f"{curve.share:.0%}")
    return found


def statement(curves: Group) -> str:
    """Whether the final loss decreases with L, step by step, and how sure that is."""
    if len({curve.epochs for curve in curves.values()}) > 1:
        return "The depths have trained for different numbers of epochs, so their losses are not compared."
    steps = [compare(*pair) for pair in itertools.pairwise(curves.values())]
    if not steps:
        return "One depth only: nothing to compare."
    down = sum(step.decreases for step in steps)
    if down == len(steps):
        first = "decreases with L at every step"
    else:
        first = f"does not decrease with L at every step ({down} of {len(steps)} do)"
    words = "; ".join(step.words for step in steps)
    return f"The final training loss {first}: {words}. An observation; Theorem 1 does not imply it."


class Step(NamedTuple):
    """From one depth to the next."""

    decreases: bool
    words: str


def compare(a: Curve, b: Curve) -> Step:
    """The final losses of two depths; a difference is clear where Welch's t-test over the repeats says so."""
    before, after = a.mean()[-1], b.mean()[-1]
    if min(len(a.losses), len(b.losses)) < 2:
        sure = "one repeat"
    else:
        finals = ([run[-1] for run in curve.losses] for curve in (a, b))
        p = float(require("scipy.stats").ttest_ind(*finals, equal_var=False).pvalue)
        sure = f"p = {p:.1g}" if p < LEVEL else f"not clear, p = {p:.1g}"
    return Step(after < before, f"{a.depth} to {b.depth}: x {after / before:.3g} ({sure})")


def draw(groups: Mapping[str, Group], path: pathlib.Path) -> None:
    """Mean training loss against epoch on a log scale, a line per depth with a band of one standard deviation over
    the repeats, a panel per variant."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with plt.rc_context(style):
        size = (1.5 + 5.5 * len(groups), 4.6)
        figure, panels = plt.subplots(1, len(groups), figsize=size, sharey=True, squeeze=False, layout="constrained")
        depths = sorted({depth for curves in groups.values() for depth in curves})
        colours = plt.get_cmap("viridis")
        shade = {depth: colours(0.87 * (1 - i / max(1, len(depths) - 1))) for i, depth in enumerate(depths)}
        for panel, (name, curves) in zip(panels[0], groups.items(), strict=True):
            for curve in curves.values():
                plot(panel, curve, shade[curve.depth])
            repeats = "-".join(map(str, sorted({len(curve.losses) for curve in curves.values()})))
            panel.set_title(f"{name}\nmean and standard deviation over {repeats} repeats", loc="left", fontsize=10)
            panel.set(xlabel="epoch", yscale="log")
            panel.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
            panel.grid(True, color="0.92", linewidth=0.6)
            panel.legend(title="layers per block", frameon=False, loc="upper right")
        panels[0][0].set_ylabel("mean training loss (cross entropy)")
        low, high = panels[0][0].get_ylim()  # shared
        axis, ticker = panels[0][0].yaxis, require("matplotlib.ticker")
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if high > 5 * low else ticker.MaxNLocator(6))
        axis.set_major_formatter(lambda loss, _: f"{loss:g}")
        axis.set_minor_locator(ticker.NullLocator())
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def plot(panel: Any, curve: Curve, colour: Any) -> None:
    epochs, mean = range(1, curve.epochs + 1), curve.mean()
    marker = "o" if curve.epochs <= 30 else ""
    panel.plot(epochs, mean, color=colour, marker=marker, markersize=3.5, linewidth=1.8, label=f"L = {curve.depth}")
    # In the logarithm the band is mean x/: (1 + spread / mean), which stays positive.
    factor = [1 + s / m for m, s in zip(mean, curve.spread(), strict=True)]
    low, high = ([m * f**sign for m, f in zip(mean, factor, strict=True)] for sign in (-1, 1))
    panel.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
