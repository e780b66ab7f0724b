"""A text that costs nothing while it stays the same."""

from __future__ import annotations

from rich.console import RenderableType
from textual.widgets import Static


class Lines(Static):
    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._shown: RenderableType | None = None

    def show(self, content: RenderableType) -> None:
        """Lays the screen out anew, so only where the text is another one."""
        if content != self._shown:
            self._shown = content
            self.update(content)
