"""Base of the screens: a title line, the list of runs as last read, and keys that steer a run."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.screen import Screen

from fastpeft.errors import UserError
from fastpeft.runs.store import RunFolder
from fastpeft.tui import steer
from fastpeft.tui.runs_app import RunsApp
from fastpeft.tui.screens.dialogs import Ask, Reading

STOP = "Stop the run: it saves a checkpoint and can be resumed"
RESUME = "Resume the run from its newest checkpoint"


class RunsKeys(Screen[None]):
    """Keys that steer the run `self.target()`."""

    app: RunsApp
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            "T",
            "stop",
            "Stop",
            tooltip=STOP,
            show=False,
            id="run.stop",
        ),
        Binding("R", "resume", "Resume", tooltip=RESUME, show=False, id="run.resume"),
        Binding("D", "delete", "Delete", tooltip="Delete the run's folder (asks)", show=False, id="run.delete"),
        Binding(
            "o", "open_folder", "Folder", tooltip="Open the run's folder, or copy its path", show=False, id="run.folder"
        ),
        Binding("O", "output", "Output", tooltip="What the trainer printed", show=False, id="run.output"),
    ]

    def target(self) -> str | None:
        """Name of the run that keys act on; None if there is none."""
        raise NotImplementedError

    def draw(self) -> None:
        """Draw what was read."""
        raise NotImplementedError

    def draw_again(self) -> None:
        """Draw from a worker or a timer, only if this screen is on top and not being removed."""
        if not (self.is_mounted and self.is_current):
            return
        try:
            self.draw()
        except NoMatches:
            if self.is_running and self.app.is_running and not self.app.is_exiting:
                raise

    def rows_changed(self) -> None:
        """Called after the list of runs was read again."""
        self.draw_again()

    def folder(self) -> RunFolder | None:
        name = self.target()
        if name is None:
            self.app.bell()
            return None
        return RunFolder(self.app.results_dir / name)

    @work(group="steer")
    async def action_stop(self) -> None:
        folder = self.folder()
        if folder is None:
            return
        detail = "It finishes its step, saves a checkpoint, and can be resumed with R."
        if not await self.app.push_screen_wait(Ask(f"Stop {folder.path.name}?", detail, "Stop and save")):
            return
        pid = await self._steered(steer.stop, folder)
        if pid is not None:
            self.notify(f"{folder.path.name} (process {pid}) saves a checkpoint and ends", title="Stopping")

    @work(group="steer")
    async def action_resume(self) -> None:
        folder = self.folder()
        if folder is None:
            return
        launch = await self._steered(steer.resume, folder)
        if launch is not None:
            self.app.watch_launch(launch)
            self.notify(f"{folder.path.name} goes on as process {launch.pid}", title="Resuming")

    @work(group="steer")
    async def action_delete(self) -> None:
        folder = self.folder()
        if folder is None:
            return
        ask = Ask(
            f"Delete {folder.path.name}?",
            f"{folder.path}\nIts weights, checkpoints and log are gone for good.",
            "Delete",
            dangerous=True,
        )
        if not await self.app.push_screen_wait(ask):
            return
        if await self._steered(lambda: steer.delete(self.app.results_dir, folder.path.name) or True):
            self.app.marked.pop(folder.path.name, None)
            self.notify(f"{folder.path.name} is deleted")
            self.app.read_soon()
            self.deleted(folder.path.name)

    def deleted(self, name: str) -> None: ...

    def notify(self, message: str, **options) -> None:
        """As Textual's, without markup, which names and paths may look like."""
        super().notify(message, markup=False, **options)

    def action_open_folder(self) -> None:
        folder = self.folder()
        if folder is None:
            return
        path = folder.path.absolute()
        if steer.open_folder(path):
            self.notify(str(path), title="Opened")
        else:
            self.app.copy_to_clipboard(str(path))
            self.notify(str(path), title="Copied to the clipboard", timeout=15)

    def action_output(self) -> None:
        folder = self.folder()
        if folder is None:
            return
        text = steer.read_end(folder.path / steer.OUTPUT, 64_000)
        none = "Nothing is kept here: the run was started in a terminal, where its output went."
        self.app.push_screen(Reading(f"Output of {folder.path.name}", Text(text or none), at_end=True))

    async def _steered(self, function, *arguments):
        """Call a function in a thread. A UserError is shown, and the result is then None."""
        try:
            return await asyncio.to_thread(function, *arguments)
        except UserError as error:
            self.notify(str(error), severity="error", timeout=10)
            return None
