"""Report of one run: metrics.json, its figures, and the data for the comparison and the page."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from fastpeft.compare.comparison import Curve
from fastpeft.compare.found_runs import Found
from fastpeft.compare.history import History, read_history
from fastpeft.compare.row_scores import RowScores
from fastpeft.compare.run_figures import classes_of, draw_confusion, draw_curves, draw_importance
from fastpeft.config import load_run, run_values
from fastpeft.data.predictions import Answer, Predictions, read_predictions
from fastpeft.errors import UserError
from fastpeft.runs.curves import Budgets, auc_of, evaluations, to_target_of
from fastpeft.runs.events import Event, finite, number, read_lines
from fastpeft.runs.store import Result, RunFolder, read_json

RESCORED = "rescored.json"
NUM_ERRORS = 8
_LAST_STEPS = 50
_LONGEST = 300
"""Maximum characters of a text in the list of errors."""
_AS_FLOAT32 = ("loss", "penalty", "lr", "grad_norm")
_AS_INT = ("step", "tokens")


@dataclass(frozen=True)
class WrongAnswer:
    given: str
    gold: str
    predicted: str


@dataclass(frozen=True)
class RunReport:
    name: str
    curve: Curve = field(default_factory=Curve)
    validations: list[Event] = field(default_factory=list)
    scores: RowScores | None = None
    """Row scores of the compared weights and split; None if the run stored no answers."""
    figures: dict[str, str] = field(default_factory=dict)
    """Topic -> SVG; the files are FOLDER/figures/NAME_TOPIC.{pdf,png}."""
    wrong: list[WrongAnswer] = field(default_factory=list)
    num_wrong: int = 0
    rescored: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 0
    notes: list[str] = field(default_factory=list)


def report_run(found: Found, by: str, target: float | None) -> RunReport:
    """Write FOLDER/metrics.json and the figures of a run. Without a log, nothing is written.

    Args:
        by: the score that is compared: metric, best or test.
    """
    folder, result = found.folder, found.result
    if folder is None or result is None or not folder.events.is_file():
        return RunReport(found.name)
    history, notes = read_history(read_lines(folder.events)), []
    curve = _curve_of(history, result, target)
    predictions = _predictions_of(folder, result, by, notes)
    if history.warnings:
        notes.append(f"{history.num_warnings:,} warnings, such as: {history.warnings[0]}")
    _write_metrics(folder, result, history, curve, target)
    wrong = [] if predictions is None else _wrong_rows(predictions)
    return RunReport(
        name=found.name,
        curve=curve,
        validations=[_without(event, "groups", "more") for event in history.validations],
        scores=None if predictions is None else RowScores.of(predictions),
        figures=_draw(folder, result, history, predictions),
        wrong=[] if predictions is None else [_in_words(predictions, row) for row in _spread(wrong)],
        num_wrong=len(wrong),
        rescored=read_json(folder.path / RESCORED) or {},
        num_steps=len(history),
        notes=notes,
    )


def _curve_of(history: History, result: Result, target: float | None) -> Curve:
    """The area under the metric, and the time and energy to `target`."""
    found = evaluations(history.validations)
    budgets = Budgets.of(result.budget, result.elapsed_s, result.energy_j)
    return Curve(auc_of(found, budgets), {} if target is None else to_target_of(found, target))


def _predictions_of(folder: RunFolder, result: Result, by: str, notes: list[str]) -> Predictions | None:
    """Answers behind the compared score. None, with a note, if they are unreadable or of another evaluation."""
    which = "last" if by == "metric" else by
    try:
        found = read_predictions(folder.predictions(which))
    except UserError as error:
        notes.append(str(error))
        return None
    score = getattr(result, by)
    if found is None or "value" not in score:
        return None
    if not np.isclose(found.value, number(score["value"]), rtol=1e-6, atol=1e-9, equal_nan=True):
        notes.append(f"{folder.predictions(which)} is of another evaluation than the score: it is left out")
        return None
    return found


def _draw(folder: RunFolder, result: Result, history: History, predictions: Predictions | None) -> dict[str, str]:
    def stem(topic: str) -> Path:
        return folder.path / "figures" / f"{folder.path.name}_{topic}"

    figures = {}
    if len(history) or history.validations:
        figures["curves"] = draw_curves(history, result, stem("curves"))
    if history.importance:
        figures["importance"] = draw_importance(history, result, stem("importance"))
    classes = None if predictions is None else classes_of(predictions, result.labels)
    if predictions is not None and classes is not None:
        figures["confusion"] = draw_confusion(predictions, classes, result, stem("confusion"))
    return figures


# ---- metrics.json --------------------------------------------------------------------------


def _write_metrics(folder: RunFolder, result: Result, history: History, curve: Curve, target: float | None) -> None:
    """Write all measurements of the run on one line. null is a number that is missing or not finite."""
    losses = history.steps["loss"][-_LAST_STEPS:]
    values = {
        **_well_formed(finite(dataclasses.asdict(result))),
        "auc": curve.auc,
        "target": None if target is None else {"value": target, **curve.target},
        "evaluations": [_without(event, "type", "time_s", "split") for event in history.validations],
        "other_splits": [_without(event, "type", "time_s") for event in history.tests],
        "last_loss": float(losses.mean()) if len(losses) else None,
        "tokens_per_s": result.tokens / result.elapsed_s if result.elapsed_s else None,
        "steps_logged": len(history),
        "warnings": history.num_warnings,
        "config": _well_formed(_config_of(folder, history)),
        "history": {
            "steps": {name: _compact(name, column) for name, column in history.steps.items()},
            "system": {name: column.astype(np.float32) for name, column in history.system.items()},
            "importance": [
                {"elapsed_s": one.elapsed_s, "names": one.names, "weights": one.weights} for one in history.importance
            ],
        },
    }
    path = folder.path / "metrics.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    temporary.replace(path)


def _compact(name: str, column: np.ndarray) -> np.ndarray:
    """The column as integers or float32 where that is enough, for a shorter file."""
    if name in _AS_INT and np.isfinite(column).all():
        return column.astype(np.int64)
    return column.astype(np.float32) if name in _AS_FLOAT32 else column


def _config_of(folder: RunFolder, history: History) -> dict[str, Any]:
    """The config with all defaults, from the log, or else from run.yaml."""
    if history.config:
        return history.config
    try:
        return run_values(load_run(folder.config))
    except UserError:
        return {}


def _well_formed(value: Any) -> Any:
    """The value with lone surrogates escaped: paths may contain them, but UTF-8 cannot encode them."""
    if isinstance(value, dict):
        return {key: _well_formed(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_well_formed(one) for one in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _without(event: Event, *keys: str) -> Event:
    return {key: value for key, value in event.items() if key not in keys}


# ---- errors --------------------------------------------------------------------------------


def _wrong_rows(predictions: Predictions) -> list[int]:
    """Wrongly answered rows, in order. For numbers, the NUM_ERRORS rows with the largest error, the worst first."""
    rows = [row for row, given in enumerate(predictions.given) if given]
    answers = predictions.answers
    if rows and answers[rows[0]].correct is None and answers[rows[0]].counts is None:
        apart = [abs(number(answers[row].predicted) - number(answers[row].gold)) for row in rows]
        return [rows[i] for i in np.argsort(apart)[::-1][:NUM_ERRORS]]
    return rows


def _spread(rows: Sequence[int]) -> list[int]:
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(NUM_ERRORS, len(rows))).astype(int)]


def _in_words(predictions: Predictions, row: int) -> WrongAnswer:
    answer, given = predictions.answers[row], predictions.given[row]
    if _is_tagged(answer, given):
        gold, said = (
            " ".join(f"{word}/{tag}" for word, tag, other in zip(given, one, another) if tag != other)
            for one, another in ((answer.gold, answer.predicted), (answer.predicted, answer.gold))
        )
        return WrongAnswer(_cut(" ".join(given)), _cut(gold), _cut(said))
    return WrongAnswer(_cut(" | ".join(given)), _cut(_text(answer.gold)), _cut(_text(answer.predicted)))


def _is_tagged(answer: Answer, given: Sequence[str]) -> bool:
    """Whether the answer is one tag per word. Rows of one or two texts are excluded: they may have as many labels."""
    lists = isinstance(answer.gold, list) and isinstance(answer.predicted, list)
    is_tagged = lists and answer.counts is not None and len(given) > 2
    return is_tagged and len(answer.gold) == len(answer.predicted) == len(given)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST else flat[: _LONGEST - 1] + "…"
