"""What happened in a run, one event a line, the newest last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import RichLog

from fastpeft.tui.parse import Notable
from fastpeft.tui.widgets.axes import clock

MOST = 2000
_STYLES = {"eval": "#009E73", "warning": "#E69F00", "run": "bold", "end": "bold", "importance": "#56B4E9"}


class EventLog(RichLog):
    """Follows the end, until it is scrolled up."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "scroll_down", "Down", show=False, id="log.down"),
        Binding("k", "scroll_up", "Up", show=False, id="log.up"),
        Binding("g", "scroll_home", "First", show=False, id="log.first"),
        Binding("G", "scroll_end", "Last", show=False, id="log.last"),
    ]

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, wrap=True, min_width=0, max_lines=MOST)
        self.shown: list[Notable] = []

    def show(self, events: Sequence[Notable]) -> None:
        """Write what is new; where the events before are others now, all of them."""
        wanted = list(events[-MOST:])
        if wanted == self.shown:
            return
        num = len(self.shown)
        if wanted[:num] != self.shown:
            self.clear()
            num = 0
        follow = self.is_vertical_scroll_end
        for event in wanted[num:]:
            self.write(_line(event), scroll_end=follow)
        self.shown = wanted


def _line(event: Notable) -> Text:
    at = f"{clock(max(event.elapsed_s, 0.0)):>8} {event.step:>7,} "
    return Text.assemble((at, "dim"), (f"{event.kind:<10} ", _STYLES.get(event.kind, "")), event.text)
