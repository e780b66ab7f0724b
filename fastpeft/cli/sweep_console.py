"""What `fastpeft sweep` prints: a line for each finished trial, a live line with the best value and what is left, and
a closing table."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from fastpeft.cli.console import ConsoleReporter
from fastpeft.cli.result_tables import closing, group_table
from fastpeft.config import Budget, RunConfig, parse_budget
from fastpeft.runs.events import Event
from fastpeft.sweep.sweep import Outcome
from fastpeft.sweep.trial_rows import Standing, TrialRow

_VALUE_WIDTH, _MIN_WIDTH = 11, 8
PLAIN_EVERY_S = 60.0
_STYLES = {"done": None, "pruned": "dim", "diverged": "magenta"}


class SweepConsole(AbstractContextManager):
    """A sweep's Listener. Use as a context: leaving it clears the live line."""

    def __init__(self, run: RunConfig, console: Console | None = None) -> None:
        self._reporter = ConsoleReporter(console)
        self._console = self._reporter.console
        self._keys = list(run.optuna.space)
        self._minimizes = run.optuna.direction == "minimize"
        self._budget = parse_budget(run.optuna.budget) if run.optuna.budget else None
        self._best: float | None = None
        self._has_head = False
        self._status: Status | None = None
        self._printed_s = -math.inf

    def __exit__(self, *exception: object) -> None:
        self._hide()
        self._reporter.__exit__(*exception)

    def say(self, message: str) -> None:
        if message.startswith("\n"):  # a full training begins, which has its own live line
            self._hide()
        self._reporter.say(message)

    def on_event(self, event: Event) -> None:
        self._reporter.on_event(event)

    def on_trial(self, row: TrialRow) -> None:
        if not self._has_head:
            self._has_head = True
            self._line("trial", "outcome", "value", "seconds", "joules", list(self._keys), style="bold")
        params = [_short(row.params.get(key)) for key in self._keys]
        is_best = row.outcome == "done" and row.value is not None and self._improves(row.value)
        value = "-" if row.value is None else f"{row.value:.4f}"
        joules = "-" if row.energy_j is None else f"{row.energy_j:,.0f}"
        known = row.outcome in _STYLES
        style = "bold green" if is_best else _STYLES.get(row.outcome, "red")
        outcome = row.outcome if known else "failed"
        self._line(str(row.number), outcome, value, f"{row.duration_s:.1f}", joules, params, style)
        if not known:
            self._console.print(f"      {row.outcome.splitlines()[0]}; it is made again", style="red", markup=False)

    def _improves(self, value: float) -> bool:
        better = self._best is None or (value < self._best if self._minimizes else value > self._best)
        if better:
            self._best = value
        return better

    def _line(
        self, number: str, outcome: str, value: str, seconds: str, joules: str, params: list[str], style: str | None
    ) -> None:
        head = f"{number:>5}  {outcome:<8}  {value:>8}  {seconds:>8}  {joules:>8}"
        cells = (f"{text:<{max(_MIN_WIDTH, len(key))}}" for text, key in zip(params, self._keys))
        self._console.print("  ".join((head, *cells)).rstrip(), style=style, markup=False)

    def on_standing(self, standing: Standing) -> None:
        line = self._standing(standing)
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status(line)
                self._status.start()
            self._status.update(line)
        elif time.monotonic() - self._printed_s >= PLAIN_EVERY_S:
            self._printed_s = time.monotonic()
            self._console.print(line, markup=False)

    def _standing(self, standing: Standing) -> str:
        parts = [f"{standing.counted} of {standing.wanted} trials", f"{standing.running} running"]
        if standing.best is not None and standing.best.value is not None:
            parts.append(f"best {standing.best.value:.4f} of trial {standing.best.number}")
        parts.append(_left(self._budget, standing))
        return ", ".join(parts)

    def close(self, outcome: Outcome) -> None:
        """Print the best settings, and the results of their full trainings."""
        self._hide()
        best = outcome.best
        if best is None:
            return
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column()
        table.add_row("trials", str(outcome.counted))
        table.add_row("best", f"{best.value:.4f} of trial {best.number}")
        for key, value in best.params.items():
            table.add_row(escape(key), escape(_short(value)))
        self._console.print("", table, "", sep="\n")
        if len(best.results) == 1:
            self._console.print(closing(best.results[0]))
        if best.results:
            self._console.print(group_table(best.results))
        if outcome.stand_in:
            self.say("STAND-IN: these numbers say nothing about the model and the data that the preset names")

    def _hide(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def _left(budget: Budget | None, standing: Standing) -> str:
    spent_j = "" if standing.spent_j is None else f", {standing.spent_j:,.0f} J"
    spent = f"{standing.spent_s:,.0f} s{spent_j} spent"
    if budget is None:
        return spent
    used = standing.spent_s if budget.kind == "seconds" else standing.spent_j or 0.0
    return f"{spent}, {max(0.0, budget.limit - used):,.0f} {'s' if budget.kind == 'seconds' else 'J'} left"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
