"""Logs and run folders as the trainer writes them, without a trainer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastpeft.runs.events import Event, finite
from fastpeft.runs.store import Result, RunFolder, write_json

START_S = 1_790_000_000.0
TOKENS = 500
STEP_S = 0.1
POWER_W = 200.0


def event(type: str, elapsed_s: float, step: int, **fields: Any) -> Event:
    return {"type": type, "time_s": START_S + elapsed_s, "elapsed_s": elapsed_s, "step": step} | fields


def step(i: int, **fields: Any) -> Event:
    values = {
        "progress": min(1.0, (i + 1) / 1000),
        "lr": 1e-3,
        "tokens": TOKENS,
        "energy_j": (i + 1) * STEP_S * POWER_W,
        "loss": 1.0 + 1.0 / (i + 1),
        "penalty": 1e-6,
        "penalty_share": 1e-4,
        "grad_norm": 1.5,
    }
    return event("step", (i + 1) * STEP_S, i, **values | fields)


def header(**fields: Any) -> Event:
    config = {
        "method": "iw_lora",
        "model": {"name": "embedded/deberta-tiny"},
        "dataset": {"name": "embedded-nli"},
        "training": {"seed": 7},
    }
    budget = {"kind": "seconds", "limit": 100.0}
    values = {"pid": 4321, "host": "h", "config": config, "budget": budget, "stand_in": True, "resumed": False}
    return event("run", 0.0, 0, **values | fields)


def evaluation(i: int, value: float = 0.5, **fields: Any) -> Event:
    values = {"split": "validation", "metric": "accuracy", "value": value, "loss": 0.9, "num": 2000, "energy_j": 1.0}
    return event("eval", (i + 1) * STEP_S, i + 1, **values | fields)


def heartbeat(elapsed_s: float, i: int, **fields: Any) -> Event:
    return event("system", elapsed_s, i, **{"util": 90.0, "memory_mb": 700.0, "power_w": None, "temp_c": None} | fields)


def importance(i: int, weights: Iterable[float], layers: int = 2, **fields: Any) -> Event:
    projections = ("query_proj", "value_proj")
    names = [f"layer.{layer}.{p}" for layer in range(layers) for p in projections]
    values = {
        "names": names,
        "layer": [layer for layer in range(layers) for _ in projections],
        "projection": list(projections) * layers,
        "weights": list(weights),
        "sensitivity": [0.1 * (k + 1) for k in range(len(names))],
    }
    return event("importance", i * STEP_S, i, **values | fields)


def forecast(i: int, value: float, horizon: float, **fields: Any) -> Event:
    values = {"at": i, "horizon": horizon, "value": value, "low": 0.9 * value, "high": 1.1 * value}
    return event("forecast", (i + 1) * STEP_S, i, **values | {"progress": (i + 1) / horizon} | fields)


def rates(i: int, multipliers: Iterable[float], layers: int = 2, **fields: Any) -> Event:
    blocks = importance(i, [0.0], layers)
    where = {key: blocks[key] for key in ("names", "layer", "projection")}
    return event("rates", i * STEP_S, i, **where | {"multipliers": list(multipliers)} | fields)


def figures(i: int, **values: Any) -> Event:
    return event("schedule", (i + 1) * STEP_S, i, **values)


def planned(num_steps: int, horizon: int = 200) -> list[Event]:
    """A run whose schedule forecasts each 10 steps that it ends at a loss of 0.5, first too high, and moves blocks
    apart; with its test at the end, if it gets there."""
    events = [header(budget={"kind": "seconds", "limit": horizon * STEP_S})]
    for i in range(num_steps):
        share = (i + 1) / horizon
        events.append(step(i, loss=0.5 + 0.6 * (1 - share) ** 2 + 0.02 * (i * 7919 % 13 - 6) / 6, progress=share))
        if i % 10 == 9:
            far = 1 - share
            value = 0.5 * (1 + 0.2 * far)
            events.append(forecast(i, value, horizon, low=value - 0.2 * far, high=value + 0.2 * far))
            events.append(figures(i, at_bound=share / 2, at_rail=0.0, divergences=1))
            events.append(rates(i, [2.0**-share, 1.0, 2.0 ** (share / 2), 2.0**share]))
        if i % 50 == 49:
            more = {"no_answer": 0.1 * (1 - share), "pass@4": 0.6 * share + 0.1, "decode_s": 3.0}
            events.append(evaluation(i, value=0.6 * share, metric="exact_match", more=more))
    if num_steps < horizon:
        return events
    test = evaluation(num_steps - 1, value=0.584, metric="exact_match", split="test", num=1319)
    return [*events, test, event("end", num_steps * STEP_S, num_steps, status="done")]


def lines(events: Iterable[Event]) -> bytes:
    return b"".join(json.dumps(finite(e), separators=(",", ":")).encode() + b"\n" for e in events)


def usual(num_steps: int) -> list[Event]:
    """A whole run: a heartbeat every 20 steps, an evaluation and a checkpoint every 100."""
    events = [header(), importance(0, [0.1, 0.2, 0.3, 0.4])]
    for i in range(num_steps):
        events.append(step(i))
        if i % 20 == 19:
            events.append(heartbeat((i + 1) * STEP_S, i))
        if i % 100 == 99:
            events += [evaluation(i, value=i / num_steps), event("checkpoint", (i + 1) * STEP_S, i + 1)]
    return [*events, event("end", num_steps * STEP_S, num_steps, status="done")]


def make_run(
    results_dir: Path, name: str, events: Iterable[Event] | None = None, *, result: bool = True, **fields: Any
) -> RunFolder:
    """A run's folder; `fields` go to result.json."""
    folder = RunFolder(results_dir / name)
    folder.path.mkdir(parents=True)
    folder.config.write_text("method: iw_lora\n")
    if events is not None:
        folder.events.write_bytes(lines(events))
    if result:
        values = {"budget": {"kind": "seconds", "limit": 100.0, "spent": 0.0}, "method": "iw_lora", "seed": 7}
        write_json(folder.result, dataclasses.asdict(Result(run_id="r", name=name, **values | fields)))
    return folder
