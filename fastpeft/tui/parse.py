"""Parses many lines of events.jsonl at a time into columns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import orjson

from fastpeft.runs.curves import VALIDATION, is_validation
from fastpeft.runs.events import Event, number
from fastpeft.runs.parts import Groups
from fastpeft.tui.answer_list import AnswerSet, Pieces, read_answers, read_example
from fastpeft.tui.format import printable
from fastpeft.tui.series import Floats, StepTable

_STEP = StepTable.READ[:-1]  # only penalty_share may be missing
_STEP_ROW: np.dtype[Any] = np.dtype((np.float64, len(_STEP)))
_step_values = itemgetter(*_STEP)
_TYPE_OF = itemgetter("type")


class Notable(NamedTuple):
    """An event for the log on the screen."""

    elapsed_s: float
    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Blocks:
    """A model's matrices, and the time of a logged event about them."""

    elapsed_s: float
    step: int
    names: tuple[str, ...]
    layer: tuple[int, ...]
    projection: tuple[str, ...]


@dataclass(frozen=True)
class Importance(Blocks):
    """One importance event. `sensitivity` and `ranks` are None if the method has none."""

    weights: Floats
    sensitivity: Floats | None = None
    ranks: Floats | None = None


@dataclass(frozen=True)
class Rates(Blocks):
    """One rates event: the schedule's multiplier of each block's learning rate."""

    multipliers: Floats


class SplitScore(NamedTuple):
    """The score of a split other than validation, which is scored once."""

    split: str
    metric: str
    value: float


@dataclass(frozen=True)
class PartScores:
    """Metrics of parts of a split, such as entity types, at one evaluation."""

    split: str
    step: int
    groups: Groups


@dataclass
class Parsed:
    """The content of some complete lines."""

    steps_CN: Floats = field(default_factory=lambda: np.empty((len(StepTable.READ), 0)))
    values: dict[str, Floats] = field(default_factory=dict)
    """Series -> its columns: elapsed_s, step, value, and for some series more, as in COLUMNS."""
    notable: list[Notable] = field(default_factory=list)
    importance: list[Importance] = field(default_factory=list)
    rates: list[Rates] = field(default_factory=list)
    tests: list[SplitScore] = field(default_factory=list)
    parts: list[PartScores] = field(default_factory=list)
    answers: list[AnswerSet] = field(default_factory=list)
    example: Pieces | None = None
    header: Event | None = None
    phase: Event | None = None
    end: Event | None = None
    malformed: int = 0
    num_events: int = 0


def parse(lines: bytes) -> Parsed:
    """Parse lines, each ended by a newline. Malformed lines are counted; unknown event types are skipped."""
    parsed = Parsed()
    events = _events(lines, parsed)
    steps = [e for e in events if e["type"] == "step"]
    parsed.num_events = len(events)
    parsed.steps_CN = _steps(steps, parsed)
    if len(steps) < len(events):
        _others([e for e in events if e["type"] != "step"], parsed)
    return parsed


def _events(lines: bytes, parsed: Parsed) -> list[Event]:
    num_lines = lines.count(b"\n")
    try:
        events = orjson.loads(b"[" + lines[:-1].replace(b"\n", b",") + b"]")
        if len(events) == num_lines and all(map(_TYPE_OF, events)):
            return events
    except (ValueError, TypeError, KeyError):
        pass
    found = [e for line in lines[:-1].split(b"\n") if (e := _event(line)) is not None]
    parsed.malformed += num_lines - len(found)
    return found


def _event(line: bytes) -> Event | None:
    try:
        event = orjson.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("type"), str) else None


def _steps(events: list[Event], parsed: Parsed) -> Floats:
    """NumPy reads "nan", "inf" and null as floats."""
    if not events:
        return parsed.steps_CN
    try:
        table_NC = np.fromiter(map(_step_values, events), dtype=_STEP_ROW, count=len(events))
        share_N = np.array([e.get("penalty_share") for e in events], dtype=float)
    except (KeyError, TypeError, ValueError):
        return _steps_one_by_one(events, parsed)
    steps_CN = np.concatenate([table_NC.T, share_N[None]])
    steps_CN[2] = np.nan_to_num(steps_CN[2])  # tokens are summed, so nan would spread
    return steps_CN


def _steps_one_by_one(events: list[Event], parsed: Parsed) -> Floats:
    """The slow path, if some line is not a step as the trainer writes it. A step without axis values is malformed."""
    rows = []
    for event in events:
        try:
            row = [_float(event.get(key)) for key in StepTable.READ]
        except (TypeError, ValueError):
            row = [math.nan]
        if math.isfinite(row[0]) and math.isfinite(row[1]):
            row[2] = row[2] if math.isfinite(row[2]) else 0.0
            rows.append(row)
        else:
            parsed.malformed += 1
            parsed.num_events -= 1
    return np.array(rows).reshape(-1, len(StepTable.READ)).T


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _others(events: Iterable[Event], parsed: Parsed) -> None:
    values: dict[str, list[list[float]]] = defaultdict(list)
    for event in events:
        try:
            _other(event, parsed, values)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            parsed.malformed += 1
            parsed.num_events -= 1
    parsed.values = {key: np.array(rows).T for key, rows in values.items()}


_COMMON = {"type", "time_s", "elapsed_s", "step"}
_KEPT = {"rates", "samples", "example"}
"""Events that are neither drawn as a curve nor listed."""
FORECAST = "forecast"
MAX_FIGURES = 16
"""Most values kept of one schedule event."""


def columns_of(series: str) -> tuple[str, ...]:
    """Columns of the table of a series that is not per step."""
    more = {FORECAST: ("at", "horizon", "low", "high", "progress"), "eval": ("energy_j",)}
    return ("elapsed_s", "step", "y", *more.get(series.partition("/")[0], ()))


def _other(event: Event, parsed: Parsed, values: dict[str, list[list[float]]]) -> None:
    kind = event["type"]
    if not isinstance(kind, str):
        raise TypeError("no type")
    if kind not in _TEXTS and kind not in _ROWS and kind not in _KEPT:
        return
    at = [float(event["elapsed_s"]), float(event["step"])]
    if not all(map(math.isfinite, at)):
        raise ValueError("no place on the axes")
    text = _TEXTS[kind](event) if kind in _TEXTS else ""
    rows = _ROWS[kind](event) if kind in _ROWS else {}
    if kind == "eval" and event.get("groups"):
        parsed.parts.append(_parts(event))
    if kind == "eval" and not is_validation(event):
        split, metric = printable(str(event["split"])), printable(str(event["metric"]))
        parsed.tests.append(SplitScore(split, metric, number(event["value"])))
        rows = {}
    elif kind == "importance":
        parsed.importance.append(_importance(event))
    elif kind == "rates":
        parsed.rates.append(_rates(event))
    elif kind == "samples":
        parsed.answers.append(read_answers(event))
    elif kind == "example":
        parsed.example = read_example(event)
    elif kind == "run":
        parsed.header, parsed.end = event, None
    elif kind == "phase":
        parsed.phase = event
    elif kind == "end":
        parsed.end = event
    for key, row in rows.items():
        values[key].append([*at, *row])
    if text:
        parsed.notable.append(Notable(at[0], int(at[1]), kind, printable(text)))


def _system_rows(event: Event) -> dict[str, list[float]]:
    return {f"system/{k}": [number(v)] for k, v in event.items() if k not in _COMMON and v is not None}


def _measured(event: Event) -> dict[str, Any]:
    """Name -> number of an evaluation."""
    loss = {} if event.get("loss") is None else {"loss": event["loss"]}
    return {event["metric"]: event["value"]} | (event.get("more") or {}) | loss


def _eval_rows(event: Event) -> dict[str, list[float]]:
    energy_j = _float(event.get("energy_j"))
    return {f"eval/{key}": [number(value), energy_j] for key, value in _measured(event).items()}


def _parts(event: Event) -> PartScores:
    groups = {
        printable(str(part)): {printable(str(name)): value for name, value in metrics.items() if _is_number(value)}
        for part, metrics in event["groups"].items()
    }
    return PartScores(printable(str(event.get("split", VALIDATION))), int(event["step"]), groups)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or value in ("nan", "inf", "-inf")


def _forecast_rows(event: Event) -> dict[str, list[float]]:
    """Rows of a forecast event. A missing band is nan. If it does not say its step, the event's step counts."""
    at = number(event["step"] if event.get("at") is None else event["at"])
    more = [math.nan if event.get(key) is None else number(event[key]) for key in ("low", "high", "progress")]
    return {FORECAST: [number(event["value"]), at, number(event["horizon"]), *more]}


def _schedule_rows(event: Event) -> dict[str, list[float]]:
    """Rows of a schedule event, by its own names. Nested values are prefixed by their group; a list gives its mean."""
    figures: dict[str, Any] = {}
    for name, value in event.items():
        group = {f"{name} {key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        figures |= group if name not in _COMMON else {}
    lists = {name: value if isinstance(value, list) else [value] for name, value in figures.items()}
    known = [(name, list(map(number, values))) for name, values in lists.items() if values and None not in values]
    return {f"schedule/{printable(name)}": [sum(values) / len(values)] for name, values in known[:MAX_FIGURES]}


_ROWS = {"system": _system_rows, "eval": _eval_rows, FORECAST: _forecast_rows, "schedule": _schedule_rows}


def _blocks(event: Event) -> tuple[float, int, tuple[str, ...], tuple[int, ...], tuple[str, ...]]:
    names, layer = tuple(event["names"]), tuple(int(i) for i in event["layer"])
    projection = tuple(event["projection"])
    if not len(names) == len(layer) == len(projection):
        raise ValueError("columns of several lengths")
    return float(event["elapsed_s"]), int(event["step"]), names, layer, projection


def _column(event: Event, key: str) -> Floats | None:
    """One number per block."""
    if event.get(key) is None:
        return None
    if len(event[key]) != len(event["names"]):
        raise ValueError("columns of several lengths")
    return np.array([number(v) for v in event[key]])


def _importance(event: Event) -> Importance:
    weights, *more = (_column(event, key) for key in ("weights", "sensitivity", "ranks"))
    if weights is None:
        raise KeyError("weights")
    return Importance(*_blocks(event), weights, *more)


def _rates(event: Event) -> Rates:
    multipliers = _column(event, "multipliers")
    if multipliers is None:
        raise KeyError("multipliers")
    return Rates(*_blocks(event), multipliers)


def _run_text(event: Event) -> str:
    resumed = "resumed" if event.get("resumed") else "started"
    return f"{resumed} by process {event['pid']} on {event['host']}"


def _eval_text(event: Event) -> str:
    split = event.get("split", VALIDATION)
    figures = ", ".join(f"{key} {number(value):.4f}" for key, value in _measured(event).items())
    return f"{figures} on {event['num']:,} rows" + ("" if split == VALIDATION else f" of the {split} split")


def _phase_text(event: Event) -> str:
    """The text of a beginning phase. Its progress is in the screen's title."""
    return "" if event.get("done") else str(event["text"])


def _end_text(event: Event) -> str:
    return f"{event['status']}: {event['error']}" if event.get("error") else str(event["status"])


_TEXTS = {
    "run": _run_text,
    "phase": _phase_text,
    "eval": _eval_text,
    "importance": lambda event: f"importances of {len(event['names'])} matrices",
    "checkpoint": lambda event: "checkpoint saved",
    "warning": lambda event: str(event["message"]) or "warning",
    "end": _end_text,
}
