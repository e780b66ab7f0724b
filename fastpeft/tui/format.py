"""Numbers as short, aligned texts for tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from rich.text import Text

MISSING = "-"
_LEAST_LAST = 8
"""Least useful length of the last part of a heading."""
_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|[ -/]*[0-~])")
"""Escape sequences: CSI, OSC up to its terminator, and short ones."""


def duration(seconds: float | None) -> str:
    """45s, 3m12, 2h05, 3d04h."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def short(value: float | None, unit: str = "") -> str:
    """Three or four digits and an SI prefix: 950, 12.3k, 4.56M."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            scaled = value / factor
            digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
            return f"{scaled:.{digits}f}{prefix}{unit}"
    return f"{value:.0f}{unit}" if abs(value) >= 99.5 or value == int(value) else f"{value:.1f}{unit}"


def decimal(value: float | None, digits: int = 4) -> str:
    """A loss or a metric in at most seven characters, six if in 0..1, so that no column truncates it."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        before_point = len(f"{value:.0f}")
        return f"{value:.{max(0, min(digits, 6 - before_point))}f}"
    text = scientific(value)
    return text if len(text) <= 7 else scientific(value, 0)


def scientific(value: float, digits: int = 1) -> str:
    """1.2e-6, where Python writes 1.2e-06."""
    mantissa, _, power = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(power)}"


def printable(text: str) -> str:
    """`text` without escape sequences, such as colours and titles, and without what a \\r in it overwrote."""
    lines = [_ESCAPE.sub("", line).rstrip("\r").rpartition("\r")[2].expandtabs(4) for line in text.split("\n")]
    return "\n".join("".join(c if c.isprintable() else "�" for c in line) for line in lines)


def amount(value: float, kind: str) -> str:
    """An amount of a budget with the unit of its kind."""
    if kind == "seconds":
        return duration(value)
    return short(value, {"joules": "J", "tokens": "tok", "steps": ""}.get(kind, ""))


def bar(share: float | None, width: int, style: str = "") -> Text:
    """A budget bar that is readable without colour."""
    if share is None or not math.isfinite(share):
        return Text(MISSING.ljust(width), style="dim")
    percent = f"{share:4.0%}"
    room = max(1, width - len(percent) - 1)
    full = min(room, int(share * room + 0.5))
    return Text.assemble(("━" * full, style), ("╌" * (room - full), "dim"), (f" {percent}", ""))


def joined(parts: Iterable[Text | str], gap: str = "  ") -> Text:
    """The non-empty parts, separated by blanks."""
    return Text(gap).join([part if isinstance(part, Text) else Text(part) for part in parts if part])


def fitted(parts: Sequence[Text | str], width: int) -> Text:
    """As `joined`, with as many of the first parts as fit whole."""
    for num in range(len(parts), 1, -1):
        text = joined(parts[:num])
        if text.cell_len <= width:
            return text
    text = joined(parts[:1])
    text.truncate(width, overflow="ellipsis")
    return text


def flowed(parts: Sequence[Text | str], width: int) -> Text:
    """As `joined`, on as many lines as needed; no part is broken."""
    lines: list[Text] = []
    for part in parts:
        longer = joined([*lines[-1:], part])
        if lines and longer.cell_len <= width:
            lines[-1] = longer
        elif part:
            lines.append(fitted([part], width))
    return Text("\n").join(lines)


def headed(name: str, parts: Iterable[Text | str], last: str, width: int) -> Text:
    """A name, facts and a longer last text. The name and the last text are shortened if there is no room for all."""
    facts = joined(parts)
    room = width - facts.cell_len - 2 * bool(facts)
    own = min(len(name), max(room // 2, room - len(last) - 2))
    last = shortened(last, room - own - 2) if room - own - 2 >= _LEAST_LAST else ""
    return fitted([Text(shortened(name, own), "bold"), facts, last], width)


def shortened(text: str, width: int) -> str:
    """`text` shortened in the middle, since names of runs differ at both ends."""
    if len(text) <= width:
        return text
    tail = width // 2
    return f"{text[: width - tail - 1]}…{text[len(text) - tail :]}"


_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: tuple[float, ...], width: int) -> str:
    """Finite values as block characters; values that share one are averaged."""
    if not values:
        return ""
    num = min(width, len(values))
    means = []
    for i in range(num):
        part = values[len(values) * i // num : len(values) * (i + 1) // num]
        means.append(sum(value / 2 / len(part) for value in part))  # halved, so that no difference overflows
    low, span = min(means), max(means) - min(means)
    return "".join(_BLOCKS[round((mean - low) / span * 7) if span else 0] for mean in means)
