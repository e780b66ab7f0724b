"""Methods at equal wall clock, on local data: means over seeds, and paired differences from LoRA.

    python bench/methods.py --model DIR --data DIR [--seconds 60] [--seeds 0,1,2] [--tasks mnli,sst2,rte]
                            [--methods lora,full,...] [--workers 2] [--runs DIR] [--json OUT] [--tune]

First every method's step is timed, in turns on the same batches in one process. Each method then gets the number of
steps that fit into `--seconds`, including its calibration, so that noise of the machine during a run does not cost its
method any steps. Each run is a process of one thread; finished runs in `--runs` are not repeated. Seeds are the
outermost loop, so that an interrupted table is complete for the seeds that it has. `--data` holds a folder for each
task (mnli, sst2, rte), with GLUE's files. `--tune` tries each family's learning rates on the first task with a separate
seed and prints the best ones, which RATES holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import fastpeft
from fastpeft.compare.comparison import GLUE_TASKS, glue_average, mean_of, metric_of
from fastpeft.runs.events import number
from fastpeft.runs.store import Result, RunFolder
from fastpeft.runs.system import environment
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.step import forward_backward, train_step

METHODS = {
    "lora": {"method": "lora"},
    "rslora": {"method": "rslora"},
    "iwlora-sum": {"method": "iw_lora"},
    "iwlora-max": {"method": "iw_lora", "regulariser.normalise": "max"},
    "iwlora-sum-decoupled": {"method": "iw_lora", "regulariser.decoupled": "true"},
    "iwlora-max-decoupled": {"method": "iw_lora", "regulariser.normalise": "max", "regulariser.decoupled": "true"},
    "adalora": {"method": "adalora"},
    "full": {"method": "full"},
}
RATES = {"lora": 2e-3, "rslora": 1e-3, "adalora": 2e-2, "full": 2e-4}
GRID = {
    "lora": (2e-3, 4e-3),
    "rslora": (1e-3, 2e-3),
    "adalora": (1e-2, 2e-2, 4e-2),
    "full": (2e-4, 4e-4),
}
TUNING_SEED = 1000
SST2_ROWS = 10_000
DEV_ROWS = 1000
CALIBRATION_BATCHES = 8
TIMED_ROUNDS = 12


def family(method: str) -> str:
    """Method whose learning rate this one uses: IW-LoRA uses LoRA's, so that only the penalty differs."""
    return "lora" if method.startswith("iwlora") else method


def subset(source: Path, target: Path) -> Path:
    """The first rows of SST-2's training data, with all of its validation data."""
    target.mkdir(parents=True, exist_ok=True)
    lines = (source / "train.tsv").read_text().splitlines(keepends=True)
    (target / "train.tsv").write_text("".join(lines[: SST2_ROWS + 1]))
    (target / "dev.tsv").write_text((source / "dev.tsv").read_text())
    return target


def calibrate_once(job: Job) -> None:
    """One calibration batch, so that the penalty has its weights."""
    if job.adapter.calibration_batches:
        with job.adapter.calibrating():
            rows = job.batches.rows(0)
            job.adapter.before_calibration_batch()
            forward_backward(job.adapter, job.task.loss, [job.task.collate(rows, job.device)], len(rows))
            job.adapter.after_calibration_batch(1.0)
        job.adapter.finish_calibration()


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.runs = args, args.runs
        self.data = {task: args.data / task for task in GLUE_TASKS}
        if "sst2" in args.tasks:
            self.data["sst2"] = subset(args.data / "sst2", args.runs / "data" / "sst2")
        self.step_s: dict[tuple[str, str], float] = {}

    def settings(self, method: str, task: str) -> dict:
        return METHODS[method] | {
            "model.name": self.args.model,
            "dataset.name": task,
            "dataset.path": str(self.data[task]),
            "adapter.target_modules": "all-linear",
            "training.threads": 1,
            "regulariser.warmup_steps": CALIBRATION_BATCHES,
            "schedule.warmup_steps": 50,
            "evaluation.every": "end",
            "evaluation.max_examples": DEV_ROWS,
            "wandb.mode": "disabled",
        }

    def time_steps(self, task: str) -> None:
        """Seconds per step of every method, in turns: the first method's mean times each one's median ratio to it."""
        kept = self.runs / f"step-seconds-{task}.json"  # a continued bench gives the same number of steps
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        if known.keys() >= set(self.args.methods):
            self.step_s |= {(method, task): seconds for method, seconds in known.items()}
            return
        torch.set_num_threads(1)
        jobs = {m: build_job(fastpeft.load_run("iwlora_mnli", **self.settings(m, task))) for m in self.args.methods}
        seconds: dict[str, list[float]] = {method: [] for method in jobs}
        for job in jobs.values():
            calibrate_once(job)
        for i in range(TIMED_ROUNDS + 1):
            for method, job in jobs.items():
                rows = job.batches.rows(i)
                began = time.perf_counter()
                batch = job.task.collate(rows, job.device)
                train_step(job.adapter, job.schedule, job.optimizer, job.task.loss, [batch], len(rows), (i + 1) / 100)
                seconds[method].append(time.perf_counter() - began)
        first = next(iter(seconds.values()))[1:]  # the first round warms up
        for method, values in seconds.items():
            ratio = statistics.median(own / theirs for own, theirs in zip(values[1:], first))
            self.step_s[method, task] = ratio * statistics.fmean(first)
            print(f"{task} {method:22} {self.step_s[method, task] * 1e3:7.1f} ms a step", flush=True)
        self.runs.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({method: self.step_s[method, task] for method in jobs} | known))
        self.step_s |= {(method, task): seconds for method, seconds in known.items()}  # earlier runs used these

    def num_steps(self, method: str, task: str) -> int:
        calibration = CALIBRATION_BATCHES if METHODS[method]["method"] == "iw_lora" else 0
        return int(self.args.seconds / self.step_s[method, task]) - calibration

    def train(self, method: str, task: str, seed: int, rate: float) -> Result:
        name = f"{task}-{method}-{rate:g}-{self.args.seconds:g}s-seed{seed}"
        folder = RunFolder.at(self.runs, name)
        result = folder.read_result()
        if result is None or result.status != "done":
            command = [sys.executable, "-m", "fastpeft", "train", "--run", "iwlora_mnli", "--seed", str(seed)]
            command += [
                "--results-dir",
                str(self.runs),
                "--name",
                name,
                *(["--resume"] if folder.config.is_file() else []),
            ]
            command += ["--budget", f"{self.num_steps(method, task)}steps", f"training.learning_rate={rate}"]
            command += [f"{key}={value}" for key, value in self.settings(method, task).items()]
            done = subprocess.run(command, capture_output=True, text=True)
            result = folder.read_result()
            if done.returncode or result is None:
                raise SystemExit(f"{name} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        value = number(result.metric["value"])
        print(f"{name:44} {value:.4f}  {result.steps:5} steps  {result.elapsed_s:6.1f} s", flush=True)
        return result

    def all(self, cells: list[tuple[str, str, int, float]]) -> list[Result]:
        with ThreadPoolExecutor(self.args.workers) as pool:
            return list(pool.map(lambda cell: self.train(*cell), cells))

    def tune(self) -> None:
        task, cells = self.args.tasks[0], []
        for method in self.args.methods:
            if family(method) == method:
                cells += [(method, task, TUNING_SEED, rate) for rate in GRID[method]]
        self.time_steps(task)
        results = self.all(cells)
        for method, group in itertools.groupby(zip(cells, results), key=lambda pair: pair[0][0]):
            best = max(group, key=lambda pair: number(pair[1].metric["value"]))
            print(f"{method}: {best[0][3]:g}")

    def compare(self) -> dict:
        for task in self.args.tasks:
            self.time_steps(task)
        order = itertools.product(self.args.seeds, self.args.tasks, self.args.methods)
        cells = [(method, task, seed, RATES[family(method)]) for seed, task, method in order]
        results = self.all(cells)
        by_cell = {cell[:3]: result for cell, result in zip(cells, results)}
        return {method: self.row(method, by_cell) for method in self.args.methods}

    def row(self, method: str, results: dict[tuple[str, str, int], Result]) -> dict:
        """Means over the seeds, and the paired differences from LoRA."""
        own = {key[1:]: result for key, result in results.items() if key[0] == method}
        row: dict = {"rate": RATES[family(method)], "tasks": {}}
        for task in self.args.tasks:
            runs = [own[task, seed] for seed in self.args.seeds]
            entry = {"mean": str(metric_of(runs)), "values": [number(r.metric["value"]) for r in runs]}
            entry |= {"steps": runs[0].steps, "step_ms": round(self.step_s[method, task] * 1e3, 1)}
            if method != "lora" and "lora" in self.args.methods:
                lora = [number(results["lora", task, seed].metric["value"]) for seed in self.args.seeds]
                entry["minus_lora"] = str(mean_of([a - b for a, b in zip(entry["values"], lora)]))
            row["tasks"][task] = entry
        row["glue"] = str(glue_average(own.values()) or "-")
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(GLUE_TASKS))
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("results/methods"))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    if args.tune:
        bench.tune()
        return
    rows = bench.compare()
    for method, row in rows.items():
        print(f"\n{method}, rate {row['rate']:g}, GLUE average {row['glue']}")
        for task, entry in row["tasks"].items():
            print(f"  {task:5} {entry['mean']:18} minus LoRA {entry.get('minus_lora', '-'):18} steps {entry['steps']}")
    if args.json:
        about = {key: environment()[key] for key in ("git", "cpu_count", "packages")}
        report = {"seconds": args.seconds, "seeds": args.seeds, **about, "rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
