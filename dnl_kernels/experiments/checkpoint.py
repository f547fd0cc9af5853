"""Checkpoints that a kill at any moment cannot spoil: written aside, moved into place, verified when read."""

from __future__ import annotations

import io
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from .errors import Stopped

KEPT = 2  # the newest, and one to fall back to


def stored(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(folder.glob("epoch-*.pt"), reverse=True)


def save(folder: pathlib.Path, epoch: int, state: dict[str, Any]) -> pathlib.Path:
    """Stores `state` as the checkpoint of `epoch` and drops all but the newest ones.

    Raises:
        Stopped: it cannot be written (a full disk, say); the checkpoints before it are untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / f"epoch-{epoch:05d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(path, buffer.getbuffer())
    except OSError as error:
        last = next(iter(stored(folder)), None)
        raise Stopped(f"cannot write {path} ({error.strerror or error}); last good checkpoint: {last}") from error
    for old in stored(folder)[KEPT:]:
        old.unlink()
    return path


def write(path: pathlib.Path, content: bytes | memoryview) -> None:
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


def latest(folder: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None. `say` is told of each damaged one that was passed over."""
    for path in stored(folder):
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                if damaged := archive.testzip():
                    raise ValueError(f"checksum of {damaged} is wrong")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file leads the readers to
            say(f"{path} is damaged ({error}); falling back to the checkpoint before it")
    return None
