"""What `fastpeft train` prints while it runs: a live line in a terminal, plain lines elsewhere.

It reads events only, as all displays do.
"""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from fastpeft.cli.safe_console import SafeConsole
from fastpeft.runs.events import Event, number
from fastpeft.runs.parts import figure

PLAIN_EVERY_S = 10.0
_WIDE = 110
_WINDOW_STEPS = 32
"""The displayed loss and tokens per second are means over this many steps."""


class _Elapsed(TimeElapsedColumn):
    """Time since a phase began; for steps the remaining time instead."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.fields["is_phase"] else Text()


class ConsoleReporter(AbstractContextManager):
    """A Reporter for `train`. Use as a context: leaving it clears the live line."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or SafeConsole(highlight=False)
        self.console.soft_wrap = not self.console.is_terminal  # do not wrap lines in a file
        self._progress: Progress | None = None
        self._task: Any = None
        self._phase: str | None = ""
        """Text of the last reported phase; None once steps are reported."""
        self._whole_s: float | None = None
        """Seconds of the whole run, as estimated during the first step."""
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
        """Start a new live line, in a terminal. Without a total its bar is indeterminate."""
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

    # ---- rates -----------------------------------------------------------------------------

    def _tokens_per_s(self) -> float:
        (first, _), (last, _) = self._recent[0], self._recent[-1]
        tokens = sum(count for _, count in list(self._recent)[1:])
        return tokens / (last - first) if last > first else 0.0

    def _eta(self, event: Event) -> str:
        """Time to the end, extrapolated from the progress since this process started."""
        now, progress = event["elapsed_s"], event["progress"]
        if self._first is None:
            self._first = (now, progress)
        gained = progress - self._first[1]
        if gained <= 0:
            return "ETA --" if self._whole_s is None else f"ETA about {_clock(self._whole_s)}"
        return f"ETA {_clock((now - self._first[0]) / gained * (1 - progress))}"


def _estimate(event: Event, short: bool = False) -> str:
    """The first step's estimates: time to its end, and time of the remaining training."""
    if "left_s" not in event:
        return ""
    line, is_known = _clock(event["left_s"]), "whole_s" in event
    if short:
        return f", line in {line}" + (f", all in {_clock(event['whole_s'])}" if is_known else "")
    training = f"; training about {_clock(event['whole_s'])}, {event['whole_steps']:,} steps" if is_known else ""
    return f", its line in about {line}{training}"


def _clock(seconds: float) -> str:
    """m:ss; from one hour on, h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
