"""What the screens know of the program: the runs it read, their logs, its trainers, the ways to other screens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from textual.app import App
from textual.filter import LineFilter

from fastpeft.tui.contrast import Contrast
from fastpeft.tui.picture import in_cells
from fastpeft.tui.runs_index import RunRow
from fastpeft.tui.steer import Launch
from fastpeft.tui.tail import RunTail

MAX_TAILS = 12
"""Logs kept open, so that a run that is looked at again is not read again."""


class RunsApp(App[None]):
    """The state that screens share. The program itself adds the screens, and keeps the state fresh."""

    def __init__(self, results_dir: Path, launch: Launch | None = None) -> None:
        super().__init__()
        self.results_dir = Path(results_dir)
        self.rows: list[RunRow] = []
        self.marked: dict[str, None] = {}
        """Names, in the order in which they were marked."""
        self.launches: list[Launch] = [] if launch is None else [launch]
        self._tails: dict[Path, RunTail] = {}
        self._wanted = asyncio.Event()
        self._contrast = Contrast()

    # ---- how it looks ----------------------------------------------------------------------

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), self._contrast]

    def export_screenshot(self, *, title: str | None = None, simplify: bool = False) -> str:
        """As an SVG that looks alike in every viewer."""
        return in_cells(super().export_screenshot(title=title, simplify=simplify))

    # ---- what the screens share ------------------------------------------------------------

    @property
    def is_exiting(self) -> bool:
        return self._exit

    def tail(self, name: str) -> RunTail:
        """The log of a run. The same one as before, so that nothing is read twice."""
        path = self.results_dir / name / "events.jsonl"
        tail = self._tails.pop(path, None) or RunTail(path)
        self._tails[path] = tail
        while len(self._tails) > MAX_TAILS:
            self._tails.pop(next(iter(self._tails)))
        return tail

    def read_soon(self) -> None:
        """Read the list of runs again now."""
        self._wanted.set()

    def watch_launch(self, launch: Launch) -> None:
        self.launches = [*self.launches, launch]
        self.read_soon()

    @property
    def starting(self) -> list[Launch]:
        """Trainers that have no run folder yet."""
        return [launch for launch in self.launches if launch.output.parent != launch.folder]

    # ---- other screens ---------------------------------------------------------------------

    def open_run(self, name: str) -> None:
        raise NotImplementedError

    def compare(self, names: list[str]) -> None:
        raise NotImplementedError

    def start_run(self, preset: str = "") -> object:
        """Ask what to train, and start it."""
        raise NotImplementedError
