"""The two lines above a run's screen."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fastpeft.tui import cells
from fastpeft.tui.format import amount, bar, decimal, duration, fitted, headed, joined, printable, short
from fastpeft.tui.runs_index import RunRow
from fastpeft.tui.tail import RunTail
from fastpeft.tui.theme import STATUS, WRONG


def run_title(row: RunRow | None, run: str, tail: RunTail | None, width: int) -> Text:
    """Two lines: the run's name and facts, and its progress."""
    if row is None:
        return headed(run, ["there is no such run now"], "", width - 2).append("\n")
    said: list[Text | str] = [cells.status_badge(row.status), cells.stand_in_badge() if row.stand_in else ""]
    if tail is not None and not tail.is_caught_up:
        said.append(Text(f"reading {tail.progress:.0%}", "bold"))
    if tail is not None and tail.malformed:
        said.append(Text(f"{tail.malformed} bad line{'s' if tail.malformed > 1 else ''}", WRONG))
    first = headed(run, said, cells.method_and_where(row), width - 2)
    color = STATUS.get(row.status, STATUS["no result"])[1]
    budget, facts = bar(row.progress, 12 if width < 110 else 30, color), []
    if row.budget_limit is not None:
        unit = " steps" if row.budget_kind == "steps" else ""
        budget.append(f" of {amount(row.budget_limit, row.budget_kind)}{unit}")
    if row.eta_s is not None:
        facts.append(f"{duration(row.eta_s)} left")
    facts += [f"step {row.steps:,}"] if row.steps and width >= 110 else []
    facts += [] if row.last_loss is None else [f"loss {decimal(row.last_loss)}"]
    if row.metric is not None:
        last = "" if width < 110 else f"{row.metric_name} {decimal(row.metric)}, "
        facts.append(f"{last}best {decimal(cells.best_of(row))}")
    if row.test is not None:
        facts.append(f"test {decimal(row.test)}")
    facts += [] if row.tokens_per_s is None else [f"{short(row.tokens_per_s)} tok/s"]
    if row.energy_j is not None:
        facts.append(short(row.energy_j, "J"))
    second = fitted([budget, *facts], width - 2)
    if tail is not None and tail.phase is not None:
        second = joined([budget, _phase(tail.phase)])
        second.truncate(width - 2, overflow="ellipsis")
    return Text("\n").join([first, second])


def _phase(event: dict[str, Any]) -> str:
    """The current phase, its progress, and the time to the end of the first step."""
    text = printable(str(event["text"]))
    if "done" in event:
        text += f": {event['done']:,} of {event['total']:,} {printable(str(event['unit']))}"
    return text + (f", {duration(event['left_s'])} left" if "left_s" in event else "")
