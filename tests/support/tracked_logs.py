"""Logs of runs for trackers to read."""

from __future__ import annotations

from pathlib import Path

from fastpeft.runs.events import EventLog

METRIC = {"metric": {"name": "accuracy", "value": 0.5}, "best": {"value": 0.75, "step": 4}}


def write_log(folder: Path, steps: range, ended: str | None = None) -> EventLog:
    """A run's log; importances before the first step, an evaluation after each fourth."""
    folder.mkdir(exist_ok=True)
    log = EventLog(folder / "events.jsonl")
    config = {"run_id": "x", "training": {"seed": 1}, "overrides": {"a.b": 1}}
    log.write("run", elapsed_s=0.0, step=steps.start, config=config, budget={"kind": "steps", "limit": 8})
    if steps.start == 0:
        log.write("importance", elapsed_s=0.0, step=0, names=["q"], weights=[1.0])
    for step in steps:
        log.write("step", elapsed_s=float(step), step=step, loss=1.0 / (step + 1))
        if step % 4 == 3:
            log.write("eval", elapsed_s=float(step), step=step + 1, metric="accuracy", value=step / 8, num=8)
    if ended:
        log.write("end", elapsed_s=9.0, step=steps.stop, status=ended, **METRIC)
    return log
