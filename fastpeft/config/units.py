"""Quantities that users write as text: budgets (`30m`) and intervals (`20%`)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

BudgetKind = Literal["seconds", "joules", "tokens", "steps"]

_NUMBER = re.compile(r"\s*((?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)\s*")
_UNITS: dict[str, tuple[BudgetKind, float]] = {
    "s": ("seconds", 1),
    "m": ("seconds", 60),
    "min": ("seconds", 60),
    "h": ("seconds", 3600),
    "j": ("joules", 1),
    "kj": ("joules", 1e3),
    "mj": ("joules", 1e6),
    "tok": ("tokens", 1),
    "ktok": ("tokens", 1e3),
    "mtok": ("tokens", 1e6),
    "btok": ("tokens", 1e9),
    "step": ("steps", 1),
    "steps": ("steps", 1),
}


@dataclass(frozen=True)
class Budget:
    """Budget of a run: `limit` in the unit `kind` (seconds, joules, tokens, steps)."""

    kind: BudgetKind
    limit: float

    def __str__(self) -> str:
        suffix = {"seconds": "s", "joules": "J", "tokens": " tokens", "steps": " steps"}[self.kind]
        return f"{self.limit:,.0f}{suffix}" if self.limit >= 1 else f"{self.limit:g}{suffix}"


def parse_budget(text: str) -> Budget:
    """`90s`, `30m`, `2h`, `2000steps`, `5Mtok`, `50kJ` -> Budget. Raises ValueError."""
    match = _NUMBER.fullmatch(text)
    unit = match.group(2).lower() if match else ""
    if not match or unit not in _UNITS:
        raise ValueError(f"{text!r} is no budget; write a number with a unit: 90s, 30m, 2h, 2000steps, 5Mtok or 50kJ")
    kind, factor = _UNITS[unit]
    limit = float(match.group(1)) * factor
    if not math.isfinite(limit) or limit <= 0:
        raise ValueError(f"the budget must be positive, got {text!r}")
    if kind in ("steps", "tokens") and limit != int(limit):
        raise ValueError(f"a budget in {kind} must be a whole number, got {text!r}")
    return Budget(kind, limit)


@dataclass(frozen=True)
class Interval:
    """How often something happens: every `value` of `unit`. A `fraction` is one of the budget. `auto`: as often as its
    cost allows."""

    unit: Literal["fraction", "steps", "seconds", "epoch", "end", "auto"]
    value: float = 0.0


def parse_interval(text: str) -> Interval:
    """`20%`, `500steps`, `60s`, `epoch`, `end` (only once, at the end) or `auto`. Raises ValueError."""
    if text in ("epoch", "end", "auto"):
        return Interval(text)
    match = _NUMBER.fullmatch(text)
    if match and match.group(2) == "%" and 0 < float(match.group(1)) <= 100:
        return Interval("fraction", float(match.group(1)) / 100)
    kind, factor = _UNITS.get(match.group(2).lower(), ("", 0)) if match else ("", 0)
    value = float(match.group(1)) * factor if match else 0
    if kind in ("steps", "seconds") and 0 < value < math.inf:
        return Interval(kind, max(1, round(value)) if kind == "steps" else value)
    raise ValueError(f"{text!r} is no interval; write auto, 20%, 500steps, 60s, epoch or end")


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) < 2**32 for part in parts):
        raise ValueError(f"seeds {text!r}: expected whole numbers with commas between, such as 0,1,2")
    found = [int(part) for part in parts]
    if len(set(found)) < len(found):
        raise ValueError(f"seeds {text!r}: a seed is there twice")
    return found
