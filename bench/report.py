"""`python -m bench.report RESULTS.json...`: the benchmarks as tables (Markdown) and figures (PNG), in docs/benchmarks.

A ratio is peer time / our time in the same run, above 1 where ours is faster; it is printed only for a case whose
results passed their check against float64 in that run. Losing cases stand with the rest.
"""

from __future__ import annotations

import argparse
import io
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from bench import results
from bench.results import Row, phases, strongest
from dnl_kernels.testing import roofline

MIB = 2**20


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def milliseconds(way: dict[str, Any] | None, phase: str) -> str:
    if way is None or phase not in way:
        return ""
    times = way[phase]
    return f"{times['median'] * 1e3:.3g} ({times['p20'] * 1e3:.3g} to {times['p80'] * 1e3:.3g})"


def mib(value: float | None) -> str:
    return "" if value is None else f"{value / MIB:.1f}"


def ratio(row: Row, phase: str, peer: str) -> float | None:
    """Peer time / our time, or None if ours is not right in this run or there is no such time."""
    ways = row["ways"]
    if not row["check"]["passed"] or phase not in ways.get(peer, {}):
        return None
    return ways[peer][phase]["median"] / ways["ours"][phase]["median"]


def rates(row: Row, phase: str, ceilings: dict[str, float]) -> tuple[str, str, str]:
    """GFLOP/s, GB/s of the compulsory bytes, and the share of the ceiling that is nearer: the multiply-adds beside the
    row itself, where they were measured."""
    if row.get("fma_gflops"):
        ceilings = ceilings | {"fma_gflops": row["fma_gflops"]}
    seconds = row["ways"]["ours"][phase]["median"]
    flops = {"both": sum(row["flops"].values())}.get(phase, row["flops"].get(phase, 0.0))
    moved = row["bytes"]["forward"] if phase == "forward" else 0.0
    shares = [
        rate / ceilings[name]
        for rate, name in ((flops / seconds / 1e9, "fma_gflops"), (moved / seconds / 1e9, "copy_gb_per_s"))
        if ceilings.get(name)
    ]
    shown = [f"{x / seconds / 1e9:.3g}" if x else "" for x in (flops, moved)]
    return shown[0], shown[1], f"{max(shares):.0%}" if shares and max(shares) > 0 else ""


def bar(row: Row, phase: str) -> str:
    """What was aimed at in this phase, and whether it was met."""
    if phase != phases(row)[-1]:
        return ""
    found = []
    for peer, aim in row["bars"].items():
        seen = ratio(row, phase, peer)
        if seen is not None:
            found.append(f"{peer} {aim:.2g}: {'met' if seen >= aim else 'missed'}")
    return ", ".join(found)


def time_table(rows: list[Row], ceilings: dict[str, float]) -> str:
    peers = list(dict.fromkeys(name for row in rows for name in row["ways"] if name != "ours"))
    columns = ["case", "phase", "ours, ms", *(f"{p}, ms" for p in peers), "strongest / ours", "GFLOP/s", "GB/s",
               "of ceiling", "aim"]  # fmt: skip
    lines = []
    for row in rows:
        for phase in phases(row):
            best = strongest(row, phase)
            seen = ratio(row, phase, best) if best else None
            shown = "" if best is None else "check failed" if seen is None else f"{seen:.2f} ({best})"
            lines.append([row["case"], phase, milliseconds(row["ways"]["ours"], phase),
                          *(milliseconds(row["ways"].get(p), phase) for p in peers), shown,
                          *rates(row, phase, ceilings), bar(row, phase)])  # fmt: skip
    return table(columns, lines)


def memory_table(rows: list[Row]) -> str:
    columns = ["case", "way", "kept for backward, MiB", "peak of a step, MiB", "first call, s", "error", "absent"]
    lines = []
    for row in rows:
        for name, way in row["ways"].items():
            error = "" if way["error"] is None else f"{way['error']:.1e}"
            if name == "ours" and row["check"].get("draw", 1) > 1:
                error += f" (draw {row['check']['draw']})"
            lines.append([row["case"], name, mib(way["saved_bytes"]), mib(way["peak_bytes"]),
                          f"{way['first_call_s']:.2f}", error, ""])  # fmt: skip
        lines += [[row["case"], name, "", "", "", "", why] for name, why in row["absent"].items()]
    return table(columns, lines)


def scaling_table(rows: list[Row]) -> str:
    columns = ["curve", "values", "way", "milliseconds", "GFLOP/s", "kept for backward, MiB",
               "exponent of time (promised)", "exponent of memory (promised)"]  # fmt: skip
    lines = []
    for row in rows:
        for name, series in row["ways"].items():
            fit, expected = series.get("fit", {}), row["expected"] if name == "ours" else {}

            def exponent(key, fit=fit, expected=expected):
                text = f"{fit[key]:.2f}" if key in fit else ""
                return text + (f" ({expected[key]:g})" if expected.get(key) is not None else "")

            lines.append([row["case"], " ".join(map(str, row["values"])), name,
                          " ".join(f"{t * 1e3:.3g}" for t in series["seconds"]),
                          " ".join(f"{f / t / 1e9:.3g}" for f, t in
                                   zip(row.get("flops") or [], series["seconds"], strict=False)),
                          " ".join(mib(b) for b in series.get("saved_bytes", [])),
                          exponent("seconds"), exponent("saved_bytes")])  # fmt: skip
    return table(columns, lines)


GPU = """## GPU: computed, not measured

No GPU has run these kernels. The floor of a forward pass is the larger of its bytes (each tensor once) / bandwidth and
its FLOPs / rate, from the data sheets: no kernel can be faster, and nothing here says how near ours come. What the
kernels are made of, from compiled code and counted addresses: registers, spills and occupancy of
[CUDA C++](../gpu/cuda-compile.md) and [Triton](../gpu/triton-compile.md); bytes moved, FLOPs and floors of
[CUDA C++](../gpu/cuda-traffic.md) and [Triton](../gpu/triton-traffic.md)."""


def floor_table(rows: list[Row]) -> str:
    """What the forward pass of every case that counts its work costs at least, in microseconds."""
    columns = ["operator", "case", "dtype", "GFLOP", "MiB", *(f"floor on {name}, us" for name in roofline.DEVICES)]
    lines = []
    for row in rows:
        flops, moved = row["flops"]["forward"], row["bytes"]["forward"]
        if not flops or not moved:
            continue
        floors = roofline.floors(moved, flops, row["dtype"] == "float32").values()
        lines.append([row["operator"], row["case"], row["dtype"], f"{flops / 1e9:.3g}", mib(moved),
                      *(f"{floor:.1f}" for floor in floors)])  # fmt: skip
    return table(columns, lines)


def facts_text(facts: list[dict[str, Any]]) -> str:
    lines = []
    for one in facts:
        ceilings = ", ".join(f"{k} {v:.4g}" for k, v in one.get("ceilings", {}).items())
        versions = ", ".join(f"{k} {v}" for k, v in one.get("versions", {}).items())
        commit = one["commit"] + (" with changes" if one["dirty"] else "")
        lines.append(f"- {one['date']}, commit {commit}: {versions}; {one.get('device', '')}, instruction set "
                     f"{one.get('instruction set', '')}; ceilings in the same run: {ceilings}")  # fmt: skip
    return "\n".join(lines)


def speed_figure(axes, rows: list[Row]) -> None:
    """Every case's last phase: the strongest peer and the eager way over ours."""
    found = []
    for row in rows:
        phase = phases(row)[-1]
        best, eager = strongest(row, phase), next((n for n in row["ways"] if n != "ours"), None)
        if best and eager and ratio(row, phase, best):
            found.append((f"{row['operator']} {row['case']}", ratio(row, phase, best), ratio(row, phase, eager)))
    found.sort(key=lambda item: item[1])
    places = range(len(found))
    axes.barh(places, [b for _, b, _ in found], color=["#2a7f62" if b >= 1 else "#b3423a" for _, b, _ in found])
    axes.plot([e for _, _, e in found], places, "k.", label="against the first peer (mostly eager)")
    for colour, label in (("#2a7f62", "against the strongest peer: faster"), ("#b3423a", "slower")):
        axes.bar(1.0, 0.0, color=colour, label=label)
    axes.set_ylim(-0.7, len(found) - 0.3)
    axes.axvline(1.0, color="k", linewidth=0.8)
    axes.set_yticks(places, [name for name, _, _ in found], fontsize=6)
    axes.set_xscale("log")
    axes.set_xlabel("peer time / our time (forward and backward where trained)")
    axes.legend(loc="lower right")


def memory_figure(axes, rows: list[Row]) -> None:
    """Kept for backward: ours against the first peer."""
    for row in rows:
        eager = next((n for n in row["ways"] if n != "ours"), None)
        if row["train"] and eager:
            pair = [row["ways"][name]["saved_bytes"] for name in (eager, "ours")]
            if all(pair):
                axes.loglog(pair[0] / MIB, pair[1] / MIB, "o", color="#2a7f62", markersize=4)
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], "k-", linewidth=0.8, label="as much")
    axes.plot([low, high], [low / 10, high / 10], "k:", linewidth=0.8, label="a tenth")
    axes.set_xlabel("first peer (eager), MiB kept for backward")
    axes.set_ylabel("ours, MiB")
    axes.legend()


def scaling_figure(axes, row: Row) -> None:
    for name, series in row["ways"].items():
        axes.loglog(row["values"], [t * 1e3 for t in series["seconds"]], "o-", label=name, markersize=4)
    axes.set_title(row["case"], fontsize=9)
    axes.set_ylabel("ms, forward + backward", fontsize=8)
    axes.legend(fontsize=7)


def figures(rows: list[Row], curves: list[Row]) -> dict[str, bytes]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    found = {}

    def save(name: str, figure: Figure) -> None:
        figure.tight_layout()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        found[name] = buffer.getvalue()

    if rows:
        figure = Figure(figsize=(9, 2 + 0.14 * len(rows)))
        speed_figure(figure.subplots(), rows)
        save("speed.png", figure)
        figure = Figure(figsize=(5.5, 4.5))
        memory_figure(figure.subplots(), rows)
        save("memory.png", figure)
    if curves:
        columns = 3
        figure = Figure(figsize=(4 * columns, 3 * ((len(curves) + columns - 1) // columns)))
        grid = figure.subplots((len(curves) + columns - 1) // columns, columns, squeeze=False).flat
        for axes, row in zip(grid, curves, strict=False):
            scaling_figure(axes, row)
        for axes in list(grid)[len(curves) :]:
            axes.set_axis_off()
        save("scaling.png", figure)
    return found


def text(facts: list[dict[str, Any]], rows: list[Row], curves: list[Row], images: Iterable[str]) -> str:
    ceilings = next((one["ceilings"] for one in facts if one.get("ceilings")), {})
    parts = ["# Benchmarks", (__doc__ or "").split("\n\n", 1)[1].strip(), "Machine and versions:", facts_text(facts)]
    parts += [f"![{name}]({name})" for name in images]
    for operator in dict.fromkeys(row["operator"] for row in rows):
        mine = [row for row in rows if row["operator"] == operator]
        parts += [f"## {operator}", "Medians, 20th to 80th percentile in brackets.", time_table(mine, ceilings),
                  memory_table(mine)]  # fmt: skip
    if curves:
        parts += ["## Scaling", "Fitted over the upper half of the values.", scaling_table(curves)]
    return "\n\n".join([*parts, GPU, floor_table(rows)]) + "\n"


def write(path: pathlib.Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", help="files that --benchmark-json wrote; a later one replaces equal rows")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/benchmarks"))
    options = parser.parse_args(arguments)
    facts, every = results.load(options.results)
    rows = [row for row in every if row["operator"] != "scaling"]
    curves = [row for row in every if row["operator"] == "scaling"]
    if not every:
        raise SystemExit(f"no benchmark in {', '.join(options.results)}")
    options.out.mkdir(parents=True, exist_ok=True)
    images = figures(rows, curves)
    for name, content in images.items():
        write(options.out / name, content)
    write(options.out / "README.md", text(facts, rows, curves, images).encode())
    print(options.out / "README.md")


if __name__ == "__main__":
    main()
