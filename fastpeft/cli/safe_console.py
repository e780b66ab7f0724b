"""What a command prints of others' files is text: no control character of theirs reaches the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text


def shown(text: str) -> str:
    """With every character that would steer the terminal, or turn its reading direction, written out as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


class SafeConsole(Console):
    """A console whose strings are `shown`. A Text is taken as it is: whoever makes one asks for that."""

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        return super().render_str(shown(text), *args, **options)
