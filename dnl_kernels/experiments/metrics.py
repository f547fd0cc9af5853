"""metrics.jsonl: one line for the sweep (settings, seed, versions), then one per epoch of each run.

The checkpoints hold the truth; the file is a view of them that is written anew when a sweep starts, resumes or ends,
so that neither a half line nor a line twice survives a kill.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from . import checkpoint
from .errors import UsageError

NAME = "metrics.jsonl"


def line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def rewrite(path: pathlib.Path, header: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
    """The header, then the records ordered by depth, repeat and epoch."""
    ordered = sorted(records, key=lambda r: (r["depth"], r["repeat"], r["epoch"]))
    checkpoint.write(path, "".join(map(line, [header, *ordered])).encode())


def append(path: pathlib.Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(line(record))


def read(path: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records; a last line that is still being written is left out."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        header, *records = [json.loads(text) for text in lines if text.endswith("\n")]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); expected the --out folder of dnl train") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a metrics file of dnl train: {error}") from error
    return header, records
