"""Figures of runs, drawn from their event logs alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastpeft.runs.curves import is_validation
from fastpeft.runs.events import number, read_events
from fastpeft.runs.store import Result, RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SECONDS, JOULES = "elapsed_s", "energy_j"
"""What the metric is drawn over."""
_LABELS = {SECONDS: "seconds of the budget clock", JOULES: "joules"}
_SMOOTHING = 0.95
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers tell apart."""


def draw_run(folder: RunFolder, result: Result, target: Path) -> None:
    """Task loss, learning rate and metric against the seconds of the budget clock, as a PNG; the metric against joules
    too, where they are known."""
    from matplotlib.figure import Figure

    events = list(read_events(folder.events))
    steps = [event for event in events if event["type"] == "step"]
    over_joules = result.energy_j is not None
    figure = Figure(figsize=(8, 10.5 if over_joules else 8), layout="constrained")
    loss, rate, metric, *more = figure.subplots(3 + over_joules, 1)
    for panel in (loss, rate):
        panel.sharex(metric)
        panel.tick_params(labelbottom=False)
    seconds = [event["elapsed_s"] for event in steps]
    losses = [number(event["loss"]) for event in steps]
    loss.plot(seconds, losses, color="0.8", linewidth=0.8, label="each step")
    loss.plot(seconds, smooth(losses), color=_COLOURS[0], label="mean of about 20 steps")
    loss.set_ylabel("task loss")
    loss.legend()
    rate.plot(seconds, [event["lr"] for event in steps], color=_COLOURS[0])
    rate.set_ylabel("learning rate")
    for panel, over in zip((metric, *more), (SECONDS, JOULES)):
        _draw_metric(panel, folder, result, over, _COLOURS[0], None)
    test = f", test {number(result.test['value']):.4f}" if "value" in result.test else ""
    figure.suptitle(_title(f"{result.name}{test}", [result]))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def draw_comparison(runs: list[tuple[RunFolder, Result, str]], target: Path, over: str) -> None:
    """The metric of every run against SECONDS or JOULES: a panel a task, a colour a label."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(result.dataset for _, result, _ in runs))
    labels = list(dict.fromkeys(label for *_, label in runs))
    figure = Figure(figsize=(8, 3.2 * len(tasks) + 0.8), layout="constrained")
    panels = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    for task, panel in zip(tasks, panels):
        named = set()
        for folder, result, label in runs:
            if result.dataset == task:
                colour = _COLOURS[labels.index(label) % len(_COLOURS)]
                _draw_metric(panel, folder, result, over, colour, None if label in named else label)
                named.add(label)
        panel.set_title(task)
        panel.legend()
    figure.suptitle(_title("comparison", [result for _, result, _ in runs]))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def smooth(values: list[float]) -> list[float]:
    """Exponential mean without the bias of its start; what is not finite is passed over."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        if value - value == 0:
            total = _SMOOTHING * total + (1 - _SMOOTHING) * value
            weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        out.append(total / weight if weight else value)
    return out


def _draw_metric(panel: Axes, folder: RunFolder, result: Result, over: str, colour: str, label: str | None) -> None:
    """Of the validation split, where the place is known."""
    scores = [event for event in read_events(folder.events) if is_validation(event) and event.get(over) is not None]
    values = [number(event["value"]) for event in scores]
    panel.plot([number(event[over]) for event in scores], values, "o-", color=colour, markersize=4, label=label)
    panel.set_ylabel(result.metric.get("name", "metric"))
    panel.set_xlabel(_LABELS[over])


def _title(text: str, results: list[Result]) -> str:
    return f"{text} (STAND-IN: no numbers of a real model)" if any(r.stand_in for r in results) else text
