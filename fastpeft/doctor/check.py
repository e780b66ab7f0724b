"""A finding of `fastpeft doctor`, and the isolation of checks: one that raises or hangs does not affect the others."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastpeft.errors import first_line

Status = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    message: str
    fix: str = ""
    """What to do about it; empty if nothing needs to be done."""
    fatal: bool = False
    """True if nothing can be trained until this is fixed."""


@dataclass(frozen=True)
class Check:
    name: str
    look: Callable[[], list[Finding]]
    timeout_s: float = 10.0


def carry_out(check: Check) -> list[Finding]:
    """The findings of a check. If it raises or exceeds `timeout_s`, a single warning under its name."""
    found: list[list[Finding]] = []
    fault: list[str] = []

    def look() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(check.look())
        except BaseException as error:  # libraries may raise anything, SystemExit included
            fault.append(f"{type(error).__name__}: {first_line(error)}")

    thread = threading.Thread(target=look, name=f"fastpeft-doctor-{check.name}", daemon=True)
    thread.start()
    thread.join(check.timeout_s)
    if found:
        return found[0]
    why = fault[0] if fault else f"no answer within {check.timeout_s:g} s"
    return [Finding(check.name, "warning", f"could not be checked: {why}")]
