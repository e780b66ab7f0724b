"""Layout of a heatmap's rows and columns, and of the column names above them."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

_WORD = re.compile(r"[^._]*[._]?")
ELLIPSIS = "…"


def shares(needs: Sequence[int], room: int) -> list[int]:
    """`room` divided evenly, with at least its need for each; evenly throughout if the needs exceed `room`."""
    if sum(needs) > room:
        needs = [0] * len(needs)
    fixed: dict[int, int] = {}
    while True:
        others = [i for i in range(len(needs)) if i not in fixed]
        if not others:
            break
        each, more = divmod(room - sum(fixed.values()), len(others))
        large = {i: needs[i] for i in others if needs[i] > each}
        if not large:
            return [fixed.get(i, each + (i in others[:more])) for i in range(len(needs))]
        fixed |= large
    return [fixed[i] for i in range(len(needs))]


def words(name: str) -> list[str]:
    """Words of a module's name, with the characters that end them: attention. output. dense."""
    return [word for word in _WORD.findall(name) if word]


def wrapped(name: str, width: int) -> list[str]:
    """Lines of whole words. A word longer than a line is visibly cut."""
    lines = [""]
    for word in words(name):
        if len(lines[-1]) + len(word) > width and lines[-1]:
            lines.append("")
        lines[-1] += word if len(word) <= width else word[: max(width - 1, 0)] + ELLIPSIS
    return lines


def headings(names: Sequence[str], widths: Sequence[int], most: int) -> list[list[str]]:
    """Equally many lines above each column: whole words if they fit in `most` lines, else abbreviations."""
    found = [wrapped(name, width) for name, width in zip(names, widths)]
    if any(len(lines) > most or any(ELLIPSIS in line for line in lines) for lines in found):
        found = [[name] for name in abbreviated(names, min(widths, default=1))]
    num = max(map(len, found), default=1)
    return [[""] * (num - len(lines)) + lines for lines in found]


def abbreviated(names: Sequence[str], width: int) -> list[str]:
    """Distinct names of at most `width` characters: cut at the end, the start or the middle, else numbered."""
    cuts = (_cut_at_end, _cut_at_start, _cut_in_middle)
    for cut in cuts:
        found = [name if len(name) <= width else cut(name, width) for name in names]
        if len(set(found)) == len(names):
            return found
    return [name if len(name) <= width else f"{name[: width - len(str(i))]}{i}" for i, name in enumerate(names)]


def _cut_at_end(name: str, width: int) -> str:
    return name[: width - 1] + ELLIPSIS


def _cut_at_start(name: str, width: int) -> str:
    return ELLIPSIS + name[len(name) - width + 1 :]


def _cut_in_middle(name: str, width: int) -> str:
    left = (width - 1) // 2
    return f"{name[:left]}{ELLIPSIS}{name[len(name) - (width - 1 - left) :]}"


@dataclass(frozen=True)
class Columns:
    """Columns of a heatmap, from `first` on. `head`: lines of text above each."""

    first: int
    widths: tuple[int, ...]
    head: tuple[tuple[str, ...], ...]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Each column and its width."""
        return iter(enumerate(self.widths, self.first))

    @property
    def num(self) -> int:
        return len(self.widths)

    def at(self, x: int) -> int | None:
        ends = list(itertools.accumulate(self.widths))
        column = bisect_right(ends, x)
        return self.first + column if x >= 0 and column < len(ends) else None


@lru_cache(32)
def columns_in(names: tuple[str, ...], first: int, width: int, least: int, most_lines: int) -> Columns:
    """As many columns as fit. If all fit they fill `width`; else each is `least` wide."""
    num = min(len(names), max(width // least, 1))
    if num < len(names):
        first = max(0, min(first, len(names) - num))
        widths = [least] * num
    else:
        first, widths = 0, shares([max(map(len, words(name))) + 1 for name in names], width)
    head = headings(names[first : first + num], [width - 1 for width in widths], most_lines)
    return Columns(first, tuple(widths), tuple(zip(*head)) or ((),))


@dataclass(frozen=True)
class Rows:
    """Rows of a heatmap, from `first` on, in half lines. `edges`: the start of each row, and the end of the last."""

    first: int
    edges: tuple[int, ...]

    def at(self, half: int) -> int | None:
        """The row at a half line."""
        if not self.edges or not 0 <= half < self.edges[-1]:
            return None
        return self.first + bisect_right(self.edges, half) - 1

    def number_line(self, row: int) -> int:
        """The line nearest to a row's middle that belongs to this row only."""
        start, end = self.edges[row - self.first : row - self.first + 2]
        return (-(-start // 2) + end // 2 - 1) // 2

    @property
    def num(self) -> int:
        return max(len(self.edges) - 1, 0)


@lru_cache(32)
def rows_in(num_rows: int, num_lines: int, first: int, *, halves: bool, spread_from: float) -> Rows:
    """Rows spread over `num_lines` lines. `halves`: a line may be shared by two rows."""
    num_shown = min(num_rows, num_lines)
    if not num_shown:
        return Rows(first, ())
    first = max(0, min(first, num_rows - num_shown))
    if num_lines < spread_from * num_shown:
        edges = [2 * i for i in range(num_shown + 1)]
    elif halves:
        edges = [2 * num_lines * i // num_shown for i in range(num_shown + 1)]
    else:
        edges = [2 * (num_lines // num_shown) * i for i in range(num_shown + 1)]
    return Rows(first, tuple(edges))
