"""The clock, the file of results, and steps: processes with a limit."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = "DNL_DAY_RESULTS"  # the file that steps append their own lines to
ASKED_SECONDS = 1.0  # of the wall's clock, between asking a process to end and ending it
SHORTEST = 2.0  # seconds that are worth starting a step for


class Ended(NamedTuple):
    """code: of the process, 124 at its limit, None where no time was left to start it."""

    code: int | None
    text: str


def append(path: str | os.PathLike[str], **fields: Any) -> None:
    """One line, in one write: processes append to the same file."""
    line = json.dumps({"at": round(time.time(), 2), **fields}) + "\n"
    with open(path, "a") as file:
        file.write(line)


def rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What the file has so far; a line that a killed process left unfinished is left out."""
    found = []
    if os.path.exists(path):
        for line in pathlib.Path(path).read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


class Day:
    """seconds: in all. speed: how much faster than the wall's the day's clock runs; a rehearsal has less time."""

    def __init__(
        self, out: pathlib.Path, seconds: float, speed: float = 1.0, clock: Callable[[], float] = time.monotonic
    ):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.seconds, self.speed, self.clock = out, seconds, speed, clock
        self.results, self.began, self.lock = out / "results.jsonl", clock(), threading.Lock()
        self.running: list[subprocess.Popen[Any]] = []
        self.environment = {
            **os.environ,
            RESULTS: str(self.results),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "DNL_JIT": "0",
        }

    def elapsed(self) -> float:
        return (self.clock() - self.began) * self.speed

    def left(self) -> float:
        return self.seconds - self.elapsed()

    def write(self, kind: str, **fields: Any) -> None:
        append(self.results, kind=kind, t=round(self.elapsed(), 1), **fields)

    def step(
        self,
        name: str,
        command: Sequence[str],
        limit: float,
        reserve: float = 0.0,
        env: Mapping[str, str] | None = None,
    ) -> Ended:
        """Runs the command for at most `limit` seconds of the day, and until `reserve` are left of it. The end of what
        it printed goes to log.txt."""
        limit, began = min(limit, self.left() - reserve), self.elapsed()
        if limit < SHORTEST:
            self.write("step", name=name, code=None, seconds=0.0, tail="no time was left")
            return Ended(None, "")
        environment = {**self.environment, **(env or {}), "DNL_DAY_SECONDS": f"{limit / self.speed}"}
        path = self.out / f"{name.replace('/', '-').replace(' ', '-')}.log"
        with open(path, "w+") as log:
            process = subprocess.Popen(
                list(command), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.running.append(process)
            try:
                code = process.wait(limit / self.speed)
            except subprocess.TimeoutExpired:
                code = 124
            finally:
                _end(process)
                self.running.remove(process)
            log.seek(0)
            text = log.read()
        path.unlink()
        with self.lock, open(self.out / "log.txt", "a") as file:
            file.write(f"\n===== {name}: code {code}, {self.elapsed() - began:.1f} s\n{text[-8000:]}\n")
        self.write(
            "step", name=name, code=code, seconds=round(self.elapsed() - began, 1), tail=text[-400:] if code else ""
        )
        return Ended(code, text)

    def abort(self) -> None:
        """Ends every step that runs: nothing stays on the card."""
        for process in list(self.running):
            _end(process)

    def module(self, name: str, module: str, *arguments: str, **options: Any) -> Ended:
        return self.step(name, [sys.executable, "-m", module, *arguments], **options)


def _end(process: subprocess.Popen[Any]) -> None:
    """The whole session of a step: what it started must not stay on the card. Asked first: a ninja that is killed
    leaves a log of its work that says less than was done."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(ASKED_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
