"""What `fastpeft train` prints: a line at once, a live one in a terminal, few elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastpeft.cli import console as console_module
from fastpeft.cli.console import ConsoleReporter
from fastpeft.runs.events import Event, make_event
from tests.support.tui_logs import header, step


def phase(name: str, text: str, **figures: Any) -> Event:
    return make_event("phase", elapsed_s=0.0, step=0, name=name, text=text, **figures)


def first_step(done: int, **figures: Any) -> Event:
    return phase("first_step", "step 1 under way", done=done, total=13_000, unit="tokens", **figures)


def slow_run(pause_s: float = 0.0) -> Iterator[Event]:
    """Of a model and data that take their time; a live line is drawn in a pause."""
    yield phase("data", "reading mnli")
    yield phase("model", "loading a/model")
    yield phase("tokenise", "tokenising")
    yield from (phase("tokenise", "tokenising", done=i, total=400, unit="rows") for i in range(1, 401))
    yield header(notes=["precision auto is fp32"])
    yield first_step(0)
    for i in range(1, 200):
        yield first_step(65 * i, left_s=200.0 - i, whole_s=40_000.0 - i, whole_steps=201)
    time.sleep(pause_s)
    yield step(0, progress=0.005)


def told(events: Iterator[Event], **options: Any) -> str:
    out = io.StringIO()
    with ConsoleReporter(Console(file=out, highlight=False, **options)) as reporter:
        for event in events:
            reporter.on_event(event)
    return out.getvalue()


# ---- without a terminal ----------------------------------------------------------------------


def test_a_file_gets_a_line_a_phase_and_no_line_a_row() -> None:
    text = told(slow_run())
    assert "\r" not in text
    assert "\x1b" not in text
    assert text.splitlines() == [
        "reading mnli",
        "loading a/model",
        "tokenising",
        "precision auto is fp32",
        "budget: 100 seconds",
        "step 1 under way: 0 of 13,000 tokens",
        "step 1 under way: 65 of 13,000 tokens, its line in about 3:19; training about 11:06:39, 201 steps",
        "step 1  loss 2.0000  lr 1.00e-03  0 tok/s  20 J  0% of the budget  ETA about 11:03:21",
    ]


def test_a_long_phase_is_told_again_every_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "PLAIN_EVERY_S", 0.0)
    lines = told(phase("tokenise", "tokenising", done=i, total=9, unit="rows") for i in range(3)).splitlines()
    assert lines == [f"tokenising: {i} of 9 rows" for i in range(3)]


def test_the_first_step_of_the_next_seed_is_estimated_anew() -> None:
    text = told(event for _ in range(2) for event in slow_run())
    assert text.count("step 1 under way: 65 of 13,000 tokens, its line in about 3:19") == 2


# ---- in a terminal ---------------------------------------------------------------------------


def test_a_terminal_gets_one_live_line_and_keeps_only_what_was_said() -> None:
    text = told(slow_run(pause_s=0.6), force_terminal=True, width=160, color_system=None)
    for shown in ("tokenising", "1 under way", "line in ", "all in 11:", "step 1  loss 2.0000", "ETA about"):
        assert shown in text
    assert screen_of(text) == ["precision auto is fp32", "budget: 100 seconds"]
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def screen_of(text: str) -> list[str]:
    """The lines that are left by a terminal that knows what rich's live display writes: up, erase the line, return."""
    lines, row = [""], 0
    i = 0
    while i < len(text):
        if text.startswith("\x1b[1A", i):
            row, i = max(0, row - 1), i + 4
        elif text.startswith("\x1b[2K", i):
            lines[row], i = "", i + 4
        elif text[i] == "\x1b":
            i = next(j for j in range(i + 2, len(text)) if text[j].isalpha()) + 1
        elif text[i] == "\n":
            row, i = row + 1, i + 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] += text[i] if text[i] != "\r" else ""
            i += 1
    return [line.rstrip() for line in lines if line.strip()]


# ---- a real process --------------------------------------------------------------------------


def test_the_first_line_comes_before_torch_is_imported(tmp_path: Path) -> None:
    """The process ends where torch is looked for; what it said is there already."""
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name in ('torch', 'transformers', 'numpy', 'rich.progress'): os._exit(9)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['fastpeft', 'train', '--run', 'lora_mnli']\n"
        "from fastpeft.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (9, "")
    assert done.stdout == "loading torch, then microsoft/deberta-v3-base and mnli\n"
