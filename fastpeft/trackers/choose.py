"""Which trackers a run has, and what each is started with. Only a tracker that is asked for is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpeft.config.trackers import TRACKERS


@dataclass(frozen=True)
class Choice:
    """One tracker of a run, before it is started."""

    name: str
    """As the registry has it."""
    settings: dict[str, str] = field(default_factory=dict)
    """Keyword arguments of its class, besides the run's folder."""


def choose(sections: Mapping[str, Any], say: Callable[[str], None]) -> list[Choice]:
    """The trackers that a run asks for.

    Args:
        sections: every tracker's own section, by its name.
        say: is told when one that is on by default cannot be had.

    Raises:
        UserError: what is asked for by name cannot be had; the message says how to get it.
    """
    chosen = []
    for name, section in sections.items():
        if not (section if isinstance(section, bool) else section.enabled):
            continue
        settings = TRACKERS.load(name).settings(section, say)
        if settings is not None:
            chosen.append(Choice(name, settings))
    return chosen
