"""The events of a run, one per line, newest last."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.widgets import RichLog

from fastpeft.tui.parse import Notable
from fastpeft.tui.theme import NOTE
from fastpeft.tui.widgets.axes import clock

MOST = 2000
_LEAST_INDENT = 9
"""Cells of the time column in a narrow list."""
_STYLES = {"eval": "#009E73", "warning": NOTE, "run": "bold", "end": "bold", "importance": "#56B4E9"}


class EventLog(RichLog):
    """A log that follows its end until it is scrolled up."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "scroll_down", "Down", show=False, id="log.down"),
        Binding("k", "scroll_up", "Up", show=False, id="log.up"),
        Binding("g", "scroll_home", "First", show=False, id="log.first"),
        Binding("G", "scroll_end", "Last", show=False, id="log.last"),
    ]

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, wrap=True, min_width=0, max_lines=MOST)
        self.shown: list[Notable] = []
        self._width = 0

    def show(self, events: Sequence[Notable]) -> None:
        """Write the new events; if earlier ones have changed, all of them."""
        wanted, width = list(events[-MOST:]), self.scrollable_content_region.width
        if (wanted, width) == (self.shown, self._width) or not width:
            return
        num = len(self.shown)
        if wanted[:num] != self.shown or width != self._width:
            self.clear()
            num = 0
        follow = self.is_vertical_scroll_end
        for event in wanted[num:]:
            self.write(_lines(event, width), width, scroll_end=follow)
        self.shown, self._width = wanted, width

    def on_resize(self, event: Resize) -> None:
        """Write all lines again, which were wrapped to the earlier width."""
        self.show(self.shown)


def _lines(event: Notable, width: int) -> Text:
    """The event's text on as many lines as needed, aligned."""
    at = f"{clock(max(event.elapsed_s, 0.0)):>8} {event.step:>7,} "
    head = Text.assemble((at, "dim"), (f"{event.kind:<10} ", _STYLES.get(event.kind, "")))
    indent = head.cell_len if width >= 2 * head.cell_len else _LEAST_INDENT
    first, *more = _wrapped(event.text, width - head.cell_len) or [""]
    if more:
        rest = event.text[len(first) :].strip()
        more = [f"\n{' ' * indent}{line}" for line in _wrapped(rest, width - indent)]
    return head.append("".join([first, *more]))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, _LEAST_INDENT), replace_whitespace=False, drop_whitespace=True)
