"""Methods at equal wall clock: every method, task and seed in a process of its own, one budget for each.

    python bench/methods.py --model DIR --data DIR [--budget 100s] [--seeds 0,1,2] [--tasks mnli,sst2,rte]
                            [--methods lora,full,...] [--workers 2] [--runs DIR] [--json OUT] [--tune]

`--data` holds a folder a task (mnli, sst2, rte), as GLUE's files are. Each worker trains on one thread. What is done in
`--runs` is not run again. Seeds are the outermost loop: what is there when one stops is complete for the seeds that it
has. `--tune` runs each family's rates on the first task with a seed of its own and prints the best ones, which RATES
holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastpeft.evaluate.compare import GLUE_TASKS, glue_average, mean_of, metric_of
from fastpeft.runs.events import number
from fastpeft.runs.store import Result, RunFolder
from fastpeft.runs.system import environment

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
RATES = {"lora": 1e-3, "rslora": 1e-3, "adalora": 1e-3, "full": 1e-4}
GRID = {"lora": (1e-3, 2e-3), "rslora": (5e-4, 1e-3), "adalora": (1e-3, 2e-3, 4e-3), "full": (5e-5, 1e-4, 2e-4)}
TUNING_SEED = 1000
SST2_ROWS = 10_000
DEV_ROWS = 2000


def family(method: str) -> str:
    """Whose learning rate a method takes: IW-LoRA takes LoRA's, so that only the penalty differs."""
    return "lora" if method.startswith("iwlora") else method


def subset(source: Path, target: Path) -> Path:
    """The first rows of SST-2's training data, beside all of its validation data."""
    target.mkdir(parents=True, exist_ok=True)
    lines = (source / "train.tsv").read_text().splitlines(keepends=True)
    (target / "train.tsv").write_text("".join(lines[: SST2_ROWS + 1]))
    (target / "dev.tsv").write_text((source / "dev.tsv").read_text())
    return target


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.runs = args, args.runs
        self.data = {task: args.data / task for task in GLUE_TASKS}
        if "sst2" in args.tasks:
            self.data["sst2"] = subset(args.data / "sst2", args.runs / "data" / "sst2")

    def train(self, method: str, task: str, seed: int, rate: float) -> Result:
        name = f"{task}-{method}-{rate:g}-seed{seed}"
        folder = RunFolder.at(self.runs, name)
        result = folder.read_result()
        if result is None or result.status != "done":
            settings = METHODS[method] | {
                "model.name": self.args.model,
                "dataset.name": task,
                "dataset.path": self.data[task],
                "adapter.target_modules": "all-linear",
                "training.learning_rate": rate,
                "training.threads": 1,
                "schedule.warmup_steps": 50,
                "evaluation.every": "end",
                "evaluation.max_examples": DEV_ROWS,
                "wandb.mode": "disabled",
            }
            command = [sys.executable, "-m", "fastpeft", "train", "--run", "iwlora_mnli", "--seed", str(seed)]
            command += ["--budget", self.args.budget, "--results-dir", str(self.runs), "--name", name]
            command += ["--resume"] if folder.config.is_file() else []
            command += [f"{key}={value}" for key, value in settings.items()]
            done = subprocess.run(command, capture_output=True, text=True)
            result = folder.read_result()
            if done.returncode or result is None:
                raise SystemExit(f"{name} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        print(
            f"{name:44} {number(result.metric['value']):.4f}  {result.steps:5} steps  {result.elapsed_s:6.1f} s",
            flush=True,
        )
        return result

    def all(self, cells: list[tuple[str, str, int, float]]) -> list[Result]:
        with ThreadPoolExecutor(self.args.workers) as pool:
            return list(pool.map(lambda cell: self.train(*cell), cells))

    def tune(self) -> None:
        task, cells = self.args.tasks[0], []
        for method in self.args.methods:
            if family(method) == method:
                cells += [(method, task, TUNING_SEED, rate) for rate in GRID[method]]
        results = self.all(cells)
        for method, group in itertools.groupby(zip(cells, results), key=lambda pair: pair[0][0]):
            best = max(group, key=lambda pair: number(pair[1].metric["value"]))
            print(f"{method}: {best[0][3]:g}")

    def compare(self) -> dict:
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
            entry["steps"] = [r.steps for r in runs]
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
    parser.add_argument("--budget", default="100s")
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
        report = {"budget": args.budget, "seeds": args.seeds, "environment": environment(), "rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
