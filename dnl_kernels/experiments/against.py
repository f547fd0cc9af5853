"""`dnl report --against`: the training loss of several sweeps over time and floating-point operations, and when each
reaches the final loss of the first.
"""

from __future__ import annotations

import itertools
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .errors import UsageError, require
from .run import Record

UNITS = {"seconds": ("seconds", 1.0), "flops": ("training operations / $10^{12}$", 1e-12)}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito
Histories = Mapping[str, Sequence[Sequence[Record]]]  # label -> repeat -> epochs


class Reach(NamedTuple):
    """How much a sweep spends until an epoch's mean loss is at most the reference's final one.

    shares[r]: of repeat r, as a share of what the reference spends in all; infinite where it is not reached.
    """

    quantity: str
    shares: list[float]

    def words(self) -> str:
        if any(map(math.isinf, self.shares)):
            missed = sum(map(math.isinf, self.shares))
            return f"{self.quantity}: not reached in {missed} of {len(self.shares)} repeats"
        mean = statistics.fmean(self.shares)
        if len(self.shares) < 2:
            return f"{self.quantity}: {mean:.0%} (one repeat)"
        p = float(require("scipy.stats").ttest_1samp(self.shares, 1.0).pvalue)
        spread = statistics.stdev(self.shares)
        return f"{self.quantity}: {mean:.0%} +- {spread:.0%} (standard deviation; p = {p:.1g} against 100 %)"


def spent(history: Sequence[Record], quantity: str) -> list[float]:
    """Accumulated over the epochs."""
    if any(quantity not in record for record in history):
        raise UsageError(f"these runs have no record of their {quantity}: they were made by an earlier version")
    return list(itertools.accumulate(record[quantity] for record in history))


def reach(reference: Sequence[Sequence[Record]], other: Sequence[Sequence[Record]], quantity: str) -> Reach:
    """Repeat by repeat, which share initial seed and order of the images: what `other` spends to get there."""
    shares = []
    for own, theirs in zip(reference, other, strict=False):
        goal, whole = own[-1]["train_loss"], spent(own, quantity)[-1]
        there = (s for s, record in zip(spent(theirs, quantity), theirs, strict=True) if record["train_loss"] <= goal)
        shares.append(next(there, math.inf) / whole)
    return Reach(quantity, shares)


def statements(histories: Histories, quantities: Sequence[str]) -> list[str]:
    first, *others = histories
    return [
        f"{label} reaches the final training loss of {first} with "
        + "; ".join(reach(histories[first], histories[label], quantity).words() for quantity in quantities)
        for label in others
    ]


def draw(histories: Histories, quantities: Sequence[str], path: pathlib.Path) -> None:
    """A panel per quantity: the mean loss over its mean, with a band of one standard deviation over the repeats."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with plt.rc_context(style):
        size = (1.0 + 4.8 * len(quantities), 4.2)
        figure, panels = plt.subplots(
            1, len(quantities), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for panel, quantity in zip(panels[0], quantities, strict=True):
            label, unit = UNITS[quantity]
            for colour, (name, repeats) in zip(itertools.cycle(COLOURS), histories.items(), strict=False):
                _curve(panel, name, repeats, quantity, unit, colour)
            goal = statistics.fmean(run[-1]["train_loss"] for run in next(iter(histories.values())))
            panel.axhline(goal, color="0.5", linewidth=0.8, linestyle=":")
            panel.set(xlabel=label, yscale="log")
            panel.grid(True, color="0.92", linewidth=0.6)
        panels[0][0].set_ylabel("mean training loss of the epoch")
        panels[0][-1].legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _curve(panel: Any, name: str, repeats: Sequence[Sequence[Record]], quantity: str, unit: float, colour: str) -> None:
    epochs = min(map(len, repeats))
    x = [unit * statistics.fmean(c) for c in zip(*(spent(run[:epochs], quantity) for run in repeats), strict=True)]
    losses = [[run[e]["train_loss"] for run in repeats] for e in range(epochs)]
    mean = [statistics.fmean(epoch) for epoch in losses]
    spread = [statistics.stdev(epoch) if len(epoch) > 1 else 0.0 for epoch in losses]
    panel.plot(x, mean, color=colour, marker="o", markersize=3.5, linewidth=1.8, label=name)
    # In the logarithm the band is mean x/: (1 + spread / mean), which stays positive.
    low = [m / (1 + s / m) for m, s in zip(mean, spread, strict=True)]
    high = [m * (1 + s / m) for m, s in zip(mean, spread, strict=True)]
    panel.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    for before, after, at, loss in zip(repeats[0], repeats[0][1:], x[1:], mean[1:], strict=False):
        if before.get("layers") != after.get("layers"):
            panel.annotate(
                f"L = {after['layers']}", (at, loss), fontsize=7.5, xytext=(4, 3), textcoords="offset points"
            )
