"""What Ctrl-C does during imports and long work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def ctrl_c_ends_at_once() -> Any:
    """For the import of torch, in which a KeyboardInterrupt becomes an ImportError or aborts the process."""
    return handled(signal.SIGINT, lambda number, frame: os._exit(128 + number))


@contextmanager
def ctrl_c_asks() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C only sets a request. Yields a function that returns whether there was one."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True

    with handled(signal.SIGINT, ask):
        yield lambda: asked
