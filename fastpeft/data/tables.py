"""csv and tsv: which delimiter, and whether quotes are the file's or the text's, decided by what the file shows.

GLUE's tsv files hold bare quotes as text, so that a reader which takes them for the format's drops the marks and may
join rows; other tsv files quote fields that hold line ends. A count of rows does not show which of them a file is.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fastpeft.data.rows import DataError, Row

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons"}
_SAMPLE_LINES = 50


@dataclass(frozen=True)
class Reading:
    rows: list[Row]
    quoted: bool

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
    quoted = _parse(path, text, delimiter, header, quoted=True)
    if '"' not in text:
        return quoted.rows, notes
    raw = _parse(path, text, delimiter, header, quoted=False)
    chosen = _choose(quoted, raw, text, delimiter)
    if chosen is raw and len(raw.rows) != len(quoted.rows):
        notes += (f"{path}: its quotation marks are text and do not enclose fields: {len(raw.rows):,} rows",)
    return chosen.rows, notes


def _delimiter(text: str, usual: str) -> str:
    """The usual one, unless exactly one other splits each of the first lines into the same number of fields."""
    lines = [line for line in text.split("\n", _SAMPLE_LINES)[:_SAMPLE_LINES] if line.strip()]
    if not lines or _regular(lines, usual):
        return usual
    found = [delimiter for delimiter in _DELIMITERS if delimiter != usual and _regular(lines, delimiter)]
    return found[0] if len(found) == 1 else usual


def _regular(lines: list[str], delimiter: str) -> bool:
    counts = Counter(line.count(delimiter) for line in lines)
    most, times = counts.most_common(1)[0]
    return most > 0 and times == len(lines)


def _choose(quoted: Reading, raw: Reading, text: str, delimiter: str) -> Reading:
    """By faults; then, as both read every row, by whether a writer of csv could have written the file."""
    if quoted.num_faults != raw.num_faults:
        return min(quoted, raw, key=lambda reading: reading.num_faults)
    if raw.num_faults:
        return quoted
    if len(raw.rows) != len(quoted.rows):
        return raw  # every line is whole by itself: a mark that joins lines is no field's
    end = re.escape(delimiter)
    bare = re.compile(rf'(?m)(?:^|{end})[^"{end}\n][^{end}\n]*"')
    if bare.search(text):
        return raw  # a mark inside a field that does not begin with one: a writer would have enclosed and doubled it
    needed = re.compile(rf'(?m)(?:^|{end})"(?:[^"\n]|"")*(?:""|{end})(?:[^"\n]|"")*"(?={end}|\r?$)')
    if needed.search(text) or delimiter != "\t":
        return quoted
    enclosed = re.compile(rf'^"[^"]*"(?:{end}"[^"]*")*\r?$')
    lines = [line for line in text.split("\n") if line.strip()]
    return quoted if all(enclosed.match(line) for line in lines[:_SAMPLE_LINES]) else raw


def _parse(path: Path, text: str, delimiter: str, header: bool, quoted: bool) -> Reading:
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(text, newline="")  # str.splitlines would end a row at U+2028 and others
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    rows: list[Row] = []
    names: list[str] | None = None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return Reading(rows, quoted)
        except csv.Error as error:
            rows.append(Row(reader.line_num, {}, f"is malformed ({error})"))
            if names is None:
                return Reading(rows, quoted)
            continue
        if not fields:
            continue
        if names is None:
            names = [name.strip() for name in fields] if header else [str(i) for i in range(len(fields))]
            if len(set(names)) < len(names):
                raise DataError(f"{path}:1: the header names a column twice: {', '.join(names)}")
            if header:
                continue
        if len(fields) == len(names):
            rows.append(Row(reader.line_num, dict(zip(names, fields))))
        else:
            what = "the header" if header else "the first line"
            rows.append(Row(reader.line_num, {}, f"has {len(fields)} fields, {what} {len(names)}"))
