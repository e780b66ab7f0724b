"""Tables of bench/schedules.py from its runs: paired differences from the baseline, and their conclusions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bench.report import print_table
from fastpeft.compare.comparison import Mean, mean_of
from fastpeft.runs.events import finite, number

BASELINE = "linear"
MEASURES = {"metric": True, "loss": False, "test": True, "test_loss": False}
"""Measure -> whether more is better."""
BETTER, WORSE, SAME, UNKNOWN = "better", "worse", "no difference", "one seed"
UNQUIET = 1.1
Run = dict[str, Any]


def verdict(difference: Mean, more_is_better: bool) -> str:
    """`no difference` where the interval contains 0."""
    if difference.count < 2:
        return UNKNOWN
    if abs(difference.value) <= difference.half_width or difference.value == 0:
        return SAME
    return BETTER if (difference.value > 0) == more_is_better else WORSE


def paired(own: dict[int, float], base: dict[int, float]) -> Mean | None:
    """Mean of the differences over the seeds that both have."""
    seeds = sorted(own.keys() & base.keys())
    return mean_of([own[seed] - base[seed] for seed in seeds]) if seeds else None


def values_of(runs: Sequence[Run], measure: str) -> dict[int, float]:
    """Seed -> value of `measure`, for the runs with a finite one."""
    found = {run["seed"]: number(run[measure]) for run in runs if run[measure] is not None}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def row_of(schedule: str, runs: Sequence[Run]) -> dict[str, Any]:
    """One schedule's figures, from all compared runs."""
    own, base = ([run for run in runs if run["schedule"] == name] for name in (schedule, BASELINE))
    row: dict[str, Any] = {"schedule": schedule, "seeds": len(own), "rate": own[0]["rate"]}
    for measure, more_is_better in MEASURES.items():
        values = values_of(own, measure)
        if not values:
            continue
        row[measure] = _mean(mean_of(list(values.values())))
        difference = paired(values, values_of(base, measure))
        if schedule != BASELINE and difference is not None:
            # Leaving failed runs out of a mean would bias it upwards.
            all_there = len(values) == len(own)
            said = verdict(difference, more_is_better) if all_there else f"{len(own) - len(values)} without"
            row[measure]["minus_linear"] = _mean(difference) | {"verdict": said}
    over = [run["budget"]["spent"] / run["budget"]["limit"] - 1 for run in own]
    joules = [run["energy_j"] for run in own]
    row |= {
        "steps": sum(run["steps"] for run in own) / len(own),
        "steps_range": [min(run["steps"] for run in own), max(run["steps"] for run in own)],
        "diverged": sum(run["diverged"] for run in own),
        "overshoot": max(over),
        "energy_j": None if None in joules else sum(map(number, joules)) / len(joules),
    }
    row["is_baseline"] = schedule != BASELINE and _outcomes(own) == _outcomes(base)
    return finite(row)


def _outcomes(runs: Sequence[Run]) -> dict[int, tuple[Any, ...]]:
    return {run["seed"]: (run["rate"], *(run[measure] for measure in MEASURES)) for run in runs}


def _mean(mean: Mean) -> dict[str, Any]:
    return {"mean": mean.value, "half_width": None if math.isnan(mean.half_width) else mean.half_width, "n": mean.count}


def rows_of(runs: Sequence[Run], schedules: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the schedules, best validation metric first."""
    there = {run["schedule"] for run in runs}
    rows = [row_of(schedule, runs) for schedule in schedules if schedule in there]
    return sorted(rows, key=lambda row: -row.get("metric", {}).get("mean", -math.inf))


def unlike(runs: Sequence[Run]) -> list[str]:
    """Messages about runs whose start differs from that of the baseline's run with the same seed. None are expected.

    Compared are the first step's loss and gradient norm and the first steps' token counts. On a CPU they are
    bit-identical; on a GPU equal up to the order of its sums.
    """
    loose = any(run["device"] != "cpu" for run in runs) or len({run["part"] for run in runs}) > 1
    bounds = {"loss": 1e-3 if loose else 0.0, "grad_norm": 1e-2 if loose else 0.0}
    first: dict[int, Run] = {}
    for run in runs:
        if run["schedule"] == BASELINE or run["seed"] not in first:
            first[run["seed"]] = run
    found = []
    for run in runs:
        own, base = run["start"], first[run["seed"]]["start"]
        for key, bound in bounds.items():
            if not math.isclose(number(own[key]), number(base[key]), rel_tol=bound):
                found.append(f"{run['schedule']}, seed {run['seed']}: {key} {own[key]} and not {base[key]}")
        if any(a != b for a, b in zip(own["tokens"], base["tokens"])):
            found.append(f"{run['schedule']}, seed {run['seed']}: the first batches are others")
    return found


# ---- tables --------------------------------------------------------------------------------


def show(report: dict[str, Any]) -> None:
    """Print tables of the search, the comparison and the costs, then their conclusions in words."""
    _show_search(report)
    rows, name = report["rows"], report["metric"]
    title = f"{report['title']}: after the budget, mean over seeds, and paired difference from tuned {BASELINE}"
    measures = [(measure, text) for measure, text in _texts(name).items() if any(measure in row for row in rows)]
    columns = ["schedule", "rate", "n", "steps"]
    for _, text in measures:
        columns += [text, "minus linear, 95 % interval", ""]
    lines = []
    for row in rows:
        line = [row["schedule"], f"{row['rate']:g}", row["seeds"], f"{row['steps']:.0f}"]
        for measure, _ in measures:
            line += _cells(row.get(measure), row["seeds"])
        lines.append(line)
    _print_wide(title, columns, lines, 4, 3)
    _show_costs(report)
    print()
    print("\n".join(conclusions(report)))


def _texts(metric: str) -> dict[str, str]:
    name = metric.replace("_", " ")
    return {"metric": f"{name}, val", "loss": "loss, val", "test": f"{name}, test", "test_loss": "loss, test"}


def _cells(value: dict[str, Any] | None, seeds: int) -> list[str | None]:
    if value is None:
        return [None, None, "none"]
    minus = value.get("minus_linear")
    if minus is None:
        return [f"{value['mean']:.4f}", None, "baseline"]
    fewer = "" if minus["n"] == seeds else f", n {minus['n']}"
    return [f"{value['mean']:.4f}", interval(minus) + fewer, minus["verdict"]]


def interval(value: dict[str, Any]) -> str:
    if value["half_width"] is None:
        return f"{value['mean']:+.4f}"
    low, high = value["mean"] - value["half_width"], value["mean"] + value["half_width"]
    return f"{value['mean']:+.4f} ({low:+.4f} to {high:+.4f})"


def _print_wide(title: str, columns: list[str], lines: list[list[Any]], num_fixed: int, group: int) -> None:
    """Print a table for every two groups of columns, so that lines fit the screen."""
    for start in range(num_fixed, len(columns), 2 * group):
        part = slice(start, start + 2 * group)
        print_table(title, columns[:num_fixed] + columns[part], [line[:num_fixed] + line[part] for line in lines])


def _show_search(report: dict[str, Any]) -> None:
    lines = [
        [
            schedule,
            f"{tuned['rate']:g}" + (" (edge)" if tuned.get("edge") else ""),
            ", ".join(f"{trial['rate']:g}: {trial['score']}" for trial in tuned.get("trials", [])) or "given",
        ]
        for schedule, tuned in report["tuned"].items()
    ]
    about = report["search"]
    title = f"search: {about['count']} runs of {about['budget']}, {about['run_s'] / 60:.1f} min, seed {about['seed']}"
    for line in [title, *(f"  {name:16} {rate:>18}   {trials}" for name, rate, trials in lines)]:
        print(line)
    print(f"  rate: validation {about['tune_on']} of each trial, in the order tried; the rate in front is taken")
    if any(tuned.get("edge") for tuned in report["tuned"].values()):
        print("  (edge): the best of its trials is the lowest or highest rate tried; its own best may lie beyond")
    print()


def _show_costs(report: dict[str, Any]) -> None:
    columns = ["schedule", "step over constant, median", "95 % interval", "mean", "95 % interval"]
    columns += ["overshoot, max", "joules", "diverged"]
    lines = []
    for row in report["rows"]:
        cost = report["overhead"].get(row["schedule"])
        line: list[Any] = [row["schedule"], *_ratio(cost, "ratio"), *_ratio(cost, "mean_ratio")]
        line += [f"{row['overshoot']:+.2%}", row["energy_j"] and f"{row['energy_j']:.0f}"]
        lines.append([*line, f"{row['diverged']} of {row['seeds']}"])
    print_table(f"{report['title']}: costs", columns, lines)
    control = report["overhead"].get("constant")
    if control:
        print(
            f"steps by {control['clock']}; constant's over its own, {control['rounds']} rounds, is how far noise goes."
        )
    if not any(row["energy_j"] for row in report["rows"]):
        print("joules: no energy meter could be read here.")


def _ratio(cost: dict[str, Any] | None, key: str) -> list[str | None]:
    if cost is None:
        return [None, None]
    low, high = cost[f"{key}_low"], cost[f"{key}_high"]
    return [f"{cost[key]:.4f}", None if low is None else f"{low:.4f} to {high:.4f}"]


def _unquiet(rows: Sequence[dict[str, Any]]) -> str | None:
    """Warning where a schedule's runs differ in steps for the same budget: the machine's load affects the figures."""
    worst = max(rows, key=lambda row: row["steps_range"][1] / max(1, row["steps_range"][0]))
    low, high = worst["steps_range"]
    if worst["diverged"] or high <= UNQUIET * low:
        return None
    return (
        f"the machine was not quiet: {worst['schedule']} took {low} steps in one run and {high} in another. "
        "A budget in steps leaves that out"
    )


def conclusions(report: dict[str, Any]) -> list[str]:
    """Conclusions from the intervals, by measure, with one rule for all schedules."""
    lines, others = [], [row for row in report["rows"] if row["schedule"] != BASELINE]
    for measure, text in _texts(report["metric"]).items():
        there = [row for row in others if "minus_linear" in row.get(measure, {})]
        found = [(row["schedule"], row[measure]["minus_linear"]) for row in there]
        if not found:
            continue
        by_verdict: dict[str, list[str]] = {BETTER: [], WORSE: [], SAME: []}
        for schedule, minus in found:
            by_verdict.setdefault(minus["verdict"], []).append(schedule)
        parts = [f"{said}: {', '.join(names) or 'none'}" for said, names in by_verdict.items()]
        lines.append(f"{text}, against tuned {BASELINE}: {'; '.join(parts)}")
    for row in others:
        if "metric" not in row:
            lines.append(f"{row['schedule']}: no run of it has a {report['metric']}")
        if row["is_baseline"]:
            lines.append(
                f"{row['schedule']}: every run of it ended as {BASELINE}'s did, to the bit. Did it do anything?"
            )
    count = len(others)
    if count > 1:
        lines.append(
            f"{count} intervals at 95 % a measure: by chance alone {0.05 * count:.1f} of them would leave out 0."
        )
    if (unquiet := _unquiet(report["rows"])) is not None:
        lines.append(unquiet)
    lines.append(
        "same initial weights and data order: "
        + ("yes, by the first step's loss and gradient norm and the first batches" if not report["unlike"] else "NO")
    )
    return lines + [f"  {what}" for what in report["unlike"]]
