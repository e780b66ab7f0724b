"""`fastpeft evaluate`: metrics.json and a figure for each run, and a comparison of all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastpeft.compare.comparison import Comparison, Curve, compare, labels_of
from fastpeft.compare.figures import JOULES, SECONDS, draw_comparison, draw_run
from fastpeft.errors import UserError
from fastpeft.runs.curves import Budgets, auc_of, evaluations, is_validation, to_target_of
from fastpeft.runs.events import Event, number, read_events
from fastpeft.runs.store import Result, RunFolder, list_runs, write_json


def report(names: list[str], results_dir: Path, target: float | None = None) -> Comparison:
    """Write RUN/metrics.json, RUN/figures/curves.png, and under `results_dir` comparison/{comparison.json, metric.png},
    with joules.png where some run has a meter.

    Args:
        names: of runs, or of groups of `--seeds`; all runs when empty.
        target: a metric over 0 and at most 1; how long and how many joules each run took to reach it is reported.

    Raises:
        UserError: a name that is no run, no run that has been evaluated, or a target out of bounds.
    """
    if target is not None and not 0 < target <= 1:
        raise UserError(f"--target {target:g}: give a metric over 0 and at most 1; write 0.6 for 60 %")
    runs = find_runs(names, results_dir)
    curves = [curve_of(folder, result, target) for folder, result in runs]
    for (folder, result), curve in zip(runs, curves):
        write_json(folder.path / "metrics.json", metrics(folder, result, curve, target))
        draw_run(folder, result, folder.path / "figures" / "curves.png")
    comparison = compare([result for _, result in runs], curves, target)
    folder = results_dir / "comparison"
    folder.mkdir(exist_ok=True)
    write_json(folder / "comparison.json", dataclasses.asdict(comparison))
    labelled = [(f, r, label) for (f, r), label in zip(runs, labels_of([r for _, r in runs]))]
    draw_comparison(labelled, folder / "metric.png", SECONDS)
    metered = [run for run in labelled if run[1].energy_j is not None]
    (folder / "joules.png").unlink(missing_ok=True)
    if metered:
        draw_comparison(metered, folder / "joules.png", JOULES)
    return comparison


def curve_of(folder: RunFolder, result: Result, target: float | None) -> Curve:
    """From the event log: the area under the metric, and the way to `target`."""
    found = evaluations(read_events(folder.events))
    budgets = Budgets.of(result.budget, result.elapsed_s, result.energy_j)
    return Curve(auc_of(found, budgets), {} if target is None else to_target_of(found, target))


def find_runs(names: list[str], results_dir: Path) -> list[tuple[RunFolder, Result]]:
    """Runs with at least one evaluation."""
    there = [(folder, result) for folder in list_runs(results_dir) if (result := folder.read_result()) is not None]
    known = {key for folder, result in there for key in (folder.path.name, result.group)}
    for name in names:
        if name not in known:
            found = ", ".join(sorted(key for key in known if key)) or "none"
            raise UserError(f"{name}: there is no such run or group in {results_dir}; there are: {found}")
    chosen = [(f, r) for f, r in there if not names or f.path.name in names or r.group in names]
    scored = [(folder, result) for folder, result in chosen if "value" in result.metric]
    if not scored:
        raise UserError(f"{', '.join(names) or f'no run in {results_dir}'}: nothing has been evaluated yet")
    return scored


def metrics(folder: RunFolder, result: Result, curve: Curve, target: float | None) -> dict[str, Any]:
    """What the event log holds of one run, in figures."""
    steps, scores, tests = [], [], []
    for event in read_events(folder.events):
        if event["type"] == "step":
            steps.append(event)
        elif event["type"] == "eval":
            (scores if is_validation(event) else tests).append(event)
    last = [number(event["loss"]) for event in steps[-50:]]
    return {
        **dataclasses.asdict(result),
        "auc": curve.auc,
        "target": None if target is None else {"value": target, **curve.target},
        "evaluations": [_without(event, "type", "time_s", "split") for event in scores],
        "other_splits": [_without(event, "type", "time_s") for event in tests],
        "last_loss": sum(last) / len(last) if last else None,
        "tokens_per_s": result.tokens / result.elapsed_s if result.elapsed_s else None,
        "steps_logged": len(steps),
    }


def _without(event: Event, *keys: str) -> Event:
    return {key: value for key, value in event.items() if key not in keys}
