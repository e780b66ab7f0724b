"""A results folder with a run of every kind, and every screen that shows one."""

from __future__ import annotations

import math
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from textual.pilot import Pilot
from textual.widgets import DataTable, Input

from fastpeft.runs.events import Event
from fastpeft.tui.program import FastpeftApp
from fastpeft.tui.screens.compare_screen import CompareScreen
from fastpeft.tui.screens.run_screen import RunScreen
from tests.support.pilots import until, until_shown
from tests.support.tui_logs import (
    START_S,
    STEP_S,
    evaluation,
    event,
    header,
    heartbeat,
    importance,
    make_run,
    planned,
    rates,
    step,
)

LONG = "iwlora_mnli-deberta-v3-base-rank-16-all-linear-20261129-151200-second-try"
PROJECTIONS = ("query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense")
DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def blocks(layers: int, projections: tuple[str, ...]) -> dict[str, list]:
    """Where the matrices of a model are, for an importance or a rates event."""
    return {
        "names": [f"layer.{layer}.{p}" for layer in range(layers) for p in projections],
        "layer": [layer for layer in range(layers) for _ in projections],
        "projection": list(projections) * layers,
    }


def wave(num: int, at: float = 0.0) -> list[float]:
    return [0.05 + 0.03 * math.sin(k / 3 + at) for k in range(num)]


def trained(num_steps: int, base: float = 0.5, noise: float = 0.05, metric: str = "accuracy") -> list[Event]:
    """A run that learns, with an evaluation each tenth of it."""
    events = [header()]
    for i in range(num_steps):
        loss = base + 0.6 * math.exp(-3 * i / num_steps) + noise * (i * 7919 % 13 - 6) / 6
        events.append(step(i, loss=loss, lr=1e-3 * (1 - i / num_steps), progress=(i + 1) / num_steps))
        if i % 20 == 19:
            events.append(heartbeat((i + 1) * STEP_S, i, util=60.0 + i % 37, power_w=301.5, temp_c=61.0))
        if i % (num_steps // 10) == num_steps // 10 - 1:
            events.append(evaluation(i, value=1 - base - 0.1 * math.exp(-i / 40), metric=metric, loss=base + 0.1))
    return events


def make_gallery(results: Path) -> None:
    """About twenty runs: long and short names, each status, each method's own events, missing and huge values."""
    running = {"status": "running", "elapsed_s": 30.0, "stand_in": True}
    spent = {"budget": {"kind": "seconds", "limit": 30.0, "spent": 30.0}}
    done = spent | {"status": "done", "elapsed_s": 30.0, "tokens": 150_000, "steps": 300, "energy_j": 6000.0}
    scored = {"metric": {"name": "accuracy", "value": 0.8125}, "best": {"value": 0.8215, "step": 250}}
    where = {"model": "microsoft/deberta-v3-base", "dataset": "glue/mnli"}
    embedded = {"model": "embedded/deberta-tiny", "dataset": "embedded-nli", "stand_in": True}
    runs: list[tuple[str, list[Event] | None, dict]] = []
    weighed = trained(300)
    for at in (0, 150, 299):
        grid = blocks(12, PROJECTIONS)
        more = {"sensitivity": wave(72, 1.0), "ranks": [float(k % 9) for k in range(72)]}
        weighed.append(importance(at, wave(72, at / 100), **grid | more))
    weighed.append(event("warning", 30.0, 299, message="a rather long warning that has to go on a second line " * 3))
    runs.append((LONG, weighed, running | embedded | scored | {"method": "iw_lora"}))
    ranked = [*trained(300), importance(200, wave(24), **blocks(4, PROJECTIONS) | {"ranks": [2.0] * 24})]
    runs.append(("adalora", ranked, done | where | scored | {"method": "adalora"}))
    forecast = [*planned(120), rates(119, [math.exp(w) for w in wave(196)], **blocks(28, DECODER))]
    facts = {"model": "Qwen/Qwen3-0.6B-Base", "dataset": "openai/gsm8k", "method": "lora"}
    runs.append(
        ("fot_gsm8k", forecast, running | facts | {"budget": {"kind": "seconds", "limit": 20.0, "spent": 12.0}})
    )
    exact = {"name": "exact_match", "value": 0.6}
    runs.append(("fot-done", planned(200), done | facts | {"metric": exact, "test": exact | {"value": 0.584}}))
    parts = {
        name: {"precision": 0.9, "recall": 0.8, "f1": 0.85, "support": 10 ** (i + 1)}
        for i, name in enumerate(("LOC", "ORG", "PER", "a-very-long-entity-type-with-a-name-of-its-own"))
    }
    entities = [*trained(100, metric="f1"), evaluation(99, 0.7, metric="f1", groups=parts, more={"precision": 0.8})]
    entities.append(evaluation(99, 0.65, metric="f1", split="test", groups=parts))
    runs.append(("ner", entities, done | where | {"metric": {"name": "f1", "value": 0.7}, "method": "lora"}))
    scores = trained(100, metric="spearman")
    scores.append(evaluation(99, -0.125, metric="spearman", more={"pearson": -0.3, "mse": 1234.5}))
    runs.append(("stsb", scores, done | where | {"metric": {"name": "spearman", "value": -0.125}, "method": "full"}))
    runs.append(("a", trained(50), done | where | {"energy_j": None, "method": "lora", "elapsed_s": 5.0}))
    runs.append(("failed", [header()], {"status": "failed", "method": "lora", "model": "", "dataset": ""}))
    nans = [header(), *(step(i, loss=1e3 * 4.0**i if i < 9 else math.nan) for i in range(12))]
    runs.append(("diverged", nans, where | {"status": "diverged", "method": "hf_sat_lora", "elapsed_s": 1.2}))
    runs.append(("stopped", trained(80), where | scored | {"status": "stopped", "method": "sat_lora"}))
    huge = [header(), *(step(i, loss=123456.789, tokens=10**7, energy_j=1e9 * (i + 1)) for i in range(40))]
    budget = {"kind": "tokens", "limit": 5e9, "spent": 4e8}
    more = {"elapsed_s": 3e5, "energy_j": 4e10, "tokens": 4 * 10**8, "steps": 1_234_567, "budget": budget}
    runs.append(("huge", huge, running | where | {"method": "unihyperlora"} | more))
    for i, (method, base) in enumerate((("lora", 0.5), ("iw_lora", 0.5), ("adalora", 0.45))):
        for seed in range(3):
            same = trained(200, base + (0.1 * seed if i else 0.0))  # lora's seeds are one curve: each hides the others
            group = {"group": f"{method}-mnli", "seed": seed, "method": method}
            value = {"value": 0.9 - base + seed / 100}
            results_of = {"metric": {"name": "accuracy"} | value, "best": value | {"step": 9}, "auc": {"seconds": 0.3}}
            runs.append((f"{method}-mnli-seed{seed}", same, done | embedded | results_of | group))
    for i, (name, events, fields) in enumerate(runs):
        folder = make_run(results, name, events, **fields)
        os.utime(folder.config, (START_S + i, START_S + i))
    make_run(results, "no-result", None, result=False)
    dead = make_run(results, "dead", trained(30), **running | where)
    os.utime(dead.events, (time.time() - 3600,) * 2)
    (results / "adalora" / "output.log").write_text(
        "\n".join(f"said the trainer, line {i}: {'=' * i}" for i in range(99))
    )


# ---- the screens ---------------------------------------------------------------------------


async def listed(app: FastpeftApp, pilot: Pilot) -> AsyncIterator[str]:
    """Views of the list of runs, each drawn when its name comes."""
    yield "runs"
    table = app.screen.query_one(DataTable)
    for name in (LONG, "failed", "huge", "no-result", "ner"):
        table.move_cursor(row=list(app.screen._lines).index(name))
        await pilot.pause()
        yield f"runs-{name[:9]}"
    await pilot.press("space", "space", "slash", *"done glue")
    yield "runs-filter"
    await pilot.press("escape", "u", *[">"] * 9, "i")
    yield "runs-sorted"


async def dialogs(app: FastpeftApp, pilot: Pilot) -> AsyncIterator[str]:
    table = app.screen.query_one(DataTable)
    table.move_cursor(row=list(app.screen._lines).index(LONG))
    for key, name in (("D", "delete"), ("T", "stop"), ("question_mark", "help"), ("O", "no-output")):
        await pilot.press(key)
        yield f"dialog-{name}"
        await pilot.press("escape")
    table.move_cursor(row=list(app.screen._lines).index("adalora"))
    await pilot.press("O")
    yield "dialog-output"
    await pilot.press("escape", "ctrl+p")
    yield "palette"
    await pilot.press("escape", "n")
    await until_shown(pilot, "✗ Run:")
    yield "start"
    app.screen.query_one("#run", Input).value = "lora_mn"
    app.screen.query_one("#overrides", Input).value = "adapter.rank=999 training."
    await until_shown(pilot, "did you mean lora_mnli")
    yield "start-wrong"
    app.screen.query_one("#run", Input).value = "iwlora_mnli"
    app.screen.query_one("#name", Input).value = LONG
    app.screen.query_one("#overrides", Input).value = "adapter.rank=8 regulariser.alpha="
    await pilot.pause(0.5)
    yield "start-right"
    await pilot.press("escape")


async def run_views(app: FastpeftApp, pilot: Pilot, name: str) -> AsyncIterator[str]:
    """Every pane of a run, and every plot where one is shown at a time."""
    app.open_run(name)
    await until(pilot, lambda: isinstance(app.screen, RunScreen) and app.screen.focused is not None)
    await until(pilot, lambda: app.screen._tail.is_caught_up)
    await pilot.pause(0.3)
    screen = app.screen
    short = name[:9]
    yield f"run-{short}"
    for i in range(1, 1 if screen.is_roomy else len(screen.measured_plots())):
        await pilot.press("right_square_bracket")
        yield f"run-{short}-plot{i}"
    await pilot.press("1", "right", "right", "y", "s")
    yield f"run-{short}-cursor"
    for pane, what in (("2", "map"), ("3", "events"), ("4", "config")):
        await pilot.press(pane, *("j", "l") if pane == "2" else ())
        await pilot.pause()
        yield f"run-{short}-{what}"
        if pane == "2":
            await pilot.press("z")
            await pilot.pause()
            yield f"run-{short}-{what}-zoomed"
            await pilot.press("z", "m")
    if screen._tail.parts:
        await pilot.press("p")
        yield f"run-{short}-parts"
        await pilot.press("escape")
    await pilot.press("escape")


async def comparisons(app: FastpeftApp, pilot: Pilot, names: list[str]) -> AsyncIterator[str]:
    app.compare(names)
    await until(pilot, lambda: isinstance(app.screen, CompareScreen) and app.screen.focused is not None)
    await until(pilot, lambda: app.screen._comparison.rows, 60)
    await until(pilot, lambda: all(tail.is_caught_up for tail in app.screen._tails.values()))
    await pilot.pause(0.3)
    num = len(names)
    yield f"compare{num}"
    await pilot.press("t")
    yield f"compare{num}-methods"
    await pilot.press("m")
    yield f"compare{num}-metric"
    for key, part in (("2", "runs"), ("3", "results")):
        await pilot.press(key)
        await pilot.pause()
        yield f"compare{num}-{part}"
    await pilot.press("escape")


def compared(num: int) -> list[str]:
    """Runs for a comparison: first the seeds that are one curve."""
    seeds = [f"{method}-mnli-seed{seed}" for method in ("lora", "iw_lora", "adalora") for seed in range(3)]
    return [*seeds, LONG, "adalora", "a", "stopped", "diverged", "stsb", "huge", "ner"][:num]
