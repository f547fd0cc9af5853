"""A Ctrl-C that does not get lost.

Python raises KeyboardInterrupt wherever the program happens to be. Inside a destructor or another callback of the
interpreter it is printed and forgotten, and a run of hours goes on. So it is remembered as well, and asked for at every
step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_signals: list[int] = []  # no Event: its lock would not bear a second signal in its `set`


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Within: SIGINT raises KeyboardInterrupt at once, as ever, and `check` does so later. A handler of the caller's
    own stays, and so does what other threads do."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _: object) -> None:
        _signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _signals.clear()


def check() -> None:
    """Raises KeyboardInterrupt if there was one."""
    if _signals:
        raise KeyboardInterrupt
