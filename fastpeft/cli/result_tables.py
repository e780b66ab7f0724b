"""Tables of results that commands print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from fastpeft.compare.comparison import Comparison, Contrast, metric_of
from fastpeft.compare.found_runs import Found
from fastpeft.compare.problem_sets import SetScore, difference
from fastpeft.config.methods import METHODS
from fastpeft.runs.curves import evaluations
from fastpeft.runs.events import number
from fastpeft.runs.parts import figure, table_of
from fastpeft.runs.store import MAJORITY, Result, RunFolder
from fastpeft.tui.format import sparkline

_CURVE_WIDTH = 48
"""Characters of the loss curve."""
_NUM_SCORES = 8
"""Number of evaluations that fit on a line."""


def closing(result: Result, folder: RunFolder | None = None) -> Group:
    """The result of a run: its facts, its curves from the log in `folder`, and metrics of parts of the data, if any."""
    curves = {} if folder is None or not folder.events.is_file() else _curves(folder.events)
    parts = _parts_tables(result)
    return Group(closing_table(result, curves), *(row for table in parts for row in ("", table)))


def _curves(log: Path) -> dict[str, str]:
    """The training loss as block characters, and the metric at evaluations."""
    from fastpeft.compare.history import binned, read_history
    from fastpeft.runs.events import read_lines

    history, curves = read_history(read_lines(log)), {}
    if len(history):
        loss = binned(history.steps["elapsed_s"], history.steps["loss"], _CURVE_WIDTH).mean
        if len(loss) > 1:
            curves["training loss"] = (
                f"{sparkline(tuple(loss.tolist()), _CURVE_WIDTH)}  {loss[0]:.3g} to {loss[-1]:.3g}"
            )
    scores = evaluations(history.validations)
    if len(scores) > 1:
        count = min(_NUM_SCORES, len(scores))
        shown = [scores[round(i * (len(scores) - 1) / (count - 1))] for i in range(count)]
        curves["learning curve"] = " ".join(f"{one.value:.3f}" for one in shown)
        curves["learning curve"] += f", evaluated after {', '.join(f'{one.elapsed_s:,.0f}' for one in shown)} s"
    return curves


def _parts_tables(result: Result) -> Iterator[Table]:
    for split, score in (("validation", result.metric), ("test", result.test)):
        if score.get("groups"):
            names, rows = table_of(score["groups"])
            table = Table(box=None, pad_edge=False)
            table.add_column(split, overflow="fold")
            for name in names:
                table.add_column(name, justify="right")
            for row in rows:
                table.add_row(*map(escape, row))
            yield table


def closing_table(result: Result, curves: dict[str, str] | None = None) -> Table:
    """One row per fact of a finished run; `curves` are the rows of `_curves`."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    budget, weights = result.budget, METHODS[result.method].saved_as if result.method in METHODS else "adapter"
    rows = {
        "status": result.status,
        result.metric.get("name", "metric"): _value(result.metric),
        **{name: figure(value) for name, value in result.metric.get("more", {}).items()},
        "best": _best(result.best) if result.best else "none",
        **(curves or {}),
        "test": f"{_value(result.test)} on {result.test['num']:,} rows, best weights" if result.test else None,
        **{f"test {name}": figure(value) for name, value in result.test.get("more", {}).items()},
        "mean over budget": f"{number(auc):.4f}" if (auc := result.auc.get("seconds")) is not None else None,
        "budget": _spent(budget) if budget else "none",
        "time": f"{result.elapsed_s:.1f} s, and {result.setup_s:.1f} s of set-up",
        "energy": None if result.energy_method == "none" else _energy(result),
        "trained on": f"{result.tokens:,} tokens in {result.steps:,} steps",
        weights: "-" if result.adapter_mb is None else f"{result.adapter_mb:.2f} MB",
        "of the adapter": _adapter_facts(result.adapter_facts),
        "peak memory": "-" if result.peak_memory_mb is None else f"{result.peak_memory_mb:,.0f} MB",
        "rows": _rows(result),
        "model, data": f"{result.model} on {result.dataset}{' (STAND-IN)' if result.stand_in else ''}",
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, escape(value))
    return table


def _best(best: dict[str, Any]) -> str:
    sample = f", on a sample of {best['num']:,} rows" if "num" in best else ""
    return f"{_value(best)} at step {best['step']:,}{sample}"


def _adapter_facts(facts: dict[str, float]) -> str | None:
    said = [f"{facts['extra_flops']:.1%} extra FLOPs"] if "extra_flops" in facts else []
    said += [f"{facts['active_atoms']:.2f} active atoms a token"] if "active_atoms" in facts else []
    return ", ".join(said) or None


def group_table(results: list[Result]) -> Table:
    """One line per seed, and the mean with its 95 % interval."""
    table = Table(box=None, pad_edge=False)
    for name in ("seed", "status", "metric", "best", "steps", "time"):
        table.add_column(name)
    for r in results:
        values = (_value(r.metric), _value(r.best), f"{r.steps:,}", f"{r.elapsed_s:.0f} s")
        table.add_row(str(r.seed), r.status, *values)
    mean, best = (str(metric_of(results, of) or "-") for of in ("metric", "best"))
    table.add_row("mean", "", mean, best, style="bold")
    return table


def comparison_table(comparison: Comparison) -> Table:
    """`fastpeft evaluate`: one line per method and task, then the GLUE averages. Columns without values are omitted."""
    rows, target = comparison.rows, comparison.target
    minus = f"minus {comparison.baseline}" if comparison.baseline else "difference"
    columns: dict[str, list[object]] = {
        "task": [row.task for row in rows],
        "method": [row.label for row in rows],
        "seeds": [row.metric.count for row in rows],
        "measures": [row.measures for row in rows],
        "metric": [row.metric for row in rows],
        "best": [row.best for row in rows],
        "test": [row.test for row in rows],
        MAJORITY: [row.majority for row in rows],
        minus if comparison.by == "metric" else f"{minus} ({comparison.by})": [row.minus_baseline for row in rows],
        "p over seeds": [_p(row.seeds_test) for row in rows],
        "p over rows": [_p(row.rows_test) for row in rows],
        "AUC": [row.auc.get("seconds") for row in rows],
        "AUC over J": [row.auc.get("joules") for row in rows],
        f"to {target}": [row.target for row in rows],
        "time": [f"{row.seconds.value:.0f} s" for row in rows],
        "energy": [f"{row.joules.value:,.0f} J" if row.joules else None for row in rows],
    }
    optional = ("test", MAJORITY, "p over seeds", "p over rows", "AUC", "AUC over J", f"to {target}")
    columns = {name: cells for name, cells in columns.items() if name not in optional or any(cells)}
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name)
    for cells in zip(*columns.values()):
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    for label, mean in comparison.glue.items():
        table.add_row("GLUE average", label, str(mean.count), "-", str(mean), *["-"] * (len(columns) - 5), style="bold")
    return table


def _p(contrast: Contrast | None) -> str | None:
    """The p-value after Holm's correction, with the name of its test."""
    if contrast is None:
        return None
    p = contrast.note if contrast.p_holm is None else f"{contrast.p_holm:.3g}"
    return f"{p} ({contrast.test})"


def left_out_table(found: list[Found]) -> Table:
    """`fastpeft evaluate`: the runs left out of the means, and why."""
    table = Table(box=None, pad_edge=False)
    for name in ("left out", "status", "why"):
        table.add_column(name, overflow="fold")
    for one in found:
        table.add_row(escape(one.name), one.status, escape(one.note))
    return table


def sets_table(scores: list[SetScore]) -> Table:
    """`fastpeft evaluate RUN --on`: one line per set. Columns without values are omitted."""
    names = list(dict.fromkeys(name for score in scores for name in score.more))
    table = Table(box=None, pad_edge=False)
    for name in ("set", "problems", "exact match", "95 % interval", *(name.replace("_", " ") for name in names)):
        table.add_column(name)
    if len(scores) > 1:
        table.add_column(f"minus {escape(scores[0].name)}")
    for score in scores:
        low, high = score.interval
        shares = (f"{score.more[name]:.4f}" if name in score.more else "-" for name in names)
        row = [escape(score.name), f"{score.num:,}", f"{score.exact_match:.4f}", f"{low:.4f} to {high:.4f}", *shares]
        if score is not scores[0]:
            apart, down, up = difference(score, scores[0])
            row.append(f"{apart:+.4f} ({down:+.4f} to {up:+.4f})")
        elif len(scores) > 1:
            row.append("-")
        table.add_row(*row)
    return table


def runs_table(folders: list[RunFolder]) -> Table:
    """`fastpeft runs ls`: one line per run. The runs of a group are listed under a line with their mean."""
    table = Table(box=None, pad_edge=False)
    for name in ("run", "status", "metric", "best", "steps", "time", "model, data"):
        table.add_column(name, overflow="fold", no_wrap=name == "run")
    groups: dict[str, list[tuple[RunFolder, Result | None]]] = {}
    for folder in folders:
        result = folder.read_result()
        groups.setdefault(f"group {result.group}" if result and result.group else folder.path.name, []).append(
            (folder, result)
        )
    for members in groups.values():
        results = [result for _, result in members if result is not None and result.group is not None]
        if results:
            table.add_row(*_group_row(results), style="bold")
        for folder, result in members:
            table.add_row(*_run_row(folder, result, indent="  " if results else ""))
    return table


def _run_row(folder: RunFolder, result: Result | None, indent: str) -> list[str]:
    name, status = indent + escape(folder.path.name), folder.status()
    if result is None:
        return [name, status, *["-"] * 5]
    where = f"{Path(result.model).name} on {result.dataset}{' (stand-in)' if result.stand_in else ''}"
    values = (_value(result.metric), _value(result.best), f"{result.steps:,}", f"{result.elapsed_s:.0f} s")
    return [name, status, *values, escape(where)]


def _group_row(results: list[Result]) -> list[str]:
    done = sum(result.status == "done" for result in results)
    seconds = sum(result.elapsed_s for result in results)
    steps = sum(result.steps for result in results)
    mean, best = (str(metric_of(results, of) or "-") for of in ("metric", "best"))
    values = (mean, best, f"{steps:,}", f"{seconds:.0f} s")
    return [results[0].group or "", f"{done} of {len(results)} done", *values, "mean of the seeds"]


def _spent(budget: dict[str, Any]) -> str:
    digits = 1 if budget["kind"] == "seconds" else 0
    return f"{budget['spent']:,.{digits}f} of {budget['limit']:,.0f} {budget['kind']}"


def _rows(result: Result) -> str | None:
    """Number of rows of each split, and the hash of the data."""
    if not result.data:
        return None
    counts = ", ".join(f"{name} {split['rows']:,}" for name, split in result.data["splits"].items())
    return f"{counts}; SHA-256 {result.data['sha256'][:12]}"


def _energy(result: Result) -> str:
    joules = "not known" if result.energy_j is None else f"{result.energy_j:,.0f} J"
    return f"{joules} ({result.energy_method})"


def _value(metric: dict[str, Any]) -> str:
    return f"{number(metric['value']):.4f}" if "value" in metric else "-"
