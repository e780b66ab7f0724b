"""Jobs that a sweep runs in processes with torch: resolve the run, train a trial, train the best settings in full."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

from fastpeft.config import RunConfig, run_from_values, run_values
from fastpeft.config.search import LOSS, OWN_METRIC
from fastpeft.errors import UserError
from fastpeft.runs.curves import is_validation
from fastpeft.runs.events import Event, number, read_events
from fastpeft.runs.store import Result, RunFolder
from fastpeft.sweep.worker import Channel, Message

LOOK = f"{__name__}:look"
TRAIN_TRIAL = f"{__name__}:train_trial"
TRAIN_BEST = f"{__name__}:train_best"


def look(spec: Message, channel: Channel) -> Message:
    """Resolve model, data and devices on this machine.

    Returns:
        {run, stand_in, reason, meter, num_gpus}; `meter` is the reason that energy cannot be read, or empty.

    Args:
        spec: {run, allow_stand_in}.
    """
    import torch

    from fastpeft.budget import EnergyMeter
    from fastpeft.trainer.build import gpu_uuid
    from fastpeft.trainer.resolve import resolve

    resolved = resolve(_run(spec), spec["allow_stand_in"])
    meter = EnergyMeter.open(gpu_uuid(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return {
        "run": run_values(resolved.run),
        "stand_in": resolved.stand_in,
        "reason": resolved.reason,
        "meter": "" if meter.works else meter.reason,
        "num_gpus": torch.cuda.device_count(),
    }


def train_trial(spec: Message, channel: Channel) -> Message:
    """Train one trial, which the sweep may prune after an evaluation.

    Args:
        spec: {run, results_dir, name, resume, metric, direction, worker, num_workers}.

    Returns:
        {status, value, metric, elapsed_s, setup_s, energy_j, steps}. `value` is None without a finite evaluation, and
        `metric` is the name of the task's own metric.
    """
    from fastpeft.trainer import train

    _take_share(spec["worker"], spec["num_workers"])
    metric, direction = spec["metric"], spec["direction"]
    diverged = False

    def prune(evaluation: int, score: object) -> bool:
        nonlocal diverged
        value = value_of(printed.evaluation, metric)
        diverged = not math.isfinite(value)
        return diverged or channel.report(evaluation, value)

    printed = _Printed()
    result = train(
        _run(spec),
        results_dir=spec["results_dir"],
        name=spec["name"],
        resume=spec["resume"],
        reporter=printed,
        prune=prune,
        score_test=False,
    )
    events = RunFolder.at(Path(spec["results_dir"]), spec["name"]).events
    status = "diverged" if diverged else result.status
    return _outcome(result) | {"status": status, "value": best_value(read_events(events), metric, direction)}


def train_best(spec: Message, channel: Channel) -> Message:
    """Train the best settings for the run's own budget, and send every event to the sweep.

    Args:
        spec: {run, results_dir, name, resume, group}.
    """
    from fastpeft.trainer import train

    where = {key: spec[key] for key in ("results_dir", "name", "resume", "group")}
    return _outcome(train(_run(spec), reporter=_Told(channel), **where))


def best_value(events: Iterable[Event], metric: str, direction: str) -> float | None:
    """The best finite `metric` over evaluations of the validation split. If some used only a sample of the rows, the
    evaluations with the most rows count."""
    found = list(filter(is_validation, events))
    most = max((event["num"] for event in found), default=0)
    values = [value_of(event, metric) for event in found if event["num"] == most]
    finite = [value for value in values if math.isfinite(value)]
    return (min if direction == "minimize" else max)(finite, default=None)


def value_of(evaluation: Event, metric: str) -> float:
    """The value of `metric` in an `eval` event.

    Raises:
        NoSuchMetric: the task does not measure it; the message lists its metrics.
    """
    own = evaluation["metric"]
    measured = {OWN_METRIC: evaluation["value"], own: evaluation["value"], LOSS: evaluation["loss"]}
    measured |= evaluation.get("more", {})
    if metric not in measured:
        raise NoSuchMetric(
            f"optuna.metric {metric}: the task does not measure it; expected one of {', '.join(measured)}"
        )
    return number(measured[metric])


class NoSuchMetric(UserError):
    """optuna.metric is unknown to the task, so that every trial would fail."""

    ends_sweep = True


def _run(spec: Message) -> RunConfig:
    return run_from_values(spec["run"], spec["run"]["run_id"])


def _outcome(result: Result) -> Message:
    figures = {key: getattr(result, key) for key in ("status", "elapsed_s", "setup_s", "energy_j", "steps")}
    return figures | {"metric": result.metric.get("name")}


def _take_share(worker: int, num_workers: int) -> None:
    """Select this worker's GPU, round robin, and limit its CPU threads to an equal share of the cores."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(worker % torch.cuda.device_count())
    if num_workers > 1:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // num_workers)))


class _Printed:
    """Reporter that prints evaluations, warnings and notes to the trial's log, and keeps the last evaluation."""

    evaluation: Event

    def say(self, message: str) -> None:
        print(message, flush=True)

    def on_event(self, event: Event) -> None:
        if event["type"] == "warning":
            self.say(f"warning: {event['message']}")
        elif event["type"] == "eval":
            self.evaluation = event
            self.say(f"step {event['step']}: {event['metric']} {event['value']}, loss {event['loss']}")
        elif event["type"] == "run":
            for note in event["notes"]:
                self.say(note)


class _Told:
    """Reporter that forwards messages and events to the sweep's process."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def say(self, message: str) -> None:
        print(message, flush=True)
        self._channel.tell({"say": message})

    def on_event(self, event: Event) -> None:
        self._channel.tell({"event": event})
