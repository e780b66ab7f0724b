"""What Ctrl-C does while something goes on."""

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
    """While torch is loaded: inside its imports a KeyboardInterrupt becomes an ImportError or aborts the process."""
    return handled(signal.SIGINT, lambda number, frame: os._exit(128 + number))


@contextmanager
def ctrl_c_asks() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is a request, which what is yielded tells of."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True

    with handled(signal.SIGINT, ask):
        yield lambda: asked
