"""Checkpoints that a kill at any moment cannot spoil: written aside, moved into place, verified when read.

A checkpoint is a folder: the tensors as torch.distributed.checkpoint stores them, each rank its own part, so that any
number of ranks can read them back; run.json with what is known of the run; and SHA256SUMS, in the format of sha256sum,
over both. Several machines need a file system that they share.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from .errors import Stopped
from .ranks import Ranks

KEPT = 2  # the newest, and one to fall back to
FACTS, SUMS = "run.json", "SHA256SUMS"

Tensors = dict[str, Any]  # nested, as dcp takes it


class Found(NamedTuple):
    """A whole checkpoint: where its tensors are, and the facts stored with them."""

    path: pathlib.Path
    facts: dict[str, Any]


def stored(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(folder.glob("epoch-*"), reverse=True)


def save(folder: pathlib.Path, epoch: int, tensors: Tensors, facts: dict[str, Any], ranks: Ranks) -> None:
    """Stores the checkpoint of `epoch` and drops all but the newest ones. Every rank calls it; sharded tensors
    (DTensor) are gathered from all, others are taken from one.

    Raises:
        Stopped: it cannot be written (a full disk, say); the checkpoints before it are untouched.
    """
    path = folder / f"epoch-{epoch:05d}"
    partial = folder / f".{path.name}.partial"
    try:
        if ranks.main:  # no other rank writes before dcp has heard from this one
            for stale in folder.glob(".epoch-*"):  # of a run that was killed
                shutil.rmtree(stale)
            partial.mkdir(parents=True, exist_ok=True)
        collective(dcp.save, tensors, checkpoint_id=partial, no_dist=ranks.size == 1)
        if ranks.main:
            write(partial / FACTS, json.dumps(facts, allow_nan=False).encode())
            write(partial / SUMS, sums(partial).encode())
            drop(path)  # there only where it was damaged and its epoch has been trained anew
            os.replace(partial, path)
            for old in stored(folder)[KEPT:]:
                drop(old)
    except (OSError, RuntimeError) as error:  # torch's own writer turns the first into the second
        shutil.rmtree(partial, ignore_errors=True)
        last = next(iter(stored(folder)), None)
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise Stopped(f"cannot write {path} ({why}); last good checkpoint: {last}") from error


def collective(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    """A function of dcp, whose CheckpointException hides what went wrong, and a Ctrl-C too."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no_dist says it already
            function(*args, **options)
    except CheckpointException as found:
        error = next(iter(found.failures.values()))[0]
        raise error from None


def sums(folder: pathlib.Path) -> str:
    """The lines of SHA256SUMS for what is in `folder`."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def drop(path: pathlib.Path) -> None:
    """Removes a checkpoint; it never stands there in part."""
    if path.exists():
        aside = path.with_name(f".{path.name}.dropped")
        os.replace(path, aside)
        shutil.rmtree(aside)


def write(path: pathlib.Path, content: bytes) -> None:
    """`path` holds its old content or all of the new one, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def latest(folder: pathlib.Path, say: Callable[[str], None]) -> Found | None:
    """The newest checkpoint that is whole, or None. `say` is told of each damaged one that was passed over."""
    for path in stored(folder):
        try:
            listed, there = ((path / SUMS).read_text(), sums(path))
            if listed != there:
                damaged = {line.split()[-1] for line in {*listed.splitlines()} ^ {*there.splitlines()} if line}
                raise ValueError(f"checksum of {', '.join(sorted(damaged))} is wrong")
            return Found(path, json.loads((path / FACTS).read_text()))
        except (OSError, ValueError) as error:
            say(f"{path} is damaged ({error}); falling back to the checkpoint before it")
    return None


def load(path: pathlib.Path, tensors: Tensors, ranks: Ranks) -> None:
    """Fills `tensors`, laid out as this number of ranks has them, from the checkpoint at `path`."""
    collective(dcp.load, tensors, checkpoint_id=path, no_dist=ranks.size == 1)
