"""The interface of a tracker."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from fastpeft.runs.events import Event
from fastpeft.trackers.scalars import Row


class Tracker(ABC):
    """What receives a run, in a process of its own. Every method may raise; the process then ends.

    Args:
        folder: the run's folder.
        settings: what `settings` returned, as keyword arguments.
    """

    switches: ClassVar[str] = ""
    """What else than a run's own section can switch it off, for a message."""

    @abstractmethod
    def __init__(self, folder: Path, **settings: str) -> None: ...

    @classmethod
    def settings(cls, section: Any, say: Callable[[str], None]) -> dict[str, str] | None:
        """Called in the trainer's process, which is to stay light: what the tracker's own is started with.

        Args:
            section: the tracker's own section of the run, which is switched on.
            say: is told when the run goes without this tracker though nobody switched it off.

        Returns:
            None: the run goes without it.

        Raises:
            UserError: it cannot be had.
        """
        return {}

    @abstractmethod
    def start(self) -> str:
        """Returns a line for the user: where the run can be seen."""

    def describe(self, event: Event) -> None:
        """A `run` event: settings and budget."""

    @abstractmethod
    def add(self, row: Row) -> None: ...

    def caught_up(self) -> None:
        """Called once, when all that the log held at the start has been added."""

    def finish(self, end: Event | None) -> None:
        """`end` is the log's end event, if it has one: None when the trainer was killed."""


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name is no package: W&B makes them
