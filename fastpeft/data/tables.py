"""csv and tsv: what separates their columns, and whether quotation marks are the file's or the text's.

Both are decided over the whole file by what it shows. GLUE's tsv files hold bare marks as text, so that a reader which
takes them for the format's drops them and may join rows; other tsv files enclose fields that hold line ends. A count of
rows does not show which of them a file is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fastpeft.data.delimited import STRAY, Form, Table, read_enclosed, read_plain
from fastpeft.data.rows import DataError, Row
from fastpeft.data.text_files import format_of

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_ENCLOSED = re.compile(r'"[^"]*"\s*')
_MOSTLY = 0.9


def read_table(path: Path, text: str, header: bool = True) -> tuple[list[Row], tuple[str, ...]]:
    """Rows, and in one line what was decided where it is not what the file's suffix says.

    Args:
        header: the first line names the columns; else they are named by their numbers, from 0.

    Raises:
        DataError: a header that names a column twice.
    """
    usual = "," if format_of(path) == ".csv" else "\t"
    first_line = text.lstrip().partition("\n")[0]
    delimiters = [usual, *(other for other in _DELIMITERS if other != usual)]
    found = [one for one in delimiters if one in first_line] or [usual]
    readings = [_read(text, _form(one, first_line, header)) for one in found]
    table, marks_are_text = min(readings, key=_share_of_faults)  # the usual one where several leave as little open
    if len(set(table.names)) < len(table.names):
        raise DataError(f"{path}:1: the header names a column twice: {', '.join(table.names)}")
    decided = list(_decisions(table, usual, marks_are_text))
    return table.rows, (f"{path}: {'; '.join(decided)}",) if decided else ()


def _form(delimiter: str, first_line: str, header: bool) -> Form:
    parts = first_line.split(delimiter)[1:]
    return Form(delimiter, header, is_spaced=bool(parts) and all(part.startswith(" ") for part in parts))


def _read(text: str, form: Form) -> tuple[Table, bool]:
    """(the rows, whether there are marks that another reader would take for the format's)."""
    plain = read_plain(text, form)
    if '"' not in text:
        return plain, False
    enclosed = read_enclosed(text, form)
    if enclosed.num_bare and '\\"' in text:
        escaped = read_enclosed(text, replace(form, escape="\\"))
        enclosed = escaped if not escaped.num_bare and not escaped.num_faults else enclosed
    if _marks_enclose(enclosed, plain):
        return enclosed, False
    return plain, enclosed.num_stray > 0 or enclosed.rows != plain.rows


def _marks_enclose(enclosed: Table, plain: Table) -> bool:
    """By a column that is enclosed throughout; then by the rows that cannot be read; then by whether a writer of
    enclosed fields could have written the file; else as csv files are and tsv files are not."""
    if _has_enclosed_column(plain):
        return True
    if enclosed.num_faults != plain.num_faults:
        return enclosed.num_faults < plain.num_faults
    if enclosed.num_enclosed != enclosed.num_bare:
        return enclosed.num_enclosed > enclosed.num_bare
    return plain.form.delimiter != "\t"


def _has_enclosed_column(plain: Table) -> bool:
    rows = [row for row in plain.rows if row.fault is None]
    if 2 * len(rows) < len(plain.rows):
        return False
    counts = (sum(_ENCLOSED.fullmatch(row.values[name]) is not None for row in rows) for name in plain.names)
    return bool(rows) and any(count >= _MOSTLY * len(rows) for count in counts)


def _share_of_faults(reading: tuple[Table, bool]) -> float:
    """1 for a table of one column: nothing is separated."""
    table = reading[0]
    return table.num_faults / max(1, len(table.rows)) if len(table.names) > 1 else 1.0


def _decisions(table: Table, usual: str, marks_are_text: bool) -> Iterator[str]:
    delimiter, num_rows = table.form.delimiter, len(table.rows)
    if delimiter != usual:
        yield f"its columns are separated by {_DELIMITERS[delimiter]}"
    if marks_are_text:
        yield f"its quotation marks are text and enclose no fields: {num_rows:,} rows"
    if table.form.escape:
        yield "backslashes stand before the quotation marks that are text"
    if table.num_lines:
        num_lines = num_rows + sum(count - 1 for count in table.num_lines.values())
        yield f"its quotation marks enclose fields of several lines: {num_rows:,} rows in {num_lines:,} lines"
    num_mended = table.num_stray - sum(row.fault == STRAY for row in table.rows)
    if num_mended:
        rows_have = "row has" if num_mended == 1 else "rows have"
        yield f"{num_mended:,} {rows_have} a quotation mark that encloses nothing and is text"
    if table.num_blank:
        yield f"{table.num_blank:,} rows without any text are left out"
