"""What the user sees while a sweep runs: a bar for the sweep, one for the epoch, and a line for each finished run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .config import Config
from .errors import require
from .run import Record, Watch


class Screen(Watch):
    """Progress on a terminal; elsewhere (a log file, a pipe) only the lines of finished runs."""

    def __init__(self, config: Config, console: Any, epochs_done: int = 0):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.config, self.console = config, console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        total = len(config.depths) * config.repeats * config.epochs
        self.sweep = self.progress.add_task("epochs of the sweep", total=total, completed=epochs_done, facts="")
        self.current = self.progress.add_task("", total=None, facts="")

    @contextlib.contextmanager
    def shown(self) -> Iterator[Screen]:
        if not self.console.is_terminal:
            yield self
            return
        with self.progress:
            yield self

    def begin(self, depth: int, repeat: int, epoch: int) -> None:
        name = f"L = {depth}, repeat {repeat + 1}/{self.config.repeats}, epoch {epoch}/{self.config.epochs}"
        self.progress.reset(self.current, total=None, description=name, facts="")

    def step(self, done: int, steps: int, loss: float, rate: float) -> None:
        facts = f"loss {loss:.4f}  {rate:,.0f} images/s"
        self.progress.update(self.current, completed=done, total=steps, facts=facts)

    def epoch(self, record: Record) -> None:
        self.progress.advance(self.sweep)
        if record["epoch"] == self.config.epochs:
            self.say(
                f"L = {record['depth']:<3} repeat {record['repeat'] + 1}/{self.config.repeats}: "
                f"training loss {record['train_loss']:.4f} after {record['epoch']} epochs, "
                f"{record['images_per_second']:,.0f} images/s"
            )

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def console() -> Any:
    """rich's console on the standard output; a file gets lines as wide as they need."""
    found = require("rich.console").Console()
    return found if found.is_terminal else require("rich.console").Console(width=120)
