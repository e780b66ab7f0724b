"""What a model answered to each row of a split, as a file of a run: one JSON object a line, behind a header.

A comparison on the same rows reads it: tests that pair two runs row by row, a confusion matrix, a list of errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from fastpeft.atomic_write import write_atomically
from fastpeft.data.fingerprint import ReadRow
from fastpeft.errors import UserError
from fastpeft.runs.events import finite, number

_FORMAT = 1
_LONGEST = 2000
"""Characters of a text that is kept beside a wrong answer."""


class Answer(NamedTuple):
    """To one row. The metric of the split comes from `correct`, else from `counts`, else from the two numbers."""

    gold: Any
    """As JSON: a label's name, a number, a list of tags or of labels, a text."""
    predicted: Any
    correct: bool | None = None
    """The metric is the share of rows where it holds."""
    counts: tuple[int, int, int] | None = None
    """Things found rightly, found, and there to be found: the metric is 2 x first / (second + third), of all rows."""


AnsweredRows = Iterable[tuple[ReadRow, Answer]]


@dataclass(frozen=True)
class Predictions:
    """Of N rows, in the rows' order."""

    split: str
    step: int
    """Of the weights."""
    metric: str
    value: float
    rows: str
    """SHA-256 of the rows, what they ask and what is wanted, in order: rows of two files with one hash are the same."""
    answers: list[Answer]
    given: list[tuple[str, ...]]
    """What the model read, cut; empty for a row that was answered rightly."""


def write_predictions(path: Path, answered: AnsweredRows, *, split: str, step: int, metric: str, value: float) -> None:
    """Replaces the file whole. A text that is longer than 2,000 characters is cut."""
    digest, lines = hashlib.sha256(), []
    for row, answer in answered:
        digest.update(ascii((tuple(row.given), tuple(row.wanted))).encode())
        lines.append(json.dumps(finite(_record(row, answer)), allow_nan=False, separators=(",", ":")))
    header = {
        "format": _FORMAT,
        "split": split,
        "step": step,
        "metric": metric,
        "value": finite(value),
        "num": len(lines),
        "rows": digest.hexdigest(),
    }
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "\n".join([json.dumps(header), *lines]) + "\n")


def _record(row: ReadRow, answer: Answer) -> dict[str, Any]:
    record = {key: value for key, value in answer._asdict().items() if value is not None}
    is_right = answer.correct or (answer.counts is not None and len(set(answer.counts)) == 1)
    return record if is_right else record | {"given": [text[:_LONGEST] for text in row.given]}


def read_predictions(path: Path) -> Predictions | None:
    """None where there is no such file.

    Raises:
        UserError: a file that is damaged, or of another version.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            if header["format"] != _FORMAT:
                raise UserError(f"{path}: written by another version of fastpeft, format {header['format']}")
            answers, given = [], []
            for answer, texts in _records(file):
                answers.append(answer)
                given.append(texts)
        if len(answers) != header["num"]:
            raise ValueError(f"{len(answers):,} of {header['num']:,} rows")
        return Predictions(
            split=header["split"],
            step=header["step"],
            metric=header["metric"],
            value=number(header["value"]),
            rows=header["rows"],
            answers=answers,
            given=given,
        )
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, and the run is compared without it") from None


def _records(lines: Iterable[bytes]) -> Iterator[tuple[Answer, tuple[str, ...]]]:
    for line in lines:
        record = _parse(line)
        counts = record.get("counts")
        answer = Answer(
            record["gold"], record["predicted"], record.get("correct"), None if counts is None else tuple(counts)
        )
        yield answer, tuple(record.get("given", ()))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        return orjson.loads(line)
    except ValueError:  # half of a surrogate pair, which an answer may have, is JSON all the same
        return json.loads(line)
