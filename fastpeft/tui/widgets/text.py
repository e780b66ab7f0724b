"""A text that is laid out again only when it changes."""

from __future__ import annotations

from rich.console import RenderableType
from textual.widgets import Static


class Lines(Static):
    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._shown: RenderableType | None = None

    def show(self, content: RenderableType) -> None:
        """Show `content`. Only a changed text is updated, since an update lays out the screen again."""
        if content != self._shown:
            self._shown = content
            self.update(content)
