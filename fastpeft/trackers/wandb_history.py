"""Download of a run from W&B: converts what `wandb_run` sent back into a run folder with events and a result."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fastpeft.errors import UserError, first_line
from fastpeft.runs.events import Event, finite
from fastpeft.runs.store import Result, RunFolder, write_json
from fastpeft.trackers.tracker import is_installed

_STATUS = {"finished": "done", "running": "running", "pending": "running", "killed": "stopped"}
"""W&B's state -> status, for a run whose trainer did not report its end. Any other state is a failure."""
_LAYER = re.compile(r"(?:^|\.)([0-9]+)\.")
_MISSING = (None, "NaN", "Infinity", "-Infinity")
_NOT_METRICS = ("best/step",)


def fetch_run(path: str, into: Path) -> Path:
    """Download ENTITY/PROJECT/RUN. Returns its new folder, under `into`.

    Raises:
        UserError: W&B is not installed or has no such run, or the run is not from fastpeft.
    """
    if not is_installed("wandb"):
        raise UserError(f"{path}: to read a run of W&B, pip install wandb")
    import wandb

    try:
        run = wandb.Api().run(path)
        rows = list(run.scan_history())
        config, summary = dict(run.config), dict(run.summary)
        state, name = str(run.state), str(run.name or run.id)
    except Exception as error:  # W&B's own, its transport's, and a missing key's
        reason = first_line(error) or type(error).__name__
        raise UserError(
            f"{path}: W&B does not give this run ({reason}). Is it ENTITY/PROJECT/RUN, as in the run's address, and is "
            "there a key (`wandb login`, WANDB_API_KEY)?"
        ) from None
    metric = _metric_of(summary)
    events = list(events_of(rows, metric))
    if not any(event["type"] in ("step", "eval") for event in events):
        raise UserError(f"{path}: was not logged by fastpeft: it has neither train/loss nor eval/ figures")
    folder = RunFolder(into / path.replace("/", "--"))
    folder.path.mkdir(parents=True, exist_ok=True)
    header = {"type": "run", "time_s": 0.0, "elapsed_s": 0.0, "step": 0, "config": config}
    with folder.events.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(finite(event), allow_nan=False) + "\n" for event in [header, *events])
    folder.config.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str))), encoding="utf-8")
    write_json(folder.result, dataclasses.asdict(_result(name, state, config, summary, events, metric)))
    return folder.path


def events_of(rows: Iterable[Mapping[str, Any]], metric: str | None) -> Iterator[Event]:
    """The events that `scalars.Rows` turned into `rows`.

    Args:
        metric: the name of the task's metric, under which rows hold an event's `value`.
    """
    for row in rows:
        known = {key: value for key, value in row.items() if value not in _MISSING}
        at = {"time_s": float(known.get("_timestamp", 0.0)), "elapsed_s": float(known.get("elapsed_s", 0.0))}
        step = int(known.get("step", 0))
        if system := _part(known, "system/"):
            yield {"type": "system", **at, "step": step - 1, **system}
        if train := _part(known, "train/"):
            yield {"type": "step", **at, "step": step - 1, **train}
        for prefix, split in (("eval/", "validation"), ("test/", "test")):
            scores = _part(known, prefix)
            if metric in scores:
                value, more = scores.pop(metric), _part(scores, "more/")
                scores = {key: score for key, score in scores.items() if "/" not in key} | (
                    {"more": more} if more else {}
                )
                yield {"type": "eval", **at, "step": step, "split": split, "metric": metric, "value": value, **scores}
        if weights := _part(known, "importance/"):
            names = list(weights)
            yield {
                "type": "importance",
                **at,
                "step": step,
                "names": names,
                "weights": list(weights.values()),
                "layer": [int(found[1]) if (found := _LAYER.search(name)) else 0 for name in names],
                "projection": [_LAYER.split(name)[-1] for name in names],
            }


def _part(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}


def _metric_of(summary: Mapping[str, Any]) -> str | None:
    names = [key.split("/", 1)[1] for key in summary if key.startswith(("final/", "best/")) and key not in _NOT_METRICS]
    return names[0] if names else None


def _result(
    name: str,
    state: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    events: list[Event],
    metric: str | None,
) -> Result:
    steps = [event for event in events if event["type"] == "step"]
    tests = [event for event in events if event["type"] == "eval" and event["split"] == "test"]
    elapsed_s = float(summary.get("elapsed_s") or max(event["elapsed_s"] for event in events))
    energy = [event["energy_j"] for event in steps if "energy_j" in event]
    budget = config.get("budget")
    test = {key: tests[-1][key] for key in ("value", "num", "step") if key in tests[-1]} if tests else {}
    return Result(
        run_id=str(config.get("run_id", name)),
        name=name,
        status=str(summary.get("status") or _STATUS.get(state, "failed")),
        metric={"name": metric, "value": summary[f"final/{metric}"]} if f"final/{metric}" in summary else {},
        best={"value": summary[f"best/{metric}"], "step": summary.get("best/step", 0)}
        if f"best/{metric}" in summary
        else {},
        test=test and {"name": metric, **test},
        budget=dict(budget) | {"spent": elapsed_s} if isinstance(budget, Mapping) else {},
        elapsed_s=elapsed_s,
        energy_j=float(energy[-1]) if energy else None,
        energy_method="as W&B has it" if energy else "none",
        tokens=int(sum(event.get("tokens", 0) for event in steps)),
        steps=int(summary.get("steps") or len(steps)),
        stand_in=bool(config.get("stand_in")),
        seed=int(_section(config, "training").get("seed", 0)),
        method=str(config.get("method", "")),
        model=str(_section(config, "model").get("name", "")),
        dataset=str(_section(config, "dataset").get("name", "")),
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}
