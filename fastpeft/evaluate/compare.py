"""Several runs side by side: means over seeds with t-intervals, and the GLUE average. Reads result.json only."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpeft.config import Budget
from fastpeft.runs.events import number
from fastpeft.runs.store import Result

CONFIDENCE = 0.95
GLUE_TASKS = ("mnli", "sst2", "rte")


@dataclass(frozen=True)
class Mean:
    """Mean over `count` values, and half the width of its two-sided 95 % t-interval; NaN for a single value."""

    value: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.4f}" if self.count == 1 else f"{self.value:.4f} ± {self.half_width:.4f}"


def mean_of(values: Sequence[float]) -> Mean:
    """Student's t: half width t(0.975, n - 1) s / sqrt(n). Raises ValueError without values."""
    if not values:
        raise ValueError("the mean of no values")
    if len(values) == 1:
        return Mean(values[0], math.nan, 1)
    from scipy.stats import t

    spread = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread, len(values))


def metric_of(results: Iterable[Result], of: str = "metric") -> Mean | None:
    """Mean `metric` (or `best`) of the runs that have one; None if none has."""
    found = [number(getattr(result, of)["value"]) for result in results if "value" in getattr(result, of)]
    return mean_of(found) if found else None


def glue_average(results: Iterable[Result]) -> Mean | None:
    """Mean over MNLI, SST-2 and RTE of their primary metrics, seed by seed; None unless some seed has all three.

    The tasks count alike, as in GLUE (Wang et al., arXiv:1804.07461). A stand-in is no GLUE task.
    """
    by_seed: dict[int, dict[str, list[float]]] = {}
    for result in results:
        if result.dataset in GLUE_TASKS and "value" in result.metric and not result.stand_in:
            scores = by_seed.setdefault(result.seed, {}).setdefault(result.dataset, [])
            scores.append(number(result.metric["value"]))
    whole = [
        statistics.fmean(statistics.fmean(scores[task]) for task in GLUE_TASKS)
        for scores in by_seed.values()
        if all(task in scores for task in GLUE_TASKS)
    ]
    return mean_of(whole) if whole else None


@dataclass(frozen=True)
class Row:
    """One method on one task and model, over its seeds."""

    label: str
    task: str
    metric: Mean
    best: Mean | None
    minus_baseline: Mean | None
    """Difference from the baseline on the seeds that both have."""
    seconds: Mean
    joules: Mean | None
    runs: list[str]


@dataclass(frozen=True)
class Comparison:
    baseline: str | None
    rows: list[Row]
    glue: dict[str, Mean]
    """Label -> GLUE average, for those that have all three tasks."""


def compare(results: list[Result]) -> Comparison:
    """Group runs by what `labels_of` tells apart, and by task and model. The baseline is plain LoRA, where it is."""
    labels = labels_of(results)
    groups: dict[tuple[str, str], list[Result]] = {}
    for result, label in zip(results, labels):
        if "value" in result.metric:
            groups.setdefault((label, _task(result)), []).append(result)
    baseline = "lora" if any(label == "lora" for label, _ in groups) else None
    rows = []
    for (label, task), runs in sorted(groups.items(), key=lambda item: item[0][::-1]):
        metric = metric_of(runs)
        assert metric is not None
        joules = [run.energy_j for run in runs if run.energy_j is not None]
        rows.append(
            Row(
                label=label,
                task=task,
                metric=metric,
                best=metric_of(runs, "best"),
                minus_baseline=_paired(runs, groups.get((baseline or "", task), [])) if label != baseline else None,
                seconds=mean_of([run.elapsed_s for run in runs]),
                joules=mean_of(joules) if len(joules) == len(runs) else None,
                runs=[run.name for run in runs],
            )
        )
    glue = {
        label: glue_average([r for r, own in zip(results, labels) if own == label]) for label in dict.fromkeys(labels)
    }
    return Comparison(baseline, rows, {label: mean for label, mean in glue.items() if mean is not None})


def labels_of(results: list[Result]) -> list[str]:
    """What tells runs apart: the method; where that leaves two runs of one task and seed the run_id; then the group or
    the name. Seeds of one label are then independent runs. Different budgets are never put together."""
    labels = [result.method or result.run_id for result in results]
    for finer in (lambda r: r.run_id, lambda r: r.group or r.name, lambda r: r.name):
        keys = [(label, _task(result), result.seed) for label, result in zip(labels, results)]
        twice = {label for (label, *_), count in Counter(keys).items() if count > 1}
        labels = [finer(result) if label in twice else label for label, result in zip(labels, results)]
    budgets: dict[tuple[str, str], set[str]] = {}
    for label, result in zip(labels, results):
        budgets.setdefault((label, _task(result)), set()).add(_budget(result))
    return [
        f"{label}, {_budget(result)}" if len(budgets[label, _task(result)]) > 1 else label
        for label, result in zip(labels, results)
    ]


def _task(result: Result) -> str:
    stand_in = " (stand-in)" if result.stand_in else ""
    return f"{result.dataset}, {Path(result.model).name}{stand_in}"


def _budget(result: Result) -> str:
    return str(Budget(result.budget["kind"], result.budget["limit"])) if result.budget else "no budget"


def _paired(runs: list[Result], others: list[Result]) -> Mean | None:
    by_seed = {other.seed: number(other.metric["value"]) for other in others}
    found = [number(run.metric["value"]) - by_seed[run.seed] for run in runs if run.seed in by_seed]
    return mean_of(found) if found else None
