"""`fastpeft evaluate`: metrics.json and a figure for each run, and a comparison of all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError
from fastpeft.evaluate.compare import Comparison, compare, labels_of
from fastpeft.evaluate.figures import draw_comparison, draw_run
from fastpeft.runs.events import number, read_events
from fastpeft.runs.store import Result, RunFolder, list_runs, write_json


def report(names: list[str], results_dir: Path) -> Comparison:
    """Write RUN/metrics.json, RUN/figures/curves.png and comparison/{comparison.json, metric.png} under `results_dir`.

    Args:
        names: of runs, or of groups of `--seeds`; all runs when empty.

    Raises:
        UserError: a name that is no run, or no run that has been evaluated.
    """
    runs = find_runs(names, results_dir)
    for folder, result in runs:
        write_json(folder.path / "metrics.json", metrics(folder, result))
        draw_run(folder, result, folder.path / "figures" / "curves.png")
    comparison = compare([result for _, result in runs])
    target = results_dir / "comparison"
    target.mkdir(exist_ok=True)
    write_json(target / "comparison.json", dataclasses.asdict(comparison))
    labelled = [(f, r, label) for (f, r), label in zip(runs, labels_of([r for _, r in runs]))]
    draw_comparison(labelled, target / "metric.png")
    return comparison


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


def metrics(folder: RunFolder, result: Result) -> dict[str, Any]:
    """What the event log holds of one run, in figures."""
    steps, scores = [], []
    for event in read_events(folder.events):
        if event["type"] == "step":
            steps.append(event)
        elif event["type"] == "eval":
            scores.append({key: value for key, value in event.items() if key not in ("type", "time_s", "split")})
    last = [number(event["loss"]) for event in steps[-50:]]
    return {
        **dataclasses.asdict(result),
        "evaluations": scores,
        "last_loss": sum(last) / len(last) if last else None,
        "tokens_per_s": result.tokens / result.elapsed_s if result.elapsed_s else None,
        "steps_logged": len(steps),
    }
