"""The dispatcher of the `dnl` command. A command is a module with add_arguments(parser) and run(args) -> exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from .errors import Stopped, UsageError

# name: (module, what it does). A module is imported when its command is asked for.
COMMANDS = {
    "train": ("dnl_kernels.experiments.train", "train the paper's network for growing depths and compare the losses"),
    "report": ("dnl_kernels.experiments.report", "figure and table of finished or running sweeps"),
    "converge": ("dnl_kernels.experiments.converge", "measure the convergence to the continuous-depth model"),
    "info": ("dnl_kernels.experiments.about", "versions, build facts, and every backend with why it is unavailable"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def overview() -> str:
    lines = [f"  {name:<10}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "usage: dnl COMMAND ...\n\n" + "\n".join(lines) + "\n\n`dnl COMMAND --help` lists a command's options."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0: done. 1: stopped on the way. 2: cannot run as asked. 130: interrupted (Ctrl-C)."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help", "--version"):
        print(__version__ if name == "--version" else overview())
        return 0
    prog = f"dnl {name}" if name in COMMANDS else "dnl"
    try:
        return dispatch(name, rest)
    except (UsageError, Stopped) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as interrupt:
        print("; ".join([f"{prog}: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as in `dnl report DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def dispatch(name: str, rest: Sequence[str]) -> int:
    if name not in COMMANDS:
        raise UsageError(f"{name!r} is not a command; expected one of {', '.join(COMMANDS)}")
    module, purpose = COMMANDS[name]
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise UsageError("this installation has no such command yet") from error
    parser = Parser(prog=f"dnl {name}", description=purpose, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_arguments(parser)
    try:
        args = parser.parse_args(rest)
    except SystemExit:  # --help
        return 0
    return command.run(args)
