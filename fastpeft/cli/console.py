"""What `fastpeft train` prints: a live line in a terminal, plain lines elsewhere, a closing table.

It reads events only, as every display does.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastpeft.compare.comparison import Comparison, Contrast, metric_of
from fastpeft.compare.found_runs import Found
from fastpeft.compare.problem_sets import SetScore, difference
from fastpeft.config.methods import METHODS
from fastpeft.runs.events import Event, number
from fastpeft.runs.parts import figure, table_of
from fastpeft.runs.store import MAJORITY, Result, RunFolder

PLAIN_EVERY_S = 10.0
_WIDE = 110
_WINDOW_STEPS = 32
"""The loss and the rate shown are means over this many steps."""


class _Elapsed(TimeElapsedColumn):
    """Since a phase began; steps have the time that is left instead."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.fields["is_phase"] else Text()


class ConsoleReporter(AbstractContextManager):
    """A trainer's Reporter. Use as a context: leaving it clears the live line."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.console.soft_wrap = not self.console.is_terminal  # a file has no edge to wrap at
        self._progress: Progress | None = None
        self._task: Any = None
        self._phase: str | None = ""
        """The text of the phase that was told last; None: steps are told."""
        self._whole_s: float | None = None
        """Estimated by the first step while it was under way."""
        self._recent: deque[tuple[float, int]] = deque(maxlen=_WINDOW_STEPS)
        self._losses: deque[float] = deque(maxlen=_WINDOW_STEPS)
        self._printed_at = -math.inf
        self._first: tuple[float, float] | None = None

    def say(self, message: str) -> None:
        style = "yellow" if message.startswith("STAND-IN") else None
        self.console.print(message, style=style, markup=False)

    def on_event(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event['type']}", None)
        if handler is not None:
            handler(event)

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    # ---- events ----------------------------------------------------------------------------

    def _on_run(self, event: Event) -> None:
        self.__exit__()
        self._first = None
        self._recent.clear()
        self._losses.clear()
        for note in event["notes"]:
            self.say(note)
        budget = event["budget"]
        self.say(f"budget: {budget['limit']:,.0f} {budget['kind']}")
        self._phase, self._whole_s = "", None

    def _on_phase(self, event: Event) -> None:
        is_new = event["text"] != self._phase
        if is_new:
            self._phase = event["text"]
            self._begin_live(event["text"])
        text = f"{event['done']:,} of {event['total']:,} {event['unit']}" if "done" in event else ""
        estimate, is_first_estimate = _estimate(event), bool(event.get("left_s")) and self._whole_s is None
        self._whole_s = event.get("whole_s", self._whole_s)
        if self._progress is not None:
            figures = {"completed": event["done"], "total": event["total"]} if text else {}
            self._progress.update(self._task, tail=f"{text}{_estimate(event, short=True)}", **figures)
            return
        if is_new or is_first_estimate or self._is_time_for_a_line():
            self._printed_at = time.monotonic()
            self.say(f"{event['text']}{': ' if text else ''}{text}{estimate}")

    def _begin_live(self, description: str, total: float | None = None) -> None:
        """A live line that begins anew, in a terminal; without a total its bar only moves."""
        if not self.console.is_terminal:
            return
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20 if self.console.width >= _WIDE else 5),
                TextColumn("{task.fields[tail]}"),
                _Elapsed(),
            )
            self._progress = Progress(*columns, console=self.console, refresh_per_second=4, transient=True)
            self._progress.start()
        else:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=total, tail="", is_phase=total is None)

    def _is_time_for_a_line(self) -> bool:
        return time.monotonic() - self._printed_at >= PLAIN_EVERY_S

    def _on_step(self, event: Event) -> None:
        self._recent.append((event["elapsed_s"], event["tokens"]))
        self._losses.append(number(event["loss"]))
        line = (
            f"step {event['step'] + 1:,}  loss {sum(self._losses) / len(self._losses):.4f}  lr {event['lr']:.2e}  "
            f"{self._tokens_per_s():,.0f} tok/s"
        )
        if event.get("energy_j") is not None:
            line += f"  {event['energy_j']:,.0f} J"
        progress, eta = event["progress"], self._eta(event)
        is_first, self._phase = self._phase is not None, None
        if is_first:
            self._begin_live(line, total=1.0)
        if self._progress is not None:
            tail = f"{progress:4.0%}  {eta}"
            self._progress.update(self._task, completed=progress, description=line, tail=tail)
        elif is_first or self._is_time_for_a_line():
            self._printed_at = time.monotonic()
            self.say(f"{line}  {progress:.0%} of the budget  {eta}")

    def _on_eval(self, event: Event) -> None:
        more = "".join(f", {name} {figure(value)}" for name, value in event.get("more", {}).items())
        what = "test split, best weights," if event["split"] == "test" else "evaluation"
        self.say(
            f"{what} at step {event['step']:,}, {event['elapsed_s']:.0f} s: {event['metric']} "
            f"{number(event['value']):.4f}{more} on {event['num']:,} rows, loss {number(event['loss']):.4f}"
        )

    def _on_importance(self, event: Event) -> None:
        if "num_batches" not in event:
            return
        ranked = sorted(zip(map(number, event["weights"]), event["names"]), reverse=True)
        self.say(
            f"importances from {event['num_batches']} batches in {event['seconds']:.1f} s: highest "
            f"{ranked[0][0]:.4f} {ranked[0][1]}, lowest {ranked[-1][0]:.4f} {ranked[-1][1]}"
        )

    def _on_warning(self, event: Event) -> None:
        self.console.print(f"warning: {event['message']}", style="yellow", markup=False)

    # ---- figures ---------------------------------------------------------------------------

    def _tokens_per_s(self) -> float:
        (first, _), (last, _) = self._recent[0], self._recent[-1]
        tokens = sum(count for _, count in list(self._recent)[1:])
        return tokens / (last - first) if last > first else 0.0

    def _eta(self, event: Event) -> str:
        """Time to the end, from the progress since this process started."""
        now, progress = event["elapsed_s"], event["progress"]
        if self._first is None:
            self._first = (now, progress)
        gained = progress - self._first[1]
        if gained <= 0:
            return "ETA --" if self._whole_s is None else f"ETA about {_clock(self._whole_s)}"
        return f"ETA {_clock((now - self._first[0]) / gained * (1 - progress))}"


def _estimate(event: Event, short: bool = False) -> str:
    """Of a first step under way: when it ends, and what training takes from here on."""
    if "left_s" not in event:
        return ""
    line, is_known = _clock(event["left_s"]), "whole_s" in event
    if short:
        return f", line in {line}" + (f", all in {_clock(event['whole_s'])}" if is_known else "")
    training = f"; training about {_clock(event['whole_s'])}, {event['whole_steps']:,} steps" if is_known else ""
    return f", its line in about {line}{training}"


def _clock(seconds: float) -> str:
    """m:ss, and from an hour on h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def closing(result: Result) -> Group:
    """What a run came to: its facts, and behind them the metrics of parts of the data, where its task has such."""
    parts = _parts_tables(result)
    return Group(closing_table(result), *(row for table in parts for row in ("", table)))


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


def closing_table(result: Result) -> Table:
    """One row a fact, of a run that has ended."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    budget, weights = result.budget, METHODS[result.method].saved_as if result.method in METHODS else "adapter"
    rows = {
        "status": result.status,
        result.metric.get("name", "metric"): _value(result.metric),
        **{name: figure(value) for name, value in result.metric.get("more", {}).items()},
        "best": _best(result.best) if result.best else "none",
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
    """A line a seed, and their mean with its 95 % interval."""
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
    """`fastpeft evaluate`: a line a method and task, then the GLUE averages. What no run has gets no column."""
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
    """After Holm, with the test that it is of."""
    if contrast is None:
        return None
    p = contrast.note if contrast.p_holm is None else f"{contrast.p_holm:.3g}"
    return f"{p} ({contrast.test})"


def left_out_table(found: list[Found]) -> Table:
    """`fastpeft evaluate`: the runs that are no part of the means, and why."""
    table = Table(box=None, pad_edge=False)
    for name in ("left out", "status", "why"):
        table.add_column(name, overflow="fold")
    for one in found:
        table.add_row(escape(one.name), one.status, escape(one.note))
    return table


def sets_table(scores: list[SetScore]) -> Table:
    """`fastpeft evaluate RUN --on`: a line a set. Shares that no set has get no column."""
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
    """`fastpeft runs ls`: a line a run; the runs of one group stand under a line with their mean."""
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
    """Of each split, and the hash by which the data are known again."""
    if not result.data:
        return None
    counts = ", ".join(f"{name} {split['rows']:,}" for name, split in result.data["splits"].items())
    return f"{counts}; SHA-256 {result.data['sha256'][:12]}"


def _energy(result: Result) -> str:
    joules = "not known" if result.energy_j is None else f"{result.energy_j:,.0f} J"
    return f"{joules} ({result.energy_method})"


def _value(metric: dict[str, Any]) -> str:
    return f"{number(metric['value']):.4f}" if "value" in metric else "-"
