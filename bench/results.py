"""Reading pytest-benchmark's JSON: the rows that the benchmarks left in `extra_info`, and the machine."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import torch

Row = dict[str, Any]


def load(paths: Iterable[str | pathlib.Path]) -> tuple[list[dict[str, Any]], list[Row]]:
    """(one dict of facts per file, all rows in the files' order). A later file's row replaces an equal earlier one."""
    facts, rows = [], {}
    for path in map(pathlib.Path, paths):
        try:
            data = json.loads(path.read_text())
            machine, commit, benchmarks = data["machine_info"], data.get("commit_info") or {}, data["benchmarks"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is not a result of pytest-benchmark: {type(error).__name__}: {error}") from None
        facts.append({**machine.get("dnl", {}), "commit": commit.get("id", "unknown")[:10],
                      "dirty": commit.get("dirty", False), "date": data.get("datetime", "")[:10]})  # fmt: skip
        for benchmark in benchmarks:
            if "operator" in (row := benchmark["extra_info"]):
                rows[key(row)] = row
    return facts, list(rows.values())


def key(row: Row) -> tuple[str, ...]:
    """What makes two rows the same measurement."""
    return tuple(str(row.get(name, "")) for name in ("operator", "case", "dtype", "device", "threads"))


def phases(row: Row) -> list[str]:
    """The phases that were timed."""
    return [phase for phase in ("forward", "backward", "both") if phase in row["ways"].get("ours", {})]


def strongest(row: Row, phase: str) -> str | None:
    """The fastest peer that computes the same function, as exactly as its dtype does."""
    least = 8 * torch.finfo(getattr(torch, row["dtype"])).eps
    peers = {name: way[phase]["median"] for name, way in row["ways"].items()
             if name != "ours" and way["error"] is not None and way["error"] <= max(least, 1e-3)}  # fmt: skip
    return min(peers, key=lambda name: peers[name]) if peers else None
