"""csv and tsv: which delimiter, and whether quotes are the file's or the text's, decided by what the file shows.

GLUE's tsv files hold bare quotes as text, so that a reader which takes them for the format's drops the marks and may
join rows; other tsv files quote fields that hold line ends. A count of rows does not show which of them a file is.
"""

from __future__ import annotations

import bisect
import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fastpeft.data.rows import DataError, Row

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons"}
_SAMPLE_LINES = 50
_ENCLOSED = re.compile(r'"[^"]*"\s*')


@dataclass(frozen=True)
class Reading:
    rows: list[Row]
    names: list[str]

    @property
    def num_faults(self) -> int:
        return sum(row.fault is not None for row in self.rows)


def read_table(path: Path, text: str, header: bool = True) -> tuple[list[Row], tuple[str, ...]]:
    """Rows, and what was decided where it is not what the file's suffix says.

    Args:
        header: the first line names the columns; else they are named by their numbers, from 0.

    Raises:
        DataError: a header that names a column twice.
    """
    usual = "," if path.suffix == ".csv" else "\t"
    delimiter = _delimiter(text, usual)
    notes = () if delimiter == usual else (f"{path}: its columns are separated by {_DELIMITERS[delimiter]}",)
    chosen = quoted = _parse(text, delimiter, header, quoted=True)
    if '"' in text:
        raw = _parse(text, delimiter, header, quoted=False)
        chosen = _choose(quoted, raw, text, delimiter)
        if chosen is raw and raw.rows != quoted.rows:
            notes += (f"{path}: its quotation marks are text and enclose no fields: {len(raw.rows):,} rows",)
    if len(set(chosen.names)) < len(chosen.names):
        raise DataError(f"{path}:1: the header names a column twice: {', '.join(chosen.names)}")
    return chosen.rows, notes


def _delimiter(text: str, usual: str) -> str:
    """The usual one, unless the first line holds another and not that, or exactly one other splits each of the first
    lines into the same number of fields."""
    lines = [line for line in text.split("\n", _SAMPLE_LINES)[:_SAMPLE_LINES] if line.strip()]
    if not lines or _regular(lines, usual):
        return usual
    others = [delimiter for delimiter in _DELIMITERS if delimiter in lines[0] and delimiter != usual]
    if usual in lines[0] or len(others) != 1:
        others = [delimiter for delimiter in others if _regular(lines, delimiter)]
    return others[0] if len(others) == 1 else usual


def _regular(lines: list[str], delimiter: str) -> bool:
    counts = Counter(line.count(delimiter) for line in lines)
    most, times = counts.most_common(1)[0]
    return most > 0 and times == len(lines)


def _choose(quoted: Reading, raw: Reading, text: str, delimiter: str) -> Reading:
    """By what the marks join; then by the rows that cannot be read; then by whether a writer of quoted fields could
    have written the file."""
    if raw.num_faults and delimiter != "\t":
        return quoted  # csv is quoted by its standard, and read otherwise only where that leaves nothing open
    joined, alone = _joined_lines(quoted, raw)
    whole = [row for row in joined if len(row.values) > 1]
    if len(whole) > len(joined) / 2 and (delimiter == "\t" or _are_alike(whole, alone)):
        return raw  # lines that are rows by themselves, and that marks which open and close by accident would join
    if quoted.num_faults != raw.num_faults:
        return min(quoted, raw, key=lambda reading: reading.num_faults)
    if joined or delimiter != "\t":
        return quoted
    end = re.escape(delimiter)
    if re.search(rf'(?m)(?:^|{end})[^"{end}\n][^{end}\n]*"', text):
        return raw  # a mark inside a field that begins with none: a writer would have enclosed the field
    if re.search(rf'(?m)(?:^|{end})"(?:[^"\n]|"")*(?:""|{end})(?:[^"\n]|"")*"(?={end}|\r?$)', text):
        return quoted  # a field that had to be enclosed
    columns = ([row.values.get(name, "") for row in raw.rows] for name in raw.names)
    return quoted if any(all(map(_ENCLOSED.fullmatch, column)) for column in columns) else raw


def _joined_lines(quoted: Reading, raw: Reading) -> tuple[list[Row], list[Row]]:
    """The lines that marks join with others into one row, and those that are rows by themselves in both readings."""
    ends = sorted(row.line for row in quoted.rows)
    places = [bisect.bisect_left(ends, row.line) for row in raw.rows]
    num_lines = Counter(places)
    joined, alone = [], []
    for row, place in zip(raw.rows, places):
        (joined if num_lines[place] > 1 else alone).append(row)
    return joined, alone


def _are_alike(rows: list[Row], others: list[Row]) -> bool:
    """Whether in a column of few values, such as labels, `rows` hold none but those of `others`."""
    others = [row for row in others if row.values]
    for name in rows[0].values:
        known = {row.values[name] for row in others}
        if len(known) <= len(others) / 2 and all(row.values[name] in known for row in rows):
            return True
    return False


def _parse(text: str, delimiter: str, header: bool, quoted: bool) -> Reading:
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(text, newline="")  # str.splitlines would end a row at U+2028 and others
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    rows: list[Row] = []
    names: list[str] = []
    while True:
        fault = None
        try:
            fields = next(reader)
        except StopIteration:
            return Reading(rows, names)
        except csv.Error as error:
            fields, fault = [], f"is malformed ({error})"
        if not fields and fault is None:
            continue
        if not names and fault is None:
            names = [name.strip() for name in fields] if header else [str(i) for i in range(len(fields))]
            if header:
                continue
        if fault is None and len(fields) != len(names):
            what = "the header" if header else "the first line"
            fault = f"has {len(fields)} fields, {what} {len(names)}"
        if fault is None:
            rows.append(Row(reader.line_num, dict(zip(names, fields))))
            continue
        rows.append(Row(reader.line_num, {}, fault))
        if not names:
            return Reading(rows, names)
