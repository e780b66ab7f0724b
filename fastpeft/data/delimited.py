"""A table's text as rows, read in one given form: what separates fields, and whether marks enclose them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastpeft.data.rows import Row

STRAY = "has a quotation mark that encloses no field"


@dataclass(frozen=True)
class Form:
    delimiter: str
    header: bool = True
    """The first line names the columns; else they are named by their numbers, from 0."""
    is_spaced: bool = False
    """A space behind each delimiter belongs to no field."""
    escape: str | None = None
    """What stands before a mark that is a field's own; None: the mark is doubled."""

    def split(self, line: str) -> list[str]:
        """The fields of a line none of whose marks enclose anything."""
        fields = line.split(self.delimiter)
        return [part.removeprefix(" ") for part in fields] if self.is_spaced else fields

    def reader(self, lines: Iterable[str]) -> Any:
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            skipinitialspace=self.is_spaced,
            escapechar=self.escape,
            doublequote=self.escape is None,
            strict=True,
        )

    def enclosed(self, text: str) -> str:
        """A field as a writer of this form writes it."""
        marked = text.replace('"', f'{self.escape or chr(34)}"')
        return f'"{marked}"'


@dataclass
class Table:
    """Rows as they are read, and what their marks show."""

    form: Form
    names: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    num_lines: dict[int, int] = field(default_factory=dict)
    """Of the rows of several lines: the row's place -> its lines."""
    num_blank: int = 0
    """Rows of empty fields only, left out."""
    num_enclosed: int = 0
    """Rows with a field that has to be enclosed, and is."""
    num_bare: int = 0
    """Rows with a mark that no writer of enclosed fields would have left as it stands."""
    num_stray: int = 0
    """Those of them whose mark would swallow what follows: read as if it were text."""

    @property
    def num_faults(self) -> int:
        return sum(row.fault is not None for row in self.rows)

    def add(self, line: int, fields: list[str], num_lines: int = 1) -> None:
        names, header = self.names, self.form.header
        if not fields[0].strip() and not any(part.strip() for part in fields):
            self.num_blank += len(fields) > 1
            return
        if not names:
            self.names = names = _names(fields) if header else [str(i) for i in range(len(fields))]
            if header:
                return
        if num_lines > 1:
            self.num_lines[len(self.rows)] = num_lines
        if len(fields) != len(names):
            what = "the header" if header else "the first line"
            self.rows.append(Row(line, {}, f"has {len(fields)} fields, {what} {len(names)}"))
        elif header and fields == names:
            self.rows.append(Row(line, {}, "repeats the header"))
        else:
            self.rows.append(Row(line, dict(zip(names, fields))))


def read_plain(text: str, form: Form) -> Table:
    """A line a row; all marks are text."""
    table = Table(form)
    split, add = form.split, table.add
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if line:
            add(number, split(line))
    return table


def read_enclosed(text: str, form: Form) -> Table:
    """Marks enclose fields, over several lines too.

    A mark that opens and never closes, or closes in a later row by accident, would swallow the rows between. So a line
    in which such a mark opens is read by itself, its marks as text, and the reading goes on behind it.
    """
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(text).readlines()
    table = _read_records(lines, form, None)
    if any(_may_be_rows(table, lines)):
        table = _read_records(lines, form, _Likeness.of(table, lines))
    return table


def _read_records(lines: list[str], form: Form, likeness: _Likeness | None) -> Table:
    table, stray = Table(form), []

    def joins_rows(begin: int, end: int) -> bool:
        if likeness is None or not table.names:
            return False
        rows = [form.split(_content(line)) for line in lines[begin:end]]
        return sum(map(likeness.begins_like_a_row, rows)) > len(rows) / 2

    for begin, end, fields in _records(lines, form, joins_rows):
        if fields:
            table.add(end, fields, end - begin)
            _count_marks(table, lines[begin:end], fields)
        elif fields is None and not table.names:
            table.add(end, form.split(_content(lines[begin])))
        elif fields is None:
            stray.append((begin, len(table.rows)))
            table.rows.append(Row(end, {}, STRAY))
    if stray and table.names:
        _read_stray_lines(table, lines, stray, likeness or _Likeness.of(table, lines))
    return table


def _records(
    lines: list[str], form: Form, joins_rows: Callable[[int, int], bool]
) -> Iterator[tuple[int, int, list[str] | None]]:
    """(first line, the line behind the last, fields); no fields where a mark of the first line encloses nothing."""
    begin = 0
    while begin < len(lines):
        start, reader = begin, form.reader(map(lines.__getitem__, range(begin, len(lines))))
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error:
                fields = None
            end = start + reader.line_num
            if fields is None or (end - begin > 1 and joins_rows(begin, end)):
                yield begin, begin + 1, None
                begin += 1
                break
            yield begin, end, fields
            begin = end


def _read_stray_lines(table: Table, lines: list[str], stray: list[tuple[int, int]], likeness: _Likeness) -> None:
    """Those that are rows by themselves, once their marks are text."""
    for line, place in stray:
        table.num_stray += 1
        table.num_bare += 1
        fields = table.form.split(_content(lines[line]))
        if likeness.is_row(fields):
            table.rows[place] = Row(line + 1, dict(zip(table.names, fields)))


def _count_marks(table: Table, lines: list[str], fields: list[str]) -> None:
    if len(lines) > 1:
        table.num_enclosed += 1
        return
    line = lines[0]
    if '"' not in line:
        return
    marked = [part for part in fields if '"' in part]
    if any(table.form.enclosed(part) not in line for part in marked):
        table.num_bare += 1
    elif marked or any(table.form.delimiter in part for part in fields):
        table.num_enclosed += 1


class _Likeness:
    """What the fields of most rows are like: of few values, as labels are, in whatever case, or numbers."""

    def __init__(self, rows: list[list[str]], num_fields: int, delimiter: str) -> None:
        self._num_fields = num_fields
        self._checks: list[tuple[int, Callable[[str], bool]]] = []
        for place in range(num_fields):
            values = {_plain(row[place]) for row in rows}
            if len(values) <= len(rows) / 2:
                self._checks.append((place, values.__contains__))
            elif all(map(_is_number, values)):
                self._checks.append((place, _is_number))
        self._takes_any = not self._checks and delimiter == "\t"  # a tab is hardly ever text

    @classmethod
    def of(cls, table: Table, lines: list[str]) -> _Likeness:
        """By the rows that nothing puts in doubt, or by the lines without a mark where those are more."""
        num = len(table.names)
        doubted = zip(table.rows, _may_be_rows(table, lines))
        known = [list(row.values.values()) for row, in_doubt in doubted if not (in_doubt or row.fault)]
        split = (table.form.split(_content(line)) for line in lines if '"' not in line)
        plain = [fields for fields in split if len(fields) == num][table.form.header :]
        return cls(max(known, plain, key=len), num, table.form.delimiter)

    def is_row(self, fields: list[str]) -> bool:
        return len(fields) == self._num_fields and self.begins_like_a_row(fields)

    def begins_like_a_row(self, fields: list[str]) -> bool:
        """A row, or one with fields too many."""
        if len(fields) < self._num_fields:
            return False
        are_alike = bool(self._checks) and all(check(_plain(fields[place])) for place, check in self._checks)
        return are_alike or self._takes_any


def _may_be_rows(table: Table, lines: list[str]) -> Iterator[bool]:
    """Of each row, whether it is of several lines, most of which have as many fields as a row, or more."""
    for place, row in enumerate(table.rows):
        num_lines = table.num_lines.get(place, 0)
        own = lines[row.line - num_lines : row.line]
        yield sum(len(table.form.split(line)) >= len(table.names) for line in own) > num_lines / 2


def _content(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _plain(field: str) -> str:
    return field.strip().casefold()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _names(fields: list[str]) -> list[str]:
    """Of a header; a column without a name gets its number, from 1."""
    return [name.strip() or f"column {i}" for i, name in enumerate(fields, 1)]
