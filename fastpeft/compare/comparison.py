"""Comparison of runs: means over seeds with t-intervals, and the GLUE average. Reads no file."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastpeft.config import Budget
from fastpeft.errors import UserError
from fastpeft.runs.events import number
from fastpeft.runs.store import MAJORITY, Result

CONFIDENCE = 0.95
DATA_MARK = ", data "
"""Precedes the hash of the data in a task's name."""
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
    """Mean `metric` (or `best`, or `test`) of the runs that have one; None if none has."""
    found = [number(getattr(result, of)["value"]) for result in results if "value" in getattr(result, of)]
    return mean_of(found) if found else None


@dataclass(frozen=True)
class Curve:
    """Figures from one run's evaluations over time, computed by `runs.curves`."""

    auc: dict[str, float | None] = field(default_factory=dict)
    """{seconds, joules}: area under the metric; empty if unknown."""
    target: dict[str, float | None] = field(default_factory=dict)
    """{seconds, joules} until the target was reached, None if it was not or without a meter; empty without a target."""


@dataclass(frozen=True)
class Reached:
    """How many runs reached the target metric, and the time and energy that it took."""

    count: int
    num_runs: int
    seconds: Mean | None
    """None unless every run reached it: a mean over only those that did would be biased."""
    joules: Mean | None

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.count} of {self.num_runs} runs" if self.count else "not reached"
        parts = ((self.seconds, "s"), (self.joules, "J"))
        return ", ".join(_rounded(mean, unit) for mean, unit in parts if mean is not None)


def _rounded(mean: Mean, unit: str) -> str:
    interval = "" if mean.count == 1 else f" ± {mean.half_width:,.1f}"
    return f"{mean.value:,.1f}{interval} {unit}"


def glue_average(results: Iterable[Result]) -> Mean | None:
    """Mean over MNLI, SST-2 and RTE of their primary metrics, seed by seed; None unless some seed has all three.

    The tasks have equal weight, as in GLUE (Wang et al., arXiv:1804.07461). Stand-ins are left out.
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
class Contrast:
    """The difference of a method from the baseline, with its test."""

    test: str
    """paired t, Welch's t, McNemar or paired bootstrap."""
    difference: float
    low: float
    high: float
    """`low` to `high` is the 95 % interval of `difference`; NaN if there is none."""
    p: float | None
    """Two-sided; None if the test is undefined, for the reason in `note`."""
    count: tuple[int, int]
    """Number of seeds of the method and of the baseline; in a test over rows, the number of rows twice."""
    effect: float | None = None
    effect_name: str = ""
    """d_z: the mean difference over the standard deviation of the differences. g: Hedges' g, the difference over the
    pooled standard deviation with his correction. odds: rows that only the method gets right over rows that only the
    baseline gets right."""
    p_holm: float | None = None
    """`p` after Holm's correction over all tests over seeds, or all tests over rows, of a report."""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One method on one task and model, over its seeds."""

    label: str
    task: str
    metric: Mean
    best: Mean | None
    minus_baseline: Mean | None
    """Mean difference from the baseline in the score `Comparison.by`, on the seeds that both have."""
    seconds: Mean
    joules: Mean | None
    runs: list[str]
    test: Mean | None = None
    """None unless every run has a test score."""
    auc: dict[str, Mean] = field(default_factory=dict)
    """Mean area under the metric over `seconds` and over `joules`; a unit that some run lacks is left out."""
    target: Reached | None = None
    """None without a target."""
    measures: str = "metric"
    """The metric's name."""
    majority: Mean | None = None
    """Score of the same answer to every row; None if no run recorded it."""
    by_seed: dict[int, float] = field(default_factory=dict)
    """Seed -> score `Comparison.by`."""
    relative: float | None = None
    """`minus_baseline` divided by the baseline's mean on the same seeds."""
    seeds_test: Contrast | None = None
    rows_test: Contrast | None = None
    """The tests, set by significance.with_tests."""


@dataclass(frozen=True)
class Comparison:
    baseline: str | None
    rows: list[Row]
    glue: dict[str, Mean]
    """Label -> GLUE average, for labels with all three tasks."""
    by: str = "metric"
    """The score that is compared: `test` if every run has a test score; else `best`, the best validation score, if
    every run has one on the whole split; else `metric`, the validation score of the last weights."""
    target: float | None = None

    def row(self, label: str, task: str) -> Row | None:
        return next((row for row in self.rows if (row.label, row.task) == (label, task)), None)


def compare(
    results: list[Result],
    curves: Sequence[Curve] | None = None,
    target: float | None = None,
    baseline: str | None = None,
) -> Comparison:
    """Group runs by label, see `labels_of`, and by task and model.

    Args:
        curves: one per result; if absent, the areas are those of result.json.
        target: the metric whose time and energy `curves` hold, over 0 and at most 1.
        baseline: the label that the others are compared with. None: plain LoRA, if there is such a run.

    Raises:
        UserError: no run has the label `baseline`.
    """
    labels, tasks = labels_of(results), tasks_of(results)
    groups: dict[tuple[str, str], list[tuple[Result, Curve]]] = {}
    all_curves = curves or [Curve(_auc(result.auc)) for result in results]
    for result, label, task, curve in zip(results, labels, tasks, all_curves):
        if "value" in result.metric:
            groups.setdefault((label, task), []).append((result, curve))
    there = sorted({label for label, _ in groups})
    if baseline is not None and baseline not in there:
        raise UserError(f"--baseline {baseline}: no run is called so; there are: {', '.join(there) or 'none'}")
    baseline = baseline or ("lora" if "lora" in there else None)
    by = score_of([run for members in groups.values() for run, _ in members])
    rows = []
    for (label, task), members in sorted(groups.items(), key=lambda item: item[0][::-1]):
        runs, others = ([run for run, _ in some] for some in (members, groups.get((baseline or "", task), [])))
        row = _row(label, task, runs, by, [curve for _, curve in members], target)
        rows.append(row if label == baseline else _minus(row, _by_seed(others, by)))
    glue = {
        label: glue_average([r for r, own in zip(results, labels) if own == label]) for label in dict.fromkeys(labels)
    }
    found = {label: mean for label, mean in glue.items() if mean is not None}
    return Comparison(baseline, rows, found, by, target)


def _row(
    label: str,
    task: str,
    runs: list[Result],
    by: str,
    curves: list[Curve],
    target: float | None,
) -> Row:
    metric = metric_of(runs)
    assert metric is not None
    areas = {unit: _all([curve.auc.get(unit) for curve in curves]) for unit in ("seconds", "joules")}
    return Row(
        label=label,
        task=task,
        metric=metric,
        best=metric_of(runs, "best"),
        minus_baseline=None,
        seconds=mean_of([run.elapsed_s for run in runs]),
        joules=_all([run.energy_j for run in runs]),
        runs=[run.name for run in runs],
        test=metric_of(runs, "test") if all("value" in run.test for run in runs) else None,
        auc={unit: mean for unit, mean in areas.items() if mean is not None},
        target=None if target is None else _reached(curves),
        measures=str(runs[0].metric.get("name", "metric")),
        majority=_majority(runs, by),
        by_seed=_by_seed(runs, by),
    )


def _majority(runs: list[Result], by: str) -> Mean | None:
    """The majority score on the split of `by`."""
    found = [value for run in runs if (value := getattr(run, by).get("more", {}).get(MAJORITY)) is not None]
    return mean_of(list(map(number, found))) if found else None


def _reached(curves: list[Curve]) -> Reached:
    seconds, joules = ([curve.target.get(unit) for curve in curves] for unit in ("seconds", "joules"))
    return Reached(sum(value is not None for value in seconds), len(curves), _all(seconds), _all(joules))


def _all(values: list[float | None]) -> Mean | None:
    """The mean; None unless every value is known."""
    known = [value for value in values if value is not None]
    return mean_of(known) if len(known) == len(values) else None


def score_of(results: list[Result]) -> str:
    """The score that is compared, see Comparison.by. `best` is excluded if some run evaluated only a sample of rows."""
    kept = [of for of in ("test", "best") if all("value" in getattr(run, of) for run in results)]
    return next((of for of in kept if of == "test" or not any("num" in run.best for run in results)), "metric")


def _auc(saved: dict[str, Any]) -> dict[str, float | None]:
    return {unit: number(saved[unit]) for unit in ("seconds", "joules") if saved.get(unit) is not None}


def labels_of(results: list[Result]) -> list[str]:
    """A label per run: its method. While two runs share label, task and seed, the run_id, then the group or name, then
    the name replace it, so that runs of one label differ in their seeds. Different budgets get different labels."""
    labels, tasks = [result.method or result.run_id for result in results], tasks_of(results)
    for finer in (lambda r: r.run_id, lambda r: r.group or r.name, lambda r: r.name):
        keys = [(label, task, result.seed) for label, task, result in zip(labels, tasks, results)]
        twice = {label for (label, *_), count in Counter(keys).items() if count > 1}
        labels = [finer(result) if label in twice else label for label, result in zip(labels, results)]
    budgets: dict[tuple[str, str], set[str]] = {}
    for label, task, result in zip(labels, tasks, results):
        budgets.setdefault((label, task), set()).add(_budget(result))
    return [
        f"{label}, {_budget(result)}" if len(budgets[label, task]) > 1 else label
        for label, task, result in zip(labels, tasks, results)
    ]


def tasks_of(results: list[Result]) -> list[str]:
    """A task per run: dataset and model. If one name stands for several versions of the data, their hash is appended,
    because scores on different rows are not comparable. Runs of earlier versions recorded no hash."""
    names = [_task(result) for result in results]
    hashes: dict[str, set[str]] = {}
    for name, result in zip(names, results):
        hashes.setdefault(name, set()).add(_data(result))
    return [
        f"{name}{DATA_MARK}{_data(result)[:8] or 'not noted'}" if len(hashes[name]) > 1 else name
        for name, result in zip(names, results)
    ]


def _data(result: Result) -> str:
    return str(result.data.get("sha256", ""))


def _task(result: Result) -> str:
    stand_in = " (stand-in)" if result.stand_in else ""
    return f"{result.dataset}, {Path(result.model).name}{stand_in}"


def _budget(result: Result) -> str:
    return str(Budget(result.budget["kind"], result.budget["limit"])) if result.budget else "no budget"


def _by_seed(runs: list[Result], by: str) -> dict[int, float]:
    return {run.seed: number(getattr(run, by)["value"]) for run in runs}


def _minus(row: Row, baseline: dict[int, float]) -> Row:
    """The row with its difference from the baseline, on the seeds that both have."""
    shared = sorted(row.by_seed.keys() & baseline.keys())
    if not shared:
        return row
    minus = mean_of([row.by_seed[seed] - baseline[seed] for seed in shared])
    level = statistics.fmean(baseline[seed] for seed in shared)
    return replace(row, minus_baseline=minus, relative=minus.value / level if level else None)
