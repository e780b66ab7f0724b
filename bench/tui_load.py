"""Speed of the terminal UI's reader, plots and list, and memory growth over a day of a live run.

    python bench/tui_load.py [--events 1000000] [--runs 200] [--seconds 60] [--rounds 15] [--json OUT] [--check]

open     a log of `--events` lines in an app of one plot, 160x48: seconds from the key to the first frame, to a
         frame of the whole range (samples of the log), and until every line is read. A thread reads, as in the TUI.
redraw   ms from the call to the finished frame, over all lines, for 2 curves: plain, smoothed, log scale, after
         new lines, zoomed. `floor` is the same with an empty label, the toolkit's own cost. Median of
         `--rounds`, in turns, with CPU time.
list     `--runs` folders of 1,000 lines each: the first poll, one without changes, one in which ten folders grew.
day      24 hours of a live run (10 steps per second, a heartbeat every 2 s) appended to a log, read and drawn at full
         speed, for at most `--seconds`, with one resume that cuts the log: memory beyond the columns' own, Python
         objects and open files, after a tenth of the time and at the end.

The files are in the page cache, so that the disk is not measured. CPU seconds of the process are given with wall-clock
ones, since the machine may be shared. `--check` exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from textual.app import App, ComposeResult
from textual.widgets import Static

from fastpeft.runs.system import git_commit
from fastpeft.tui import forecast_band as forecast
from fastpeft.tui.runs_index import RunsIndex
from fastpeft.tui.tail import RunTail
from fastpeft.tui.widgets.plot import Curve, LinePlot

STEPS_PER_S = 10
DAY_S = 24 * 3600
SIZES = {"160x48": (160, 48), "80x24": (80, 24)}
NUM_MATRICES = 24
MATRICES = json.dumps(
    {
        "names": [f"model.layers.{i // 4}.self_attn.{'qkvo'[i % 4]}_proj" for i in range(NUM_MATRICES)],
        "layer": [i // 4 for i in range(NUM_MATRICES)],
        "projection": [f"{'qkvo'[i % 4]}_proj" for i in range(NUM_MATRICES)],
    }
)[1:-1]
GOALS = {
    "open.whole_range_s": 1.0,
    "redraw.160x48.plain_ms": 80.0,
    "redraw.160x48.smoothed_ms": 80.0,
    "redraw.160x48.log_ms": 80.0,
    "redraw.160x48.grown_ms": 80.0,
    "redraw.80x24.plain_ms": 80.0,
    "list.first_s": 1.0,
    "day.more_mb_than_columns": 32.0,
    "day.more_files": 0,
}
"""Upper limits."""


def step_line(rng: random.Random, i: int) -> bytes:
    elapsed_s = i / STEPS_PER_S
    event = {
        "type": "step", "time_s": round(1.79e9 + elapsed_s, 3), "elapsed_s": elapsed_s, "step": i,
        "progress": min(1.0, round(i / 1e6, 6)), "lr": 1e-3 * rng.random(), "tokens": rng.randint(300, 900),
        "energy_j": 20.0 * i + rng.random(), "loss": 0.4 + rng.random() + 1.0 / (1 + i / 1e4),
        "penalty": 1e-6 * rng.random(), "penalty_share": 1e-4 * rng.random(), "grad_norm": rng.lognormvariate(0, 0.5),
    }  # fmt: skip
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def log_lines(rng: random.Random, first: int, num: int) -> Iterator[bytes]:
    """Events of a run: steps; a heartbeat every 2 s; every 32 steps a schedule's forecast, figures and learning rate
    factors of 24 matrices; an evaluation and a checkpoint every 5,000 steps."""
    for i in range(first, first + num):
        yield step_line(rng, i)
        common = f'"time_s":{1.79e9 + i / STEPS_PER_S:.3f},"elapsed_s":{i / STEPS_PER_S},"step":{i}'
        if i % 20 == 0:
            yield f'{{"type":"system",{common},"util":90.5,"memory_mb":700.1,"power_w":200.0,"temp_c":60}}\n'.encode()
        if i % 32 == 31:
            value = 0.4 + 0.1 * rng.random()
            band = f'"value":{value},"low":{value - 0.05},"high":{value + 0.05},"progress":{min(1.0, i / 1e6)}'
            yield f'{{"type":"forecast",{common},"at":{i},"horizon":1e6,{band}}}\n'.encode()
            yield f'{{"type":"schedule",{common},"at_bound":{rng.random():.4f},"at_rail":0.0}}\n'.encode()
            factors = ",".join(f"{2 ** rng.uniform(-2, 2):.4f}" for _ in range(NUM_MATRICES))
            yield f'{{"type":"rates",{common},{MATRICES},"multipliers":[{factors}]}}\n'.encode()
        if i % 5000 == 0:
            yield f'{{"type":"checkpoint",{common}}}\n'.encode()
            more = f'"metric":"accuracy","value":{rng.random():.4f},"loss":0.9,"num":2000,"energy_j":{20.0 * i}'
            yield f'{{"type":"eval",{common},"split":"validation",{more}}}\n'.encode()


def write_log(path: Path, num_events: int) -> None:
    with path.open("wb") as file:
        file.writelines(itertools.islice(log_lines(random.Random(0), 0, num_events), num_events))


class Bench(App):
    """An app with one plot of the run screen."""

    def compose(self) -> ComposeResult:
        yield Static("", id="label")
        yield LinePlot("loss")

    def on_mount(self) -> None:
        self.displayed = asyncio.Event()

    def post_display_hook(self) -> None:
        if hasattr(self, "displayed"):
            self.displayed.set()

    async def painted(self, change: Callable[[], Any]) -> None:
        """Change the screen, and wait until the change is written to the terminal."""
        self.displayed.clear()
        change()
        await asyncio.wait_for(self.displayed.wait(), 30)

    def show(self, tail: RunTail) -> None:
        newest, loss = forecast.newest(tail), tail.series.get("loss")
        band = forecast.band(newest, loss, "time") if newest and loss else None
        curves = [Curve(k, tail.series[k]) for k in ("loss", "grad_norm") if k in tail.series]
        self.query_one(LinePlot).show(curves, [band] if band else [])


async def measure_open(log: Path) -> dict[str, float]:
    """Open a log as a run screen does: a worker polls, and the plot is drawn at most four times per second."""
    app, found = Bench(), {}
    async with app.run_test(size=SIZES["160x48"]) as pilot:
        await pilot.pause()
        tail, began, cpu = RunTail(log), time.perf_counter(), time.process_time()
        plot = app.query_one(LinePlot)
        done = asyncio.Event()

        async def read() -> None:
            while not tail.is_caught_up:
                await asyncio.to_thread(tail.poll, 0.05)
            done.set()

        reader = asyncio.create_task(read())
        while "loss" not in tail.series:
            await asyncio.sleep(0.001)
        await app.painted(lambda: app.show(tail))
        found["first_picture_s"] = time.perf_counter() - began
        last = None
        while not done.is_set():
            if last is None and len(plot.curves[0].series.window("steps", buckets=320).x) >= 320:
                await app.painted(plot.redraw)
                last = found["whole_range_s"] = time.perf_counter() - began
                found["whole_range_cpu_s"] = time.process_time() - cpu
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), 0.02 if last is None else 0.25)
            plot.redraw()
        await reader
        await app.painted(plot.redraw)
        found.setdefault("whole_range_s", time.perf_counter() - began)
        found["all_read_s"], found["all_read_cpu_s"] = time.perf_counter() - began, time.process_time() - cpu
    found |= {"events": tail.num_events, "log_mb": tail.size / 1e6, "columns_mb": tail.num_bytes / 1e6}
    found["read_twice_bytes"] = tail.bytes_read - tail.size
    return found


async def measure_redraw(log: Path, size: tuple[int, int], rounds: int) -> dict[str, float]:
    app, times = Bench(), {}
    with log.open("rb") as file:
        file.seek(-4096, os.SEEK_END)
        more = file.read().splitlines(keepends=True)[-2:]
    tail = RunTail(log)
    while not tail.is_caught_up:
        tail.poll(1.0)
    async with app.run_test(size=size) as pilot:
        plot, label = app.query_one(LinePlot), app.query_one("#label", Static)
        app.show(tail)
        await pilot.pause()

        def grown() -> None:
            with log.open("ab") as file:
                file.writelines(more)
            tail.poll(1.0)

        for _ in range(rounds + 1):
            for name, setting in VARIANTS.items():
                plot.set_reactive(LinePlot.smoothing, setting.get("smoothing", 0.0))
                plot.set_reactive(LinePlot.log_scale, setting.get("log", False))
                low, high = tail.series["loss"].limits("time")
                plot.view_x = (low + 0.45 * (high - low), low + 0.55 * (high - low)) if setting.get("zoomed") else None
                if setting.get("grown"):
                    grown()
                began, cpu = time.perf_counter(), time.process_time()
                await app.painted(plot.redraw if name != "floor" else lambda: label.update(f"{began}"))  # noqa: B023
                took = time.perf_counter() - began, time.process_time() - cpu
                for key, seconds in zip((f"{name}_ms", f"{name}_cpu_ms"), took):
                    times.setdefault(key, []).append(seconds * 1000)
    return {name: round(statistics.median(found[1:]), 1) for name, found in times.items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "floor": {}, "plain": {}, "smoothed": {"smoothing": 0.9}, "log": {"log": True}, "grown": {"grown": True},
    "zoomed": {"zoomed": True},
}  # fmt: skip


def measure_list(folder: Path, num_runs: int) -> dict[str, float]:
    log = b"".join(log_lines(random.Random(1), 0, 950))
    result = {"run_id": "r", "status": "running", "budget": {"kind": "seconds", "limit": 1000.0, "spent": 1.0}}
    for i in range(num_runs):
        run = folder / f"run-{i:04}"
        run.mkdir(parents=True)
        (run / "run.yaml").write_text("method: lora\n")
        (run / "events.jsonl").write_bytes(log)
        (run / "result.json").write_text(json.dumps(result | {"name": run.name}))
    index = RunsIndex(folder)
    found = {"runs": num_runs, "first_s": timed(index.refresh), "unchanged_s": timed(index.refresh)}
    for i in range(min(10, num_runs)):
        with (folder / f"run-{i:04}" / "events.jsonl").open("ab") as file:
            file.write(step_line(random.Random(i), 950))
    return found | {"ten_grew_s": timed(index.refresh)}


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


async def measure_day(log: Path, seconds: float) -> dict[str, float]:
    """`log` is empty at the start. A round appends 200 s of the run; after half of the day it is cut by a tenth."""
    a_round, num_rounds = 200 * STEPS_PER_S, DAY_S // 200
    app, process, rng = Bench(), psutil.Process(), random.Random(2)
    tail, began, step, early, ended = RunTail(log), time.perf_counter(), 0, None, 0
    places: list[int] = []
    async with app.run_test(size=SIZES["160x48"]):
        for i in range(num_rounds):
            with log.open("ab") as file:
                places.append(file.tell())
                file.writelines(log_lines(rng, step, a_round))
            step += a_round
            if i == num_rounds // 2:
                back = max(1, i // 10)
                os.truncate(log, places[-back])
                step -= back * a_round
            while tail.poll(0.05) or not tail.is_caught_up:
                pass
            await app.painted(lambda: app.show(tail))
            ended = i + 1
            if i in (num_rounds // 10, num_rounds - 1) or time.perf_counter() - began > seconds:
                now = state(process, tail)
                early = early or now
            if time.perf_counter() - began > seconds:
                break
    late = now
    grown_mb = late["rss_mb"] - early["rss_mb"]
    columns_mb = late["columns_mb"] - early["columns_mb"]
    return {
        "hours": round(step / STEPS_PER_S / 3600, 2),
        "rounds": ended,
        "wall_s": round(time.perf_counter() - began, 1),
        "resumes_seen": tail.generation,
        "rows": len(tail.series["loss"]),
        "rss_mb": round(late["rss_mb"], 1),
        "more_mb": round(grown_mb, 1),
        "columns_more_mb": round(columns_mb, 1),
        "more_mb_than_columns": round(grown_mb - columns_mb, 1),
        "more_objects": late["objects"] - early["objects"],
        "more_files": late["files"] - early["files"],
    }


def state(process: psutil.Process, tail: RunTail) -> dict[str, float]:
    gc.collect()
    return {
        "rss_mb": process.memory_info().rss / 1e6,
        "columns_mb": tail.num_bytes / 1e6,
        "objects": len(gc.get_objects()),
        "files": process.num_fds(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0, help="at most, for the day")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "events.jsonl"
        write_log(log, args.events)
        found: dict[str, Any] = {"open": asyncio.run(measure_open(log)), "redraw": {}}
        for name, size in SIZES.items():
            found["redraw"][name] = asyncio.run(measure_redraw(log, size, args.rounds))
        log.unlink()
        found["list"] = measure_list(Path(folder) / "results", args.runs)
        found["day"] = asyncio.run(measure_day(Path(folder) / "day.jsonl", args.seconds))
    missed = report(found)
    if args.json:
        about = {"commit": git_commit(), "cpus": os.cpu_count(), "machine": platform.processor() or platform.machine()}
        args.json.write_text(json.dumps(about | found, indent=2) + "\n")
    return int(args.check and bool(missed))


def report(found: dict[str, Any]) -> list[str]:
    """Print every figure, and return the missed goals."""
    missed = []
    for key, value in leaves(found):
        goal = GOALS.get(key)
        sign = "" if goal is None else f"   goal {goal:g}: {'met' if value <= goal else 'MISSED'}"
        missed += [key] if goal is not None and value > goal else []
        print(f"{key:36} {value:12,.3f}{sign}" if isinstance(value, float) else f"{key:36} {value:12,}{sign}")
    return missed


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


if __name__ == "__main__":
    sys.exit(main())
