"""What a run is busy with before its first step has ended, said by whoever does the work.

Reading, loading, tokenising and calibrating may each take minutes. They call `begin` and `progress`; `told_to` names
who hears of it, and where nobody does nothing happens. No step calls anything of this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

EVERY_S = 0.5
"""Between two tellings of one phase's progress, at least."""

Tell = Callable[..., None]
"""Takes the fields of a `phase` event: name and text, and of progress also done, total and unit."""


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
    """`tell` hears of what is begun inside, in this thread."""
    token = _current.set(_Current(tell))
    try:
        yield
    finally:
        _current.reset(token)


def begin(name: str, text: str) -> None:
    """A new phase: `name` for programs, such as `tokenise`, and `text` for the user."""
    current = _current.get()
    if current is not None:
        current.name, current.text = name, text
        current.say()


def progress(done: int, total: int, unit: str) -> None:
    """How far the phase is. Told every EVERY_S at most, so that it may be called for every row."""
    current = _current.get()
    if current is not None and current.name and time.monotonic() - current.told_at >= EVERY_S:
        current.say(done=done, total=total, unit=unit)
