"""How a command ends other than well: one clear line, and the exit code that goes with it."""

from __future__ import annotations

import importlib
from typing import Any


class UsageError(Exception):
    """The command cannot run as it was asked to: exit code 2."""


class Stopped(Exception):
    """The run began and had to stop: exit code 1."""


def require(module: str, extra: str = "experiments") -> Any:
    """The module, imported now; where it is not installed, an error that names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise UsageError(f"{missing} is not installed; pip install 'dnl_kernels[{extra}]' brings it") from error
