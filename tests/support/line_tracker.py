"""A tracker from outside the package, in a module without torch, because a process of its own imports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.runs.events import Event
from fastpeft.trackers.scalars import Row
from fastpeft.trackers.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class LineConfig:
    """Losses as lines of a file."""

    enabled: bool = False
    file: str = "lines.txt"
    """Name of the file in the run's folder."""


class LineTracker(Tracker):
    def __init__(self, folder: Path, *, file: str) -> None:
        self._path = folder / file
        self._lines: list[str] = []

    @classmethod
    def settings(cls, section: LineConfig, say: Callable[[str], None]) -> dict[str, str]:
        return {"file": section.file}

    def start(self) -> str:
        return f"lines: {self._path.name}"

    def add(self, row: Row) -> None:
        loss: Any = row.values.get("train/loss")
        if loss is not None:
            self._lines.append(f"{row.step} {loss}\n")

    def finish(self, end: Event | None) -> None:
        self._path.write_text("".join(self._lines))
