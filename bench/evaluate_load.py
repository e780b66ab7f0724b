"""Time and peak memory of `fastpeft evaluate` on many long runs.

    python bench/evaluate_load.py [--runs 60] [--events 100000] [--dir DIR] [--against CHECKOUT] [--rounds 3] \\
        [--json OUT] [--check]

Generated runs of six methods, each with `--events` events (steps, heartbeats, evaluations; one method in six with
importances) and answers to 9,815 rows, in `--dir` (about 25 MB per run; a temporary folder when absent). The command
runs in its own process, in turns with that of the checkout `--against` on the same runs. Wall and CPU seconds are
medians of `--rounds`; CPU seconds are those of all processes, read every 50 ms. Memory is the largest sum of the
processes' resident pages; shared pages count once per process. The files are in the page cache. `--check` exits with 1
where a goal is missed: 30 s and 1 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.report import json_path, print_table, write_json
from fastpeft.runs import store
from fastpeft.runs.system import git_commit

GOALS = {"wall_s": 30.0, "memory_mb": 1000.0}
"""Upper limits."""
METHODS = ("lora", "iw_lora", "rslora", "adalora", "full", "bitfit")
LABELS = ("entailment", "neutral", "contradiction")
NUM_ROWS = 9815
EVALUATE_EVERY, BEAT_EVERY = 2000, 20
PROJECTIONS = ("query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense")
MATRICES: dict[str, list[Any]] = {
    "names": [f"layer.{layer}.{projection}" for layer in range(12) for projection in PROJECTIONS],
    "layer": [layer for layer in range(12) for _ in PROJECTIONS],
    "projection": list(PROJECTIONS) * 12,
}
STEP_S = 0.1


def make_run(home: Path, index: int, num_events: int) -> None:
    rng, method, seed = random.Random(index), METHODS[index % len(METHODS)], index // len(METHODS)
    folder = store.RunFolder(home / f"{method}-seed{seed}")
    folder.path.mkdir(parents=True)
    folder.config.write_text("run_id: load\nmethod: lora\nmodel: {name: microsoft/deberta-v3-base}\n")
    scores, count, step = [], 2, 0
    with folder.events.open("w") as log:

        def write(type: str, **fields: Any) -> None:
            at = {"type": type, "time_s": 1.79e9 + step * STEP_S, "elapsed_s": round(step * STEP_S, 4), "step": step}
            log.write(json.dumps(at | fields, separators=(",", ":")) + "\n")

        write("run", config={"method": method, "training": {"seed": seed}}, stand_in=False)
        while count < num_events:
            loss = 0.4 + 1.1 * math.exp(-step / 20_000) + rng.gauss(0, 0.1)
            write(
                "step", progress=round(step / num_events, 6), lr=2e-4 * (1 - step / num_events), tokens=500 + step % 37,
                energy_j=step * 20.0, loss=loss, penalty=1e-6, penalty_share=1e-4, grad_norm=1.5 + rng.random(),
            )  # fmt: skip
            count, step = count + 1, step + 1
            if step % BEAT_EVERY == 0:
                write("system", util=90.0, memory_mb=700.0, power_w=200.0 + rng.random(), temp_c=60.0)
                count += 1
            if step % EVALUATE_EVERY == 0:
                scores.append(0.85 - 0.3 * math.exp(-step / 15_000) + rng.gauss(0, 0.004))
                where = {"split": "validation", "metric": "accuracy", "num": NUM_ROWS}
                write("eval", **where, value=scores[-1], loss=0.5, energy_j=step * 20.0)
                count += 1
                if method == "iw_lora":
                    write("importance", **MATRICES, weights=[rng.random() / 36 for _ in MATRICES["names"]])
                    count += 1
        write("end", status="done")
    best = write_answers(folder, rng, max(scores, default=0.5), step)
    write_result(folder, method, seed, step, scores or [0.5], best)


def write_answers(folder: store.RunFolder, rng: random.Random, accuracy: float, step: int) -> float:
    """Write answers as the trainer does; returns their accuracy."""
    lines, num_right, texts = [], 0, ["A soccer game with multiple males playing.", "Some men are playing a sport."]
    for row in range(NUM_ROWS):
        gold = LABELS[row % 3]
        is_right = rng.random() < accuracy
        num_right += is_right
        answer = {"gold": gold, "predicted": gold if is_right else LABELS[(row + 1) % 3], "correct": is_right}
        lines.append(json.dumps(answer if is_right else answer | {"given": texts}, separators=(",", ":")))
    header = {"format": 1, "split": "validation", "step": step, "metric": "accuracy", "value": num_right / NUM_ROWS}
    header |= {"num": NUM_ROWS, "rows": "0" * 64}
    path = folder.path / "predictions" / "best.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join([json.dumps(header), *lines]) + "\n")
    return num_right / NUM_ROWS


def write_result(folder: store.RunFolder, method: str, seed: int, step: int, scores: list[float], best: float) -> None:
    result = store.Result(
        run_id="load", name=folder.path.name, status="done", method=method, seed=seed, dataset="mnli",
        model="microsoft/deberta-v3-base", kind="classification", labels=list(LABELS), steps=step, tokens=518 * step,
        elapsed_s=step * STEP_S, energy_j=step * 20.0, energy_method="made up",
        metric={"name": "accuracy", "value": scores[-1]}, best={"value": best, "step": step},
        budget={"kind": "seconds", "limit": 10_000.0, "spent": step * STEP_S}, data={"sha256": "0" * 64, "splits": {}},
    )  # fmt: skip
    store.write_json(folder.result, dataclasses.asdict(result))


def evaluate(home: Path, checkout: Path) -> dict[str, float]:
    """Wall and CPU seconds of the command in `checkout`, and its peak memory in MB."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "fastpeft", "evaluate", "--results-dir", str(home)]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL)
    peak, cpu_s = 0, dict[int, float]()
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            everyone = [parent, *parent.children(recursive=True)]
            peak = max(peak, sum(one.memory_info().rss for one in everyone))
            cpu_s |= {one.pid: sum(one.cpu_times()[:2]) for one in everyone}
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} in {checkout} ended with {process.returncode}")
    return {"wall_s": time.perf_counter() - began, "cpu_s": sum(cpu_s.values()), "memory_mb": peak / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=json_path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    checkouts = {"this build": here} | ({"the other": options.against.resolve()} if options.against else {})
    with tempfile.TemporaryDirectory() as temporary:
        home = options.dir or Path(temporary) / "results"
        if not home.is_dir():
            for index in range(options.runs):
                make_run(home, index, options.events)
        rounds = [{name: evaluate(home, path) for name, path in checkouts.items()} for _ in range(options.rounds)]
    found = {
        name: {key: statistics.median(one[name][key] for one in rounds) for key in ("wall_s", "cpu_s", "memory_mb")}
        for name in checkouts
    }
    print_table(
        f"evaluate: {options.runs} runs of {options.events:,} events, {os.cpu_count()} CPUs",
        ["", "wall s", "CPU s", "memory MB"],
        [[name, *(f"{value:,.1f}" for value in values.values())] for name, values in found.items()],
    )
    if options.json:
        asked = {"runs": options.runs, "events": options.events, "cpus": os.cpu_count()}
        write_json(options.json, {"commit": git_commit(), **asked, "rounds": rounds})
    missed = [key for key, most in GOALS.items() if found["this build"][key] > most]
    if options.check and missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
