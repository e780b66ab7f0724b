"""The summary of a sweep: sweep.json, trials.csv, best.yaml and figures."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from optuna.study import Study

from fastpeft.config import RunConfig, save_run, with_values
from fastpeft.runs.store import write_json
from fastpeft.sweep.best import BestRun
from fastpeft.sweep.study import best_of, counted
from fastpeft.sweep.sweep_figures import draw_sweep
from fastpeft.sweep.trial_rows import ENERGY_J, METRIC, rows_of

SUMMARY = "sweep.json"


def write_summary(
    folder: Path,
    run: RunConfig,
    study: Study,
    status: str,
    spent_s: float,
    stand_in: bool,
    trained: BestRun | None = None,
) -> None:
    """Rewrite all files of the summary from the study."""
    best, trials = best_of(study), study.get_trials(deepcopy=False)
    joules = [trial.user_attrs[ENERGY_J] for trial in trials if trial.user_attrs.get(ENERGY_J) is not None]
    metric = run.optuna.metric if best is None else best.user_attrs.get(METRIC, run.optuna.metric)
    values: dict[str, Any] = {
        "study": study.study_name,
        "run_id": run.run_id,
        "status": status,
        "metric": metric,
        "direction": run.optuna.direction,
        "trials": len(counted(study)),
        "wanted": run.optuna.trials,
        "made_again": sum(not row.counts for row in rows_of(study)),
        "best": None if best is None else {"number": best.number, "value": best.value, "params": best.params},
        "spent_s": round(spent_s, 3),
        "energy_j": sum(joules) if joules else None,
        "stand_in": stand_in,
        "runs": [result.name for result in trained.results] if trained else [],
    }
    write_json(folder / SUMMARY, values)
    _write_trials(folder / "trials.csv", study, list(run.optuna.space))
    if best is not None:
        save_run(with_values(run, best.params), folder / "best.yaml")
        draw_sweep(study, folder / "figures", metric, stand_in)


def _write_trials(path: Path, study: Study, keys: list[str]) -> None:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["trial", "outcome", "value", "seconds", "joules", *keys])
    for row in rows_of(study):
        params = [row.params.get(key) for key in keys]
        table.writerow([row.number, row.outcome, row.value, round(row.duration_s, 3), row.energy_j, *params])
    path.write_text(text.getvalue(), encoding="utf-8")
