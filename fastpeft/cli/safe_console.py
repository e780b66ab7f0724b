"""A console that prints untrusted text: no control character from a file reaches the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text


def shown(text: str) -> str:
    """`text` with control and bidirectional characters escaped, such as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


class SafeConsole(Console):
    """A console that passes strings through `shown`. A Text is printed unchanged: its maker is responsible."""

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        return super().render_str(shown(text), *args, **options)
