"""The form that starts a run, and validates what is typed by the configuration's schema."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.suggester import Suggester, SuggestFromList
from textual.widgets import Button, Checkbox, Footer, Input, Label, Static

from fastpeft.config import preset_names
from fastpeft.errors import UserError
from fastpeft.tui import orders, steer

CHECK_AFTER_S = 0.15
"""Seconds without a key press before the form is validated."""

FIELDS = {
    "run": ("Run", "a preset, or the path of a YAML file"),
    "budget": ("Budget", "90s, 30m, 2h, 2000steps, 5Mtok, 50kJ; empty: the preset's"),
    "seeds": ("Seeds", "0,1,2: one run a seed; empty: the preset's"),
    "name": ("Name", "the run's folder; empty: RUN-date-time"),
    "overrides": ("Settings", "key=value key=value, such as training.learning_rate=1e-4"),
}


class _Settings(Suggester):
    """Completes the key being typed."""

    def __init__(self) -> None:
        super().__init__(use_cache=False, case_sensitive=True)

    async def get_suggestion(self, value: str) -> str | None:
        return await asyncio.to_thread(orders.complete, value)


class Switch(Checkbox):
    """A checkbox whose symbol differs on and off; Textual's differs only in colour."""

    def render(self) -> Content:
        self.BUTTON_INNER = "X" if self.value else " "
        return super().render()


class StartScreen(Screen[steer.Launch | None]):
    """Returns the started trainer, or None."""

    TITLE = "New run"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "start", "Start", id="start.start", priority=True),
        Binding("escape", "cancel", "Back", id="start.back"),
        Binding("down", "app.focus_next", "Next field", show=False, id="start.next"),
        Binding("up", "app.focus_previous", "Previous field", show=False, id="start.previous"),
        Binding("f1", "app.help", "Help", id="start.help"),
    ]

    def __init__(self, results_dir: Path, run: str = "") -> None:
        super().__init__()
        self._results_dir, self._run = results_dir, run
        self.checked = orders.Checked(None)

    def compose(self) -> ComposeResult:
        suggesters = {"run": SuggestFromList(preset_names()), "overrides": _Settings()}
        yield Static(Text.assemble(("fastpeft", "bold"), "  new run"), id="title")
        with VerticalScroll(id="form", can_focus=False):
            with Grid(id="fields"):
                for key, (label, placeholder) in FIELDS.items():
                    yield Label(label)
                    value = self._run if key == "run" else ""
                    yield Input(value, id=key, placeholder=placeholder, suggester=suggesters.get(key), compact=True)
                yield Label("")
                with Horizontal(id="switches"):
                    yield Switch("trial: two steps through every code path", id="trial", compact=True)
                    yield Switch("no stand-in", id="no_stand_in", compact=True)
            with Horizontal(id="buttons"):
                yield Button("Start (ctrl+s)", id="go", variant="primary", compact=True, disabled=True)
                yield Button("Back (esc)", id="back", compact=True)
            yield Static(id="verdict")
            yield Static(id="key_help")
            yield Static(id="presets")
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        self.query_one("#run").focus()
        self._list_presets()
        self._check()

    def _list_presets(self) -> None:
        """List the presets whose names contain the typed text; none once it is a preset's name."""
        typed = self.query_one("#run", Input).value
        names = [] if typed in preset_names() else [name for name in preset_names() if typed in name]
        self.query_one("#presets", Static).update(Text("presets  " + "  ".join(names) if names else "", style="dim"))

    def draft(self) -> orders.Draft:
        fields: dict[str, Any] = {key: self.query_one(f"#{key}", Input).value for key in FIELDS}
        fields |= {key: self.query_one(f"#{key}", Checkbox).value for key in ("trial", "no_stand_in")}
        return orders.Draft(**fields)

    def on_input_changed(self) -> None:
        self._list_presets()
        self._check()

    def on_checkbox_changed(self) -> None:
        self._check()

    def on_input_submitted(self) -> None:
        self.action_start()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "go":
            self.action_start()
        else:
            self.action_cancel()

    @work(exclusive=True)
    async def _check(self) -> None:
        await asyncio.sleep(CHECK_AFTER_S)
        if not self.is_there:
            return
        self._show(await asyncio.to_thread(orders.check, self.draft(), self._results_dir))

    @property
    def is_there(self) -> bool:
        """Whether the screen was not closed during a check."""
        return any(screen is self for screen in self.app.screen_stack)

    def _show(self, checked: orders.Checked) -> None:
        self.checked = checked
        if not self.is_there:
            return
        self.query_one("#go", Button).disabled = checked.order is None
        verdict = self.query_one("#verdict", Static)
        verdict.set_class(checked.order is None, "-wrong")
        if checked.order is None:
            verdict.update(Text("\n".join(f"✗ {problem}" for problem in checked.problems)))
        else:
            command = shlex.join(["fastpeft", *checked.order.arguments(self._results_dir)])
            verdict.update(Text.assemble((f"✓ {checked.summary}\n", ""), (command, "dim")))
        self.query_one("#key_help", Static).update(Text(checked.help))

    @work(exclusive=True, group="start")
    async def action_start(self) -> None:
        self._show(await asyncio.to_thread(orders.check, self.draft(), self._results_dir))
        if self.checked.order is None:
            self.app.bell()
            return
        try:
            launch = await asyncio.to_thread(steer.start, self.checked.order, self._results_dir)
        except UserError as error:
            self._show(orders.Checked(None, [str(error)]))
            return
        self.dismiss(launch)

    def action_cancel(self) -> None:
        self.dismiss(None)
