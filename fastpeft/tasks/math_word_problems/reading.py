"""Word problems with a number as their answer: GSM8K, and the sets that a model trained on it is scored on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from fastpeft.config.schema import ColumnsConfig, DatasetConfig
from fastpeft.data.fingerprint import ReadRow
from fastpeft.data.local import find_test, read_split
from fastpeft.data.rows import (
    NUM_NAMED,
    DataError,
    Split,
    configured_columns,
    left_out_note,
    text_fault,
)
from fastpeft.data.source import TEST, TRAIN, VALIDATION, Source
from fastpeft.data.splitting import choose_held_out, sample, shared_note
from fastpeft.tasks.causal_lm.prompts import Prompted
from fastpeft.tasks.math_word_problems.answers import MARK, final_number, number_text, parse_number

# Question columns, which are joined, and answer column: GSM8K, GSM1k; MultiArith on the hub; SVAMP; MAWPS's sets.
_SHAPES = (
    (("question",), "answer"),
    (("question",), "final_ans"),
    (("Body", "Question"), "Answer"),
    (("sQuestion",), "lSolutions"),
)


@dataclass(frozen=True)
class Problems:
    """Parallel columns."""

    question: list[str]
    answer: list[str]
    """Worked answers; each ends in `#### number`."""
    where: list[str] | None = None
    """File and line of each, for messages."""
    source: str = ""
    num_skipped: int = 0
    """Rows left out under on_bad_row: skip."""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.question)

    @property
    def texts(self) -> list[tuple[str]]:
        return [(question,) for question in self.question]

    def sample(self, limit: int) -> Problems:
        """As many rows, drawn at random, the same ones whatever the seed; 0 means all."""
        return self.pick(sample(len(self), limit)) if limit else self

    def pick(self, rows: Sequence[int]) -> Problems:
        question, answer, where = (
            None if column is None else [column[row] for row in rows]
            for column in (self.question, self.answer, self.where)
        )
        return dataclasses.replace(self, question=question, answer=answer, where=where)

    def name_row(self, row: int) -> str:
        return self.where[row] if self.where else f"row {row + 1}"


def problem_rows(problems: Problems) -> Iterator[ReadRow]:
    return (ReadRow((question,), (answer,)) for question, answer in zip(problems.question, problems.answer))


@dataclass(frozen=True)
class ProblemSplits:
    name: str
    train: Problems
    validation: Problems
    """Training rows held out."""
    test: Problems | None
    """Scored once, when all else is done."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the data were read."""


def fill_prompt(template: str, question: str) -> str:
    """What the model reads. Braces in the question are text."""
    return template.replace("{question}", question)


def as_prompts(problems: Problems, template: str) -> Prompted:
    """What a model reads and writes: an answer follows its prompt behind a space."""
    return Prompted(
        [fill_prompt(template, question) for question in problems.question],
        [" " + answer for answer in problems.answer],
        problems.name_row,
        "problems",
    )


def read_problem_splits(config: DatasetConfig, source: Source) -> ProblemSplits:
    """The splits of a `dataset` section: dataset.held_out training rows are the validation split.

    Raises:
        DataError: a missing file, split or column, a malformed row, too few rows to hold `held_out` of them out.
    """
    for key in ("labels", "validation_split"):
        if getattr(config, key) is not None:
            raise DataError(f"dataset.{key}: {_NOT_OURS[key]}")
    train, notes = _read_split(config, source, TRAIN), []
    test = _read_split(config, source, TEST) if source.has(TEST) else None
    instead = f"is not read: {config.held_out:,} training problems are held out instead"
    notes += [f"{path} {instead}" for path in source.paths(VALIDATION)]
    if test is None:
        notes.append(
            f"{source.name} has no test split: nothing is scored but the {config.held_out:,} problems held out"
        )
    kept, held_out = _hold_out(source.name, train, config.held_out)
    notes += [*kept.notes, *(test.notes if test else ())]
    notes += shared_note(kept.texts, test.texts, "test problems") if test else []
    return ProblemSplits(source.name, kept, held_out, test, tuple(notes))


def load_problems(path: str, on_bad_row: str = "error", columns: ColumnsConfig | None = None) -> Problems:
    """A set to score on, from a file, or from a folder with a test.* file or with one file only.

    Its columns tell GSM8K's and GSM1k's shape (question, answer), SVAMP's (Body, Question, Answer) and that of
    MultiArith, AddSub and SingleEq (sQuestion, lSolutions) apart; `source` and `where` say where it comes from.

    Raises:
        DataError: no such file, other columns, a malformed row.
    """
    return _read(read_split(find_test(Path(path).expanduser())), columns or ColumnsConfig(), on_bad_row)


def read_problem_set(path: Path, config: DatasetConfig) -> Problems:
    """By the run's own columns where the file has them, else by those of the known sets."""
    if config.columns == ColumnsConfig():
        return load_problems(str(path), config.on_bad_row)
    try:
        return load_problems(str(path), config.on_bad_row, config.columns)
    except DataError as error:
        try:
            return load_problems(str(path), config.on_bad_row)
        except DataError:
            raise error from None


_NOT_OURS = {
    "labels": "word problems have no labels; remove it, or set dataset.task=classification",
    "validation_split": "word problems are tuned on dataset.held_out training rows; remove it",
}


def _read_split(config: DatasetConfig, source: Source, split: str) -> Problems:
    question, answer = _choose_columns(source.describe_split(split), source.columns(split), config.columns)
    return _read(source.read(split, [*question, answer]), config.columns, config.on_bad_row)


def _hold_out(name: str, train: Problems, num_held_out: int) -> tuple[Problems, Problems]:
    """(rows to train on, rows held out). A question that is held out is nowhere trained on."""
    if num_held_out >= len(train):
        raise DataError(
            f"dataset.held_out: {num_held_out:,} rows are to be held out, but {name} has {len(train):,} training rows "
            "in all. Set it lower, to a tenth of them for instance"
        )
    rows, held_out = choose_held_out(len(train), num_held_out)
    asked = {train.question[row] for row in held_out}
    kept = [row for row in rows if train.question[row] not in asked]
    if not kept:
        raise DataError(f"{train.source}: every question is among those held out, so that none is left to train on")
    result = train.pick(kept)
    if len(kept) < len(rows):
        note = f"{len(rows) - len(kept):,} training rows ask a question that is held out, and are left out"
        result = dataclasses.replace(result, notes=(*train.notes, note))
    return result, train.pick(held_out)


# ---- rows ----------------------------------------------------------------------------------


def _choose_columns(source: str, have: Sequence[str], columns: ColumnsConfig) -> tuple[tuple[str, ...], str]:
    """(question columns, answer column): as configured, else the first known shape."""
    given = configured_columns(source, have, columns)
    known = next((shape for shape in _SHAPES if {*shape[0], shape[1]} <= set(have)), None)
    named = tuple(given[key] for key in ("text", "text_pair") if key in given)
    question = named if "text" in given else known and known[0]
    answer = given.get("label") or (known and known[1])
    if question and answer:
        return question, answer
    shapes = "; ".join(f"{' and '.join(q)} with {a}" for q, a in _SHAPES)
    raise DataError(
        f"{source}: which columns are the question and the answer? The columns are {', '.join(have)}; known are "
        f"{shapes}. Set dataset.columns.text and dataset.columns.label"
    )


def _read(split: Split, columns: ColumnsConfig, on_bad_row: str) -> Problems:
    """Rows as problems. Bad ones are all looked for, so that the message, or the note, tells how many there are."""
    have = split.require_columns()
    question_columns, answer_column = _choose_columns(split.source, have, columns)
    worked = any(MARK in str(row.values.get(answer_column)) for row in split.rows)
    question, answer, where, faults = [], [], [], []
    for row in split.rows:
        text, fault = _answer(row.values.get(answer_column), answer_column, worked)
        fault = row.fault or next(filter(None, (text_fault(row.values, c) for c in question_columns)), None) or fault
        place = f"{split.source}:{row.line}"
        if fault:
            faults.append(f"{place}: {fault}")
            continue
        question.append(" ".join(row.values[c].strip() for c in question_columns))
        answer.append(text)
        where.append(place)
    if faults and on_bad_row != "skip":
        others = f" (and {len(faults) - 1:,} more bad rows)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{others}. Mend the row, or set dataset.on_bad_row=skip")
    if not question:
        raise DataError(f"{split.source}: all {len(faults):,} rows are malformed; the first: {faults[0]}")
    note = left_out_note(len(faults), "bad rows", faults[:NUM_NAMED])
    notes = (*split.notes, note) if faults else split.notes
    return Problems(question, answer, where, split.source, len(faults), notes)


def _answer(value: Any, column: str, worked: bool) -> tuple[str, str | None]:
    """(reference answer, fault). In a file without any `####` the answers are plain numbers."""
    if worked:
        fault = text_fault({column: value}, column)
        if fault is None and final_number(value) is None:
            missing = f"number after its {MARK}" if MARK in value else MARK
            fault = f"column {column!r} has no {missing}"
        return ("", fault) if fault else (value.strip(), None)
    number = _plain_number(value[0] if isinstance(value, list) and len(value) == 1 else value)
    text = "" if number is None else f"{MARK} {number_text(number)}"
    if final_number(text) is None:
        return "", f"column {column!r} holds {value!r:.80}, neither a number nor a worked answer with {MARK}"
    return text, None


def _plain_number(value: Any) -> Fraction | None:
    """Of a solution as data hold it. The decimals of a double, as in 0.6666666666666666, become the fraction again."""
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, (int, float)):
        number = Fraction(repr(value))
    else:
        number = parse_number(value) if isinstance(value, str) else None
    if number is None or number.denominator <= 10**12:
        return number
    simple = number.limit_denominator(1000)
    return simple if abs(simple - number) * 10**15 <= abs(number) else number
