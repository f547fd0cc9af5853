"""The page of a GPU day, rendered from its results.

`python3 -m bench.gpu_day.summary results.jsonl > docs/gpu/<card>.md`
"""

from __future__ import annotations

import collections
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from bench.gpu_day.day import rows

Rows = Sequence[dict[str, Any]]
FACTS = ("card", "capability", "multiprocessors", "memory_gib", "l2_mib", "shared_memory_per_block", "cards",
         "driver, power limit", "python", "torch", "cuda_of_torch", "triton", "torchvision", "nvcc",
         "architectures")  # fmt: skip
REHEARSAL = (
    "**A rehearsal on a processor**: the CUDA sources ran in the emulator, Triton's kernels in its interpreter, and "
    "the benchmarks had toy sizes. Nothing here says anything about a GPU; every time is the processor's.\n"
)
TIMES = (
    "Microseconds. device: median between CUDA events, caches overwritten; stream: per call of a loop that does not"
    " wait; graph: replay of a captured graph; both: forward and backward. Shares are of the rates of a copy and of a"
    " bf16 product, measured at the start of the group; bytes and operations count once."
)
BAD = ("failed", "crashed", "unfinished")
MOST_FAILURES = 100


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    found = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in [list(header), ["---"] * len(header), *found]] + [""]


def of(found: Rows, kind: str) -> Rows:
    return [row for row in found if row["kind"] == kind]


def tests(found: Rows) -> dict[str, dict[str, Any]]:
    """The last outcome of every test."""
    return {row["test"]: row for row in of(found, "test")}


def slug(found: Rows) -> str:
    """The name of the page: of the card."""
    facts = (of(found, "facts") or [{}])[-1]
    text = "rehearsal" if facts.get("rehearsal") else facts.get("card", "unknown")
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def number(value: Any, form: str = ".3g") -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else format(value, form)


def render(found: Rows) -> str:
    facts: dict[str, Any] = (of(found, "facts") or [{}])[-1]
    title = "rehearsal" if facts.get("rehearsal") else facts.get("card", "no card")
    lines = [f"# GPU day: {title}", "", f"Rendered from {len(found)} results by `make gpu-day`.", ""]
    lines += [REHEARSAL] if facts.get("rehearsal") else []
    if not of(found, "end"):
        lines += ["**Cut off**: the day did not come to its end; what is below is all there is.", ""]
    lines += table(("fact", ""), [(name, facts[name]) for name in FACTS if facts.get(name) not in (None, "")])
    if missing := facts.get("missing"):
        lines += ["Missing:", *(f"- {name}: {why}" for name, why in missing.items()), ""]
    for part in (_tests, _sanitizers, _benchmarks, _steps):
        lines += part(found)
    return "\n".join(lines).rstrip() + "\n"


def _tests(found: Rows) -> list[str]:
    last = tests(found)
    if not last:
        return ["## Tests", "", "None ran.", ""]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in last.values():
        counts[row["part"]][row["outcome"]] += 1
    columns = ("passed", *BAD, "skipped")
    body = [(part, *(count[c] for c in columns)) for part, count in sorted(counts.items())]
    lines = [
        "## Tests",
        "",
        *table(("part", *columns), [*body, ("all", *(sum(r[i] for r in body) for i in range(1, 6)))]),
    ]
    failures = [row for row in last.values() if row["outcome"] in BAD]
    for row in failures[:MOST_FAILURES]:
        why = (row["why"].strip().splitlines() or [""])[-1][:240]
        lines.append(f"- {row['outcome']}: `{row['test']}`: {why}")
    lines += [f"- and {len(failures) - MOST_FAILURES} more"] * (len(failures) > MOST_FAILURES)
    reasons = collections.Counter(
        row["why"].removeprefix("Skipped: ") for row in last.values() if row["outcome"] == "skipped"
    )
    lines += ["", "Skipped:", *(f"- {n}: {why[:200]}" for why, n in reasons.most_common(20))] if reasons else []
    return [*lines, ""]


def _sanitizers(found: Rows) -> list[str]:
    ran = of(found, "sanitizer")
    if not ran:
        return ["## compute-sanitizer", "", "Did not run.", ""]
    body = [(r["tool"], r["calls"], len(r["failed"]), r["code"], r["summary"]) for r in ran]
    lines = ["## compute-sanitizer", "", *table(("tool", "calls", "failed", "exit status", "summary"), body)]
    return [*lines, *(f"- {r['tool']}: {text[:240]}" for r in ran for text in r["failed"]), ""]


def _benchmarks(found: Rows) -> list[str]:
    groups: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in of(found, "bench"):
        groups[row["group"]].append(row)
    if not groups:
        return ["## Benchmarks", "", "None ran.", ""]
    lines = ["## Benchmarks", "", TIMES, ""]
    for group, of_group in groups.items():
        ceilings = next((r for r in of_group if r["case"] == "ceilings"), {})
        lines += [f"### {group}", "", f"copy {number(ceilings.get('copy_gb_per_s'))} GB/s, bf16 product "
                  f"{number(ceilings.get('bf16_tflops'))} TFLOP/s", ""]  # fmt: skip
        body: list[Sequence[object]] = []
        absent = []
        for row in of_group:
            if "error" in row:
                absent.append(f"- {row['case']}, {row.get('way', '')}: {row['error']}")
            for phase in [p for p in ("forward", "both") if p in row]:
                t = row[phase]
                body.append((
                    row["case"], row["way"], _products(row), phase, number(t["device_us"], ".1f"),
                    f"{t['p20_us']:.1f} to {t['p80_us']:.1f}", number(t["stream_us"], ".1f"),
                    number(t["graph_us"], ".1f"), f"{t['share_of_copy']:.0%}" if t["gb_per_s"] else "",
                    f"{t['share_of_product']:.0%}" if t["tflops"] else "",
                    number(row["error_output"] if phase == "forward" else row["error_gradients"], ".1e"),
                    number((row["peak_bytes"] or 0) / 2**20, ".0f") if phase == "both" else "",
                ))  # fmt: skip
        header = ("case", "way", "float32 as", "phase", "device", "p20 to p80", "stream", "graph", "of copy",
                  "of product", "error against float64", "peak MiB")  # fmt: skip
        lines += [*table(header, body), *absent, ""]
    return lines


def _products(row: dict[str, Any]) -> str:
    """How float32 was multiplied."""
    return ("tf32" if row["tf32"] else "float32") if row["dtype"] == "float32" else "-"


def _steps(found: Rows) -> list[str]:
    body = [
        (r["name"], r["code"], r["seconds"], (r["tail"].strip().splitlines() or [""])[-1][:120])
        for r in of(found, "step")
    ]
    return ["## Steps", "", *table(("step", "exit status", "seconds", "last line where it failed"), body)]


def verdict(found: Rows) -> int:
    """The exit status: 0 where everything ran, and nothing was wrong."""
    failed = any(row["outcome"] in BAD for row in tests(found).values())
    unclean = any(row["code"] != 0 for row in of(found, "sanitizer"))
    ended = of(found, "end")
    return int(failed or unclean or not ended or not ended[-1]["complete"])


def write(results: pathlib.Path, folder: pathlib.Path) -> None:
    found = rows(results)
    page = folder / f"{slug(found)}.md"
    temporary = page.with_suffix(".tmp")
    temporary.write_text(render(found))
    os.replace(temporary, page)


if __name__ == "__main__":
    print(render(rows(sys.argv[1])), end="")
