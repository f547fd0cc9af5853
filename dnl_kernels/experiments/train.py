"""`dnl train`: the sweep over depths and repeats, its files, and what is said about it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import pathlib
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import __version__
from . import config as settings
from . import data, metrics, report
from .config import Config
from .errors import Stopped, UsageError, require
from .ranks import Ranks, joined, restarts
from .run import Record, Run, Watch, begun, folder_of, restore
from .screen import Screen, console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings.add_arguments(parser)
    parser.add_argument("--out", default="out/train", metavar="DIR", help="folder for metrics, checkpoints and figure")
    parser.add_argument("--resume", action="store_true", help="continue what is in --out, from its last checkpoints")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that share the runs (joblib)")
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard as well, into --out")


def run(args: argparse.Namespace) -> int:
    config = settings.from_arguments(args)
    out = pathlib.Path(args.out)
    require("matplotlib")  # before the hours of training, not after them
    try:
        with threads(config.threads), joined(config.device) as ranks, deterministic(config.device):
            if args.workers < 1 or (args.workers > 1 and (ranks.size > 1 or config.device != "cpu")):
                raise UsageError(
                    f"--workers is {args.workers}; expected a number >= 1, and 1 on a GPU or under torchrun"
                )
            resume = args.resume or restarts() > 0
            sweep(config, out, ranks, resume=resume, workers=args.workers, tensorboard=args.tensorboard)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command with --resume continues from the last epoch") from None
    except OSError as error:  # checkpoints have their own message; this is metrics or figure
        raise Stopped(f"cannot write into {out}: {error}") from error
    return 0


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def deterministic(device: str) -> Iterator[None]:
    """On a GPU: kernels whose result does not vary from run to run. Those of the CPU do not in any case."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    if device == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


def sweep(
    config: Config,
    out: pathlib.Path,
    ranks: Ranks,
    *,
    resume: bool = False,
    workers: int = 1,
    tensorboard: bool = False,
) -> None:
    """Trains every (repeat, depth) that is not finished, and reports all of them in `out` and on the screen."""
    if config.batch_size < 2 * ranks.size:
        raise UsageError(
            f"--batch-size is {config.batch_size}; expected at least two images for each of {ranks.size} ranks"
        )
    images = data.load(config.dataset, "train", config.data, config.limit).to(ranks.device)
    test = data.load(config.dataset, "test", config.data).to(ranks.device) if config.evaluate else None
    header = describe(config, ranks, images)
    done: dict[tuple[int, int], list[Record]] = {}
    if ranks.main:
        claim(out, config, resume)
        done = finished(config, out)
        metrics.rewrite(out / metrics.NAME, header, itertools.chain(*done.values()))
    done = ranks.from_main(done)
    # Repeats outside: a sweep that is stopped early has seen all depths.
    todo = [(depth, repeat) for repeat in range(config.repeats) for depth in config.depths]
    epochs_done = sum(min(len(done.get(one, ())), config.epochs) for one in todo)
    todo = [one for one in todo if len(done.get(one, ())) < config.epochs]
    with Log(config, out, epochs_done, tensorboard).shown() if ranks.main else contextlib.nullcontext(Watch()) as watch:
        watch.say(summary(config, images, ranks))
        if workers == 1:
            for one in todo:
                done[one] = Run(config, *one, out, ranks, watch, images, test).train()
        else:
            for one, history in spread(config, todo, out, workers):
                for record in history[len(done.get(one, ())) :]:
                    watch.epoch(record)
                done[one] = history
    if ranks.main:
        metrics.rewrite(out / metrics.NAME, header, itertools.chain(*done.values()))
        report.publish([out], out / "loss.png", console())


class Printed(Watch):
    """Of a worker, whose progress nobody sees: only what the user should know."""

    def say(self, text: str) -> None:
        print(text, flush=True)


def work(config: Config, depth: int, repeat: int, out: pathlib.Path) -> tuple[tuple[int, int], list[Record]]:
    """One run of the sweep, in a process of its own."""
    with threads(config.threads):
        images = data.load(config.dataset, "train", config.data, config.limit)
        test = data.load(config.dataset, "test", config.data) if config.evaluate else None
        alone = Ranks(torch.device(config.device))
        return (depth, repeat), Run(config, depth, repeat, out, alone, Printed(), images, test).train()


def spread(
    config: Config, todo: Sequence[tuple[int, int]], out: pathlib.Path, workers: int
) -> Iterator[tuple[tuple[int, int], list[Record]]]:
    """The runs of `todo` shared by processes that split the cores, deepest first; each as it ends."""
    joblib = require("joblib")
    share = config.threads or max(1, torch.get_num_threads() // workers)
    config = dataclasses.replace(config, threads=share)
    jobs = (joblib.delayed(work)(config, *one, out) for one in sorted(todo, reverse=True))
    yield from joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(jobs)


class Log(Screen):
    """The screen, and the metrics file (and TensorBoard, where asked for) beside it."""

    def __init__(self, config: Config, out: pathlib.Path, epochs_done: int, tensorboard: bool):
        super().__init__(config, console(), epochs_done)
        self.path = out / metrics.NAME
        self.board = require("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(out)) if tensorboard else None

    def epoch(self, record: Record) -> None:
        metrics.append(self.path, record)
        if self.board is not None:
            for name in ("train_loss", "test_loss", "test_accuracy", "images_per_second"):
                if name in record:
                    self.board.add_scalar(
                        f"{name}/L{record['depth']}-repeat{record['repeat']}", record[name], record["epoch"]
                    )
            self.board.flush()
        super().epoch(record)


def claim(out: pathlib.Path, config: Config, resume: bool) -> None:
    """Makes the folder; where a sweep is in it already, that must be asked for and be of the same settings."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be made: {error.strerror}") from error
    path = out / metrics.NAME
    if not resume and (path.exists() or begun(out)):
        raise UsageError(f"{out} holds a sweep already; --resume continues it, another --out leaves it alone")
    if path.exists():
        config.check_same(metrics.read(path)[0].get("config", {}), out)


def finished(config: Config, out: pathlib.Path) -> dict[tuple[int, int], list[Record]]:
    """The epochs that the checkpoints in `out` hold, for each (depth, repeat), asked for now or before."""
    found = {}
    for depth, repeat in begun(out):
        if whole := restore(config, folder_of(out, depth, repeat), Watch()):
            found[depth, repeat] = whole.facts["history"]
    return found


def describe(config: Config, ranks: Ranks, images: data.Images) -> dict[str, Any]:
    """The first line of metrics.jsonl: what was run, with what, on what."""
    cuda = ranks.device.type == "cuda"
    return {
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "versions": {"dnl_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name(ranks.device) if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
        "images": len(images.labels),
    }


def summary(config: Config, images: data.Images, ranks: Ranks) -> str:
    count, *shape = images.images.shape
    several = f", {ranks.size} ranks" if ranks.size > 1 else ""
    return (
        f"{config.dataset}: {count:,} images of {' x '.join(map(str, shape))}; "
        f"L = {', '.join(map(str, config.depths))}; {config.repeats} repeats of {config.epochs} epochs "
        f"on {ranks.device}{several}"
    )
