"""The list of runs: its columns, their cells and their sort keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from rich.text import Text

from fastpeft.tui.format import MISSING, bar, decimal, duration, short, shortened, sparkline
from fastpeft.tui.runs_index import RunRow, groups
from fastpeft.tui.theme import NOTE, SPARK, STATUS

STAND_IN = "STAND-IN"
_LONGEST_NAME = 24
"""Most extra cells for the name column."""
_STAND_IN_STYLE = f"black on {NOTE}"


@dataclass(frozen=True)
class Group:
    """The runs of one --seeds, shown as one line."""

    name: str
    rows: tuple[RunRow, ...]
    folded: bool

    @property
    def key(self) -> str:
        return f"group {self.name}"


@dataclass(frozen=True)
class Column:
    key: str
    label: str
    width: tuple[int, int, int]
    """Width in a narrow, a medium and a wide terminal."""
    cell: Callable[[RunRow, int], Text]
    sort: Callable[[RunRow], Any] | None = None
    """Sort key; None if the column cannot be sorted by."""
    right: bool = False


def status_badge(status: str, width: int = 0) -> Text:
    sign, color = STATUS.get(status, STATUS["no result"])
    return Text(f"{sign} {status}".ljust(width), style=color)


def stand_in_badge() -> Text:
    return Text(f" {STAND_IN} ", style=_STAND_IN_STYLE)


def model_and_data(row: RunRow) -> str:
    model = PurePath(row.model).name
    return f"{model}, {row.dataset}" if model else row.dataset


def method_and_where(row: RunRow) -> str:
    return " on ".join(part for part in (row.method, model_and_data(row)) if part)


def _where(row: RunRow, width: int) -> Text:
    if not row.stand_in:
        return Text(shortened(model_and_data(row), width))
    room = width - len(STAND_IN) - 3
    return Text.assemble(stand_in_badge(), " ", shortened(model_and_data(row), room))


def _budget(row: RunRow, width: int) -> Text:
    return bar(row.progress, width, STATUS.get(row.status, STATUS["no result"])[1])


def _by(name: str) -> Callable[[RunRow], float]:
    """Sort key of a field; unknown values come last."""

    def number(row: RunRow) -> float:
        value = getattr(row, name)
        return value if value is not None and math.isfinite(value) else -math.inf

    return number


def _best_or_last(row: RunRow) -> float:
    """Sort key of the best or last metric; runs without an evaluation come last."""
    best = best_of(row)
    return best if best is not None and math.isfinite(best) else -math.inf


def _score(value: float | None) -> Text:
    """A score in six characters; a correlation may be negative."""
    return Text(decimal(value, 4 if value is None or value >= 0 else 3))


def best_of(row: RunRow) -> float | None:
    return row.metric if row.best is None else row.best


_NARROWED = {"name": 16, "budget": 9}
_TEST = Column("test", "test", (6, 6, 6), lambda r, w: _score(r.test), _by("test"), True)
COLUMNS = (
    Column("status", "status", (11, 11, 11), lambda r, w: status_badge(r.status), lambda r: r.status),
    Column("name", "run", (20, 28, 36), lambda r, w: Text(shortened(r.name, w)), lambda r: r.name),
    Column("budget", "budget", (12, 14, 18), _budget, _by("progress")),
    Column("eta", "ETA", (6, 6, 6), lambda r, w: Text(duration(r.eta_s)), _by("eta_s"), True),
    Column("loss", "loss", (7, 7, 7), lambda r, w: Text(decimal(r.last_loss)), _by("last_loss"), True),
    Column("best", "best", (6, 6, 6), lambda r, w: _score(best_of(r)), _best_or_last, True),
    Column("method", "method", (7, 8, 12), lambda r, w: Text(shortened(r.method, w)), lambda r: r.method),
    Column("tokens", "tok/s", (6, 6, 6), lambda r, w: Text(short(r.tokens_per_s)), _by("tokens_per_s"), True),
    Column("energy", "energy", (7, 7, 7), lambda r, w: Text(short(r.energy_j, "J")), _by("energy_j"), True),
    Column("curve", "loss curve", (12, 10, 24), lambda r, w: Text(sparkline(r.sparkline, w), style=SPARK)),
    Column("where", "model, data", (34, 34, 44), _where, model_and_data),
)  # fmt: skip


def columns_of(rows: Iterable[RunRow]) -> tuple[Column, ...]:
    """COLUMNS, with one for the test score after the best if some run has one. In a narrow terminal, other columns
    shrink for it."""
    if all(row.test is None for row in rows):
        return COLUMNS
    found = [replace(c, width=(_NARROWED.get(c.key, c.width[0]), *c.width[1:])) for c in COLUMNS]
    found.insert([c.key for c in found].index("best") + 1, _TEST)
    return tuple(found)


def fitting(columns: Iterable[Column], size: int, room: int) -> tuple[Column, ...]:
    """As many of the first columns as fit whole. The name column gets the remaining room."""
    found, used = list[Column](), 0
    for column in columns:
        used += column.width[size] + 1
        if used > room and found:
            used -= column.width[size] + 1
            break
        found.append(column)
    more = min(max(room - used, 0), _LONGEST_NAME)
    widths = {c.key: tuple(w + more for w in c.width) if c.key == "name" else c.width for c in found}
    return tuple(replace(c, width=widths[c.key]) for c in found)


def sorts(columns: Iterable[Column]) -> list[str]:
    return ["created", *(column.key for column in columns if column.sort is not None)]


def cells(row: RunRow, columns: Iterable[Column], size: int, indent: str = "") -> list[Text]:
    """One cell per column. `size`: 0 narrow, 1 medium, 2 wide."""
    out = []
    for column in columns:
        width = column.width[size]
        cell = column.cell(row, width - len(indent) if column.key == "name" else width)
        if column.key == "name" and indent:
            cell = Text.assemble(indent, cell)
        out.append(_aligned(cell, width, column.right))
    return out


def group_cells(group: Group, columns: Iterable[Column], size: int) -> list[Text]:
    """Cells of a group: finished runs of all, mean best and test scores, total joules."""
    rows, sign = group.rows, "▸" if group.folded else "▾"
    bests = [best for row in rows if (best := best_of(row)) is not None]
    tests = [row.test for row in rows if row.test is not None]
    energies = [row.energy_j for row in rows if row.energy_j is not None]
    shares = [row.progress or 0.0 for row in rows]
    texts = {
        "status": f"{sum(row.status == 'done' for row in rows)}/{len(rows)} done",
        "best": decimal(sum(bests) / len(bests)) if bests else MISSING,
        "test": decimal(sum(tests) / len(tests)) if len(tests) == len(rows) else MISSING,
        "energy": short(sum(energies), "J") if len(energies) == len(rows) else MISSING,
        "method": "" if len({row.method for row in rows}) > 1 else rows[0].method,
    }
    out = []
    for column in columns:
        width = column.width[size]
        if column.key == "name":
            cell = Text(f"{sign} {shortened(group.name, width - 2)}")
        elif column.key == "budget":
            cell = bar(sum(shares) / len(shares), width)
        elif column.key == "where":
            cell = _where(rows[0], width)
        else:
            cell = Text(texts.get(column.key, ""))
        cell.stylize("bold")
        out.append(_aligned(cell, width, column.right))
    return out


def _aligned(cell: Text, width: int, right: bool) -> Text:
    cell.truncate(width, overflow="ellipsis")
    if right:
        cell.pad_left(width - cell.cell_len)
    return cell


def ordered(rows: Iterable[RunRow], by: str, descending: bool) -> list[RunRow]:
    if by == "created":
        return sorted(rows, key=lambda row: (row.created_s, row.name), reverse=descending)
    key = next(column.sort for column in (*COLUMNS, _TEST) if column.key == by)
    assert key is not None
    return sorted(rows, key=lambda row: (key(row), row.created_s), reverse=descending)


def matching(rows: Iterable[RunRow], text: str) -> list[RunRow]:
    """The rows that contain every word of `text` somewhere."""
    words = text.casefold().split()

    def holds(row: RunRow) -> bool:
        stand_in = "stand-in" if row.stand_in else ""
        facts = (row.name, row.status, row.method, row.model, row.dataset, row.group or "", stand_in)
        all_of_it = " ".join(facts).casefold()
        return all(word in all_of_it for word in words)

    return [row for row in rows if holds(row)]


def grouped(rows: list[RunRow], folded: set[str]) -> list[RunRow | Group]:
    """`rows` with the runs of each --seeds under a group line, at the position of the group's first run."""
    out: list[RunRow | Group] = []
    for name, members in groups(rows).items():
        if members[0].group is None:
            out += members
            continue
        members = sorted(members, key=lambda row: row.seed or 0)
        out.append(Group(name, tuple(members), name in folded))
        out += [] if name in folded else members
    return out
