"""The application as the screens see it: runs, their logs, started trainers, and the ways to other screens."""

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
"""Most logs kept open, so that a run shown again need not be read again."""


class RunsApp(App[None]):
    """The state that screens share. FastpeftApp adds the screens, and refreshes the state."""

    def __init__(self, results_dir: Path, launch: Launch | None = None) -> None:
        super().__init__()
        self.results_dir = Path(results_dir)
        self.rows: list[RunRow] = []
        self.marked: dict[str, None] = {}
        """Names of the marked runs, in marking order."""
        self.launches: list[Launch] = [] if launch is None else [launch]
        self._tails: dict[Path, RunTail] = {}
        self._wanted = asyncio.Event()
        self._contrast = Contrast()

    # ---- appearance ------------------------------------------------------------------------

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), self._contrast]

    def export_screenshot(self, *, title: str | None = None, simplify: bool = False) -> str:
        """An SVG that looks the same in every viewer."""
        return in_cells(super().export_screenshot(title=title, simplify=simplify))

    # ---- shared state ----------------------------------------------------------------------

    @property
    def is_exiting(self) -> bool:
        return self._exit

    def tail(self, name: str) -> RunTail:
        """The log of a run. Repeated calls return one object, so that nothing is read twice."""
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
