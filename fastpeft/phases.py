"""Progress of a run's set-up and first step, reported by the code that does the work.

Reading, loading, tokenising and calibrating may each take minutes. They call `begin` and `progress`. `told_to` sets the
callback that receives the reports; without one the calls do nothing. No later step calls this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

EVERY_S = 0.5
"""Least seconds between two progress reports of a phase."""

Tell = Callable[..., None]
"""Takes the fields of a `phase` event as keywords: name and text; for progress also done, total and unit."""


@dataclass
class _Current:
    tell: Tell
    name: str = ""
    text: str = ""
    told_at: float = 0.0

    def say(self, **figures: Any) -> None:
        self.told_at = time.monotonic()
        self.tell(name=self.name, text=self.text, **figures)


_current: ContextVar[_Current | None] = ContextVar("phase", default=None)


@contextmanager
def told_to(tell: Tell) -> Iterator[None]:
    """Send the reports of phases begun inside, in this thread, to `tell`."""
    token = _current.set(_Current(tell))
    try:
        yield
    finally:
        _current.reset(token)


def begin(name: str, text: str) -> None:
    """Begin a phase: `name` for programs, such as `tokenise`, and `text` for the user."""
    current = _current.get()
    if current is not None:
        current.name, current.text = name, text
        current.say()


def progress(done: int, total: int, unit: str) -> None:
    """Report how far the phase is. At most one report every EVERY_S is passed on, so a call for every row is cheap."""
    current = _current.get()
    if current is not None and current.name and time.monotonic() - current.told_at >= EVERY_S:
        current.say(done=done, total=total, unit=unit)
