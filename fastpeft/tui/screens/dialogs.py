"""Dialogs over another screen: a question, a text, the keys."""

from __future__ import annotations

from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Button, Label, Static

_SCROLL: list[BindingType] = [
    Binding("j,down", "scroll('down')", "Down", show=False, id="text.down"),
    Binding("k,up", "scroll('up')", "Up", show=False, id="text.up"),
    Binding("g,home", "scroll('home')", "Top", show=False, id="text.top"),
    Binding("G,end", "scroll('end')", "Bottom", show=False, id="text.bottom"),
    Binding("pagedown,space", "scroll('page_down')", "Page down", show=False, id="text.page_down"),
    Binding("pageup", "scroll('page_up')", "Page up", show=False, id="text.page_up"),
]


class Dialog(ModalScreen):
    """Closes with Esc; q quits here too."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", id="dialog.close"),
        Binding("q", "app.quit", "Quit", id="dialog.quit"),
    ]

    def action_close(self) -> None:
        self.dismiss(None)


class Ask(Dialog):
    """A yes-or-no question. Returns True for yes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes", id="ask.yes"),
        Binding("n", "answer(False)", "No", id="ask.no"),
        Binding("left,right", "app.focus_next", "Other answer", show=False, id="ask.other"),
    ]

    def __init__(self, question: str, detail: str, yes: str, *, dangerous: bool = False) -> None:
        super().__init__()
        self._question, self._detail, self._yes, self._dangerous = question, detail, yes, dangerous

    def compose(self) -> ComposeResult:
        with Vertical(id="dialog"):
            yield Label(self._question, id="question", markup=False)
            yield Label(self._detail, id="detail", markup=False)
            with Horizontal(id="answers"):
                yield Button(
                    f"{self._yes} (y)", id="yes", variant="error" if self._dangerous else "primary", compact=True
                )
                yield Button("Cancel (n)", id="no", compact=True)

    def on_mount(self) -> None:
        self.query_one("#no" if self._dangerous else "#yes").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)

    def action_close(self) -> None:
        self.dismiss(False)


class Reading(Dialog):
    """A scrollable text with a title."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "close", "Close", show=False, id="dialog.enter"),
        *_SCROLL,
    ]

    def __init__(self, title: str, body: Text | Table, *, at_end: bool = False, failed: bool = False) -> None:
        super().__init__()
        self._title, self._body, self._at_end, self._failed = title, body, at_end, failed

    def compose(self) -> ComposeResult:
        with Vertical(id="dialog", classes="-failed" if self._failed else ""):
            yield Label(self._title, id="question", markup=False)
            with VerticalScroll(id="text", can_focus=True):
                yield Static(self._body, id="body")
            yield Label("Esc closes, j k scroll", id="hint")

    def on_mount(self) -> None:
        text = self.query_one("#text")
        text.focus()
        if self._at_end:
            self.call_after_refresh(text.scroll_end, animate=False)

    def action_scroll(self, where: str) -> None:
        getattr(self.query_one("#text"), f"scroll_{where}")(animate=False)


class Help(Reading):
    """Every key that works on the screen below."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark,f1", "close", "Close", show=False, id="help.close"),
    ]

    def __init__(self, screen: Screen) -> None:
        super().__init__("Keys", keys_of(screen))


def keys_of(screen: Screen) -> Table:
    """Keys and their actions: of the focused widget, the screen, the application."""
    groups: dict[str, dict[tuple[str, str], list[str]]] = {}
    app = screen.app
    for active in screen.active_bindings.values():
        binding = active.binding
        if not binding.description or binding.system or "copy_text" in binding.action:
            continue
        textuals_own = not binding.id
        where = "This screen" if active.node is screen and not textuals_own else "In focus"
        where = "Everywhere" if active.node is app or textuals_own else where
        keys = groups.setdefault(where, {}).setdefault((binding.action, active.tooltip or binding.description), [])
        if (key := app.get_key_display(binding)) not in keys:
            keys.append(key)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for where in ("This screen", "In focus", "Everywhere"):
        if where in groups:
            table.add_row(Text(where, style="bold underline"), "")
            for (_, description), keys in groups[where].items():
                table.add_row("  " + " ".join(keys), description)
            table.add_row("", "")
    return table
