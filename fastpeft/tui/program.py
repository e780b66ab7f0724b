"""The application: it refreshes the list of runs, watches the trainers that it started, and owns the screens."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from fastpeft.tui.runs_app import RunsApp
from fastpeft.tui.runs_index import RunRow, RunsIndex
from fastpeft.tui.screens.compare_screen import CompareScreen
from fastpeft.tui.screens.dialogs import Help, Reading
from fastpeft.tui.screens.run_screen import RunScreen
from fastpeft.tui.screens.runs_screen import RunsScreen
from fastpeft.tui.screens.screen import RunsKeys
from fastpeft.tui.screens.start_screen import StartScreen
from fastpeft.tui.steer import Launch, left_behind
from fastpeft.tui.theme import THEMES

LIST_EVERY_S = 1.0


class FastpeftApp(RunsApp):
    """`fastpeft tui`."""

    TITLE = "fastpeft"
    CSS_PATH = "app.tcss"
    ENABLE_COMMAND_PALETTE = True
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-medium"), (170, "-wide")]  # noqa: RUF012 (typed by the toolkit)
    VERTICAL_BREAKPOINTS = [(0, "-short"), (34, "-tall"), (50, "-high")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit", id="app.quit"),
        Binding(
            "ctrl+z", "suspend_process", "Suspend", tooltip="To the shell; fg comes back", show=False, id="app.suspend"
        ),
        Binding("question_mark,f1", "help", "Help", key_display="?", id="app.help"),
    ]

    def __init__(self, results_dir: Path, launch: Launch | None = None) -> None:
        super().__init__(results_dir, launch)
        self.num_reads = 0
        """Number of times that the list of runs was read."""
        self._open_when_there = launch
        self._index = RunsIndex(self.results_dir)

    def on_mount(self) -> None:
        for theme in THEMES:
            self.register_theme(theme)
        if "TEXTUAL_THEME" not in os.environ:
            self.theme = THEMES[0].name
        if threading.current_thread() is threading.main_thread():  # else the terminal would stay as it is now
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.exit, None, 128 + signal.SIGTERM)
        self.push_screen(RunsScreen())
        self._watch()
        self._look_back()

    # ---- reading ---------------------------------------------------------------------------

    @work(group="watch")
    async def _watch(self) -> None:
        while True:
            self._wanted.clear()
            self.rows = await asyncio.to_thread(self._read)
            self.num_reads += 1
            self._tell_launches()
            for screen in self.screen_stack:
                if isinstance(screen, RunsKeys):
                    screen.rows_changed()
            try:
                await asyncio.wait_for(self._wanted.wait(), LIST_EVERY_S)
            except TimeoutError:
                continue

    def _read(self) -> list[RunRow]:
        for launch in self.launches:
            launch.settle()
        return self._index.refresh()

    @work(group="look_back")
    async def _look_back(self) -> None:
        """Report starts that failed while no TUI watched them. Those of this TUI are reported elsewhere."""
        if self.launches:
            return
        for name, text in (await asyncio.to_thread(left_behind, self.results_dir)).items():
            self._tell_failure(f"{name} ended before its training began", text)

    # ---- trainers --------------------------------------------------------------------------

    def _tell_launches(self) -> None:
        """Show the run of `train --tui` once its folder exists, and report failed starts."""
        wanted = self._open_when_there
        if wanted is not None and (wanted.folder / "run.yaml").exists():
            self._open_when_there = None
            self.push_screen(RunScreen(wanted.folder.name))
        for launch in list(self.launches):
            if launch.exit_code is None:
                continue
            self.launches = [one for one in self.launches if one is not launch]
            if launch.failed:
                self._tell_failure(f"{launch.name} ended with exit code {launch.exit_code}", launch.text())
                launch.forget()

    def _tell_failure(self, title: str, text: str) -> None:
        self.push_screen(Reading(title, Text(text or "It printed nothing."), at_end=True, failed=True))

    # ---- actions ---------------------------------------------------------------------------

    def action_help(self) -> None:
        self.push_screen(Help(self.screen))

    def open_run(self, name: str) -> None:
        self.push_screen(RunScreen(name))

    def compare(self, names: list[str]) -> None:
        self.push_screen(CompareScreen(names))

    @work(group="start")
    async def start_run(self, preset: str = "") -> None:
        launch = await self.push_screen_wait(StartScreen(self.results_dir, preset))
        if launch is not None:
            self.watch_launch(launch)
            self.notify(f"{launch.name} is process {launch.pid}: it goes on when this closes", title="Starting")

    def get_system_commands(self, screen: Screen) -> Iterable[SystemCommand]:
        """Textual's commands, and every key binding of the screen."""
        yield from super().get_system_commands(screen)
        for active in screen.active_bindings.values():
            binding = active.binding
            if active.node in (screen, self.screen) and binding.description and binding.id:

                def run(action: str = binding.action, node=active.node) -> None:
                    self.call_later(self.run_action, action, node)

                yield SystemCommand(binding.description, active.tooltip or binding.description, run)
