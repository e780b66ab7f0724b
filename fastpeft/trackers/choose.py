"""Which trackers a run has, and their settings. Only a tracker that is asked for is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpeft.config.trackers import TRACKERS


@dataclass(frozen=True)
class Choice:
    """One tracker of a run, before it is started."""

    name: str
    """Its name in the registry."""
    settings: dict[str, str] = field(default_factory=dict)
    """Keyword arguments of its class, apart from the run's folder."""


def choose(sections: Mapping[str, Any], say: Callable[[str], None]) -> list[Choice]:
    """The trackers that a run asks for.

    Args:
        sections: tracker's name -> its section.
        say: called when a tracker that is on by default is unavailable.

    Raises:
        UserError: a tracker that was asked for is unavailable; the message says how to get it.
    """
    chosen = []
    for name, section in sections.items():
        if not (section if isinstance(section, bool) else section.enabled):
            continue
        settings = TRACKERS.load(name).settings(section, say)
        if settings is not None:
            chosen.append(Choice(name, settings))
    return chosen
