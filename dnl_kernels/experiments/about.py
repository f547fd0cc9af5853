"""`dnl info`: the facts of dnl_kernels.info."""

from __future__ import annotations

import argparse

from .. import info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> int:
    info.main()
    return 0
