"""Rows with named columns, wherever they were read, and the error that bad data raises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.config.schema import ColumnsConfig
from fastpeft.errors import UserError

HALF_PAIR = "holds half of a surrogate pair, which is no character"
NUM_NAMED = 3
"""Of rows that are left out, this many are named."""


class DataError(UserError):
    """Data that cannot be used; the message names the file, the line and what was found."""


@dataclass(frozen=True)
class Row:
    """A row as read. `fault` says why it could not be read; then `values` is empty."""

    line: int
    values: dict[str, Any]
    fault: str | None = None


@dataclass(frozen=True)
class Split:
    source: str
    """Names it in messages: a file, or a dataset and its split."""
    rows: list[Row]
    notes: tuple[str, ...] = ()
    """What the user should know of how it was read."""

    @property
    def columns(self) -> list[str]:
        """Names that any row has, in their order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    def require_columns(self) -> list[str]:
        """The same. Raises DataError for a split without rows, and for one in which no row could be read."""
        if not self.rows:
            raise DataError(f"{self.source}: has no rows")
        have = self.columns
        if not have:
            first = self.rows[0]
            raise DataError(f"{self.source}:{first.line}: {first.fault}, and so is every other row")
        return have


def configured_columns(source: str, have: Sequence[str], config: ColumnsConfig) -> dict[str, str]:
    """{text, text_pair, label} -> the column that `dataset.columns` names for it; only those that it names.

    A number names a column of a file without a header, from 0.

    Raises:
        DataError: a column that is not there.
    """
    found = {}
    for key in ("text", "text_pair", "label"):
        column = getattr(config, key)
        for name in column if isinstance(column, list) else [column]:
            if name is None:
                continue
            if str(name) not in have:
                raise DataError(f"{source}: dataset.columns.{key} is {name!r}, but the columns are {', '.join(have)}")
            found.setdefault(key, str(name))
    return found


def text_fault(values: dict[str, Any], column: str) -> str | None:
    """What is wrong with a row's text, None for a text that can be used."""
    text = values.get(column)
    if not isinstance(text, str):
        return f"column {column!r} holds {text!r:.80}, expected text"
    if not text.strip():
        return f"column {column!r} is empty"
    return None if is_unicode(text) else f"column {column!r} {HALF_PAIR}"


def label_text(value: Any) -> str | None:
    """Labels compare as text; 1.0 (a float column with gaps) is 1, and NaN is no label."""
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def is_unicode(text: str) -> bool:
    """Whether the text can be written; half of a surrogate pair, as JSON may hold, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def left_out_note(count: int, what: str, named: Iterable[str]) -> str:
    """`count` rows are left out, and the first of them by name."""
    named = list(named)
    more = ", ..." if count > len(named) else ""
    return f"{count:,} {what} are left out: {'; '.join(named)}{more}"
