"""A picture of a block's K over the triangle of layers and states, with its difference quotients."""

from __future__ import annotations

import pathlib

from ..theory.regularity import DepthRegularity
from .errors import require


def draw(report: DepthRegularity, path: str | pathlib.Path) -> None:
    """A PNG: |K^{l,j}| and its difference quotients in layer and state."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.9), layout="constrained")
    titles = ("$|K^{l,j}|$", "$|K^{l+1,j}-K^{l,j}|/\\tau$", "$|K^{l,j+1}-K^{l,j}|/\\tau$")
    for axis, title, values in zip(axes, titles, (report.size, report.in_t, report.in_s), strict=True):
        image = axis.imshow(values.numpy(), origin="lower", cmap="viridis", vmin=0)
        axis.set(title=title, xlabel="state $j$", ylabel="layer $l$")
        figure.colorbar(image, ax=axis, shrink=0.85)
    in_t, in_s = report.roughness
    words = f"$R_L$ = {report.regularizer:.3g}, roughness {in_t:.2f} in $t$, {in_s:.2f} in $s$"
    figure.suptitle(words, fontsize=10)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
