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
    """Receives a run's rows, in its own process. Every method may raise, which ends the process.

    Args:
        folder: the run's folder.
        settings: the keyword arguments that `settings` returned.
    """

    switches: ClassVar[str] = ""
    """What can disable it besides a run's own section, for a message."""

    @abstractmethod
    def __init__(self, folder: Path, **settings: str) -> None: ...

    @classmethod
    def settings(cls, section: Any, say: Callable[[str], None]) -> dict[str, str] | None:
        """Settings for the tracker's process. Called in the trainer's process, so it must not import much.

        Args:
            section: the tracker's own section of the run, which is enabled.
            say: called if the run goes without this tracker although nobody disabled it.

        Returns:
            Keyword arguments of the class, as strings; None if the run goes without the tracker.

        Raises:
            UserError: the tracker is unavailable.
        """
        return {}

    @abstractmethod
    def start(self) -> str:
        """Open the run. Returns a line for the user that says where it can be seen."""

    def describe(self, event: Event) -> None:
        """Receive a `run` event: settings and budget."""

    @abstractmethod
    def add(self, row: Row) -> None: ...

    def caught_up(self) -> None:
        """Called once, when all rows that the log held at the start have been added."""

    def finish(self, end: Event | None) -> None:
        """Close the run. `end` is the log's end event; None if the trainer was killed."""


def is_installed(package: str) -> bool:
    """Whether a package can be imported; does not import it."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name, as W&B makes, is no package
