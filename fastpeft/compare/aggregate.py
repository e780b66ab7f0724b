"""Writes the numbers of a comparison: aggregated_metrics.json, and its rows as aggregated_metrics.csv."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft.compare.comparison import Comparison, Contrast, Mean, Row
from fastpeft.compare.found_runs import Found
from fastpeft.compare.run_report import RunReport
from fastpeft.runs.store import write_json

NAME = "aggregated_metrics"


def write_aggregated(
    comparison: Comparison, found: Sequence[Found], reports: Sequence[RunReport], folder: Path
) -> None:
    """Write one row per method and task. The JSON file also lists every run, with the reason if it does not count."""
    table = [_flat(comparison, row) for row in comparison.rows]
    write_json(
        folder / f"{NAME}.json",
        {
            "baseline": comparison.baseline,
            "compared": comparison.by,
            "target": comparison.target,
            "rows": [line | {"by_seed": row.by_seed, "runs": row.runs} for line, row in zip(table, comparison.rows)],
            "glue_average": {label: dataclasses.asdict(mean) for label, mean in comparison.glue.items()},
            "runs": [_run(one, report) for one, report in zip(found, reports)],
        },
    )
    with (folder / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]) if table else ["task"])
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in line.items()} for line in table)


def _flat(comparison: Comparison, row: Row) -> dict[str, Any]:
    values = list(row.by_seed.values())
    base = {"task": row.task, "method": row.label, "measures": row.measures, "compared": comparison.by}
    base |= {"seeds": len(values), "mean": statistics.fmean(values)}
    base |= {"std": statistics.stdev(values) if len(values) > 1 else None, "min": min(values), "max": max(values)}
    for of in ("metric", "best", "test"):
        base |= _mean(of, getattr(row, of))
    base |= {"baseline": comparison.baseline}
    base |= _mean("improvement", row.minus_baseline) | {"improvement_relative": row.relative}
    base |= _contrast("seeds", row.seeds_test) | _contrast("rows", row.rows_test)
    for unit in ("seconds", "joules"):
        base |= _mean(f"auc_{unit}", row.auc.get(unit))
    base |= _mean("seconds", row.seconds) | _mean("joules", row.joules)
    reached = row.target
    base |= {"reached_target": None if reached is None else reached.count}
    base |= _mean("target_seconds", reached and reached.seconds) | _mean("target_joules", reached and reached.joules)
    return base


def _mean(name: str, mean: Mean | None) -> dict[str, Any]:
    """The mean and half the width of its 95 % interval, which is None for a single run."""
    half = mean.half_width if mean is not None and mean.count > 1 else None
    return {name: None if mean is None else mean.value, f"{name}_half_width": half}


def _contrast(over: str, contrast: Contrast | None) -> dict[str, Any]:
    names = ("test", "difference", "low", "high", "p", "p_holm", "effect", "effect_name", "note")
    return {f"{over}_{name}": None if contrast is None else getattr(contrast, name) for name in names}


def _run(found: Found, report: RunReport) -> dict[str, Any]:
    result = found.result
    known = {} if result is None else {
        "task": f"{result.dataset}, {Path(result.model).name}",
        "method": result.method,
        "seed": result.seed,
        "metric": result.metric,
        "best": result.best,
        "test": result.test,
        "stand_in": result.stand_in,
        "data": result.data.get("sha256"),
    }  # fmt: skip
    return {"name": found.name, "status": found.status, "counts": found.counts, "note": found.note} | known | {
        "auc": report.curve.auc,
        "target": report.curve.target,
        "rescored": report.rescored or None,
        "notes": report.notes,
    }  # fmt: skip
