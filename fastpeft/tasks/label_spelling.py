"""Labels that look like one label written in several ways."""

from __future__ import annotations

from collections.abc import Iterable


def spelled_alike(names: Iterable[str]) -> list[list[str]]:
    """Names that differ only in case, in blanks, hyphens and underscores, or in how a number is written."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_plain(name), []).append(name)
    return [alike for alike in found.values() if len(alike) > 1]


def spelling_warnings(names: Iterable[str]) -> list[str]:
    return [
        f"the labels {' and '.join(map(repr, alike))} are taken for different ones, but differ in spelling only: where "
        "one is meant, write it alike in the data"
        for alike in spelled_alike(names)
    ]


def nearest_spelling(label: str, names: Iterable[str]) -> str | None:
    """The name that `label` would be if it were spelled like it."""
    return next((name for name in names if _plain(name) == _plain(label)), None)


def _plain(name: str) -> str:
    try:
        return str(float(name))
    except ValueError:
        plain = "".join(character for character in name.casefold() if not (character.isspace() or character in "-_"))
        return plain or name
