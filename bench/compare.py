"""`python -m bench.compare OLD NEW`: what became slower beyond noise. Exit status 1 if anything did.

Machines and their neighbours differ, so a case is judged by its ratio to the eager way measured beside it (its first
peer). A regression is a ratio that fell by more than `--tolerance`, while the p20..p80 ranges do not explain it.
"""

from __future__ import annotations

import argparse
import sys

from bench import results


def ratio(row: results.Row, phase: str) -> tuple[float, float, float] | None:
    """(median, low, high) of peer time / our time; low and high from the quantiles against us and for us."""
    peer = next((name for name in row["ways"] if name != "ours" and phase in row["ways"][name]), None)
    if peer is None:
        return None
    ours, other = row["ways"]["ours"][phase], row["ways"][peer][phase]
    return other["median"] / ours["median"], other["p20"] / ours["p80"], other["p80"] / ours["p20"]


def regressions(old: list[results.Row], new: list[results.Row], tolerance: float) -> list[str]:
    """One line for each case and phase that got worse, and for each that no longer passes its check."""
    before, found = {results.key(row): row for row in old}, []
    for row in new:
        name = f"{row['operator']} {row['case']}"
        if "check" in row and not row["check"]["passed"]:
            found.append(f"{name}: the correctness check fails")
        if row["operator"] == "scaling" or results.key(row) not in before:
            continue
        for phase in results.phases(row):
            was, now = ratio(before[results.key(row)], phase), ratio(row, phase)
            if was and now and now[0] < was[0] * (1 - tolerance) and now[2] < was[1]:
                found.append(f"{name} {phase}: {was[0]:.2f}x of its peer before, {now[0]:.2f}x now")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--tolerance", type=float, default=0.1, help="a fall of this share is still noise")
    options = parser.parse_args(arguments)
    if not 0 <= options.tolerance < 1:
        parser.error(f"--tolerance is {options.tolerance}; expected a number in [0, 1)")
    (_, old), (_, new) = results.load([options.old]), results.load([options.new])
    shared = {results.key(row) for row in old} & {results.key(row) for row in new}
    found = regressions(old, new, options.tolerance)
    print("\n".join(found) if found else f"no regression in {len(shared)} cases")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
