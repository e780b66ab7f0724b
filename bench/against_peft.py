"""Metric of fastpeft's trainer against Hugging Face's Trainer with PEFT: same rows, model, settings and epochs.

    python bench/against_peft.py --task wnut17 --model DIR --data DIR [--seeds 1,2,3] [--epochs 5] [--max-length 128]
                                 [--rows trainer,trainer_by_length,lora,iw_lora] [--json OUT] [key=value ...]

The row `trainer` follows the documentation of both libraries (bench/hf_trainer.py): their tokenising, collators,
AdamW, linear schedule, and rows in random order. `trainer_by_length` groups rows of similar length, as a careful user
would for speed. The other rows are `fastpeft.train` by its public interface. All have the same
rank, targets, batch size, learning rate, warm-up and weight decay, compute in fp32 on one thread, and are scored by
the same function on the weights of the last step. Rows take turns within each seed, so that load on the machine
affects them alike; `train s` is the training loop alone. `--data` holds train.* and dev.* files as fastpeft reads them.
Results that OUT already holds under the same settings are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import fastpeft
from bench.hf_trainer import Trained, train_with_trainer
from bench.report import about, json_path, print_table, write_json
from fastpeft.compare.comparison import mean_of
from fastpeft.config import RunConfig
from fastpeft.runs.events import read_events

TASKS: dict[str, dict[str, Any]] = {
    "mnli": {"preset": "lora_mnli", "training.epochs": 2, "dataset.max_length": 256},
    "wnut17": {"preset": "lora_wnut17", "training.epochs": 5, "dataset.max_length": 128},
    "stsb": {
        "preset": "lora_mnli",
        "training.epochs": 3,
        "dataset.max_length": 64,
        "dataset.name": "stsb",
        "dataset.columns.text": 5,
        "dataset.columns.text_pair": 6,
        "dataset.columns.label": 4,
    },
    "boolq": {"preset": "lora_boolq", "training.epochs": 3, "dataset.max_length": 192},
    "amazon": {"preset": "lora_amazon", "training.epochs": 3, "dataset.max_length": 192},
}
"""Preset, and settings that differ from it."""
COMMON = {
    "adapter.target_modules": "all-linear",
    "schedule.warmup_steps": 8,  # below the cap of 6 % of the steps, so that both trainers take the whole warm-up
    "training.learning_rate": 1e-3,
    "training.precision": "fp32",
    "training.threads": 1,
    "training.checkpoint_steps": 1_000_000,
    "evaluation.every": "end",
    "wandb.mode": "disabled",
}
TRAINERS = {"trainer": "random", "trainer_by_length": "group_by_length"}
"""Row -> train_sampling_strategy."""
ROWS = (*TRAINERS, "lora", "iw_lora")


def run_of(args: argparse.Namespace, row: str, seed: int) -> RunConfig:
    settings = TASKS[args.task] | COMMON
    preset = settings.pop("preset")
    settings |= {"model.name": args.model, "dataset.path": args.data, "training.seed": seed}
    if args.epochs is not None:
        settings["training.epochs"] = args.epochs
    if args.max_length is not None:
        settings["dataset.max_length"] = args.max_length
    settings |= dict(pair.split("=", 1) for pair in args.settings)
    return fastpeft.load_run(preset, method="lora" if row in TRAINERS else row, **settings)


def train_with_fastpeft(run: RunConfig) -> Trained:
    with tempfile.TemporaryDirectory() as folder:
        result = fastpeft.train(run, results_dir=folder, name="run", allow_stand_in=False)
        if result.status != "done":
            raise SystemExit(f"the run with seed {run.training.seed} has {result.status} after {result.steps} steps")
        steps = [e for e in read_events(Path(folder) / "run" / "events.jsonl") if e["type"] == "step"]
    return Trained(result.metric["value"], result.test.get("value"), result.steps, steps[-1]["elapsed_s"])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    settings = run_settings(run_of(args, args.rows[0], args.seeds[0]))
    runs = earlier_runs(args, settings)
    report = about(torch.device("cpu")) | {"task": args.task, "settings": settings, "runs": runs}
    for turn, seed in enumerate(args.seeds):
        for i in range(len(args.rows)):
            row = args.rows[(turn + i) % len(args.rows)]
            if any((run["row"], run["seed"]) == (row, seed) for run in runs):
                continue
            run = run_of(args, row, seed)
            trained = train_with_trainer(run, TRAINERS[row]) if row in TRAINERS else train_with_fastpeft(run)
            runs.append({"row": row, "seed": seed} | asdict(trained))
            print(f"{args.task} {row:8} seed {seed}: {trained}", flush=True)
            if args.json:
                write_json(args.json, report)
    return report


def earlier_runs(args: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    if not (args.json and args.json.is_file()):
        return []
    earlier = json.loads(args.json.read_text())
    if (earlier["task"], earlier["settings"]) != (args.task, settings):
        raise SystemExit(f"--json {args.json}: holds runs of other settings; give another file")
    return earlier["runs"]


def run_settings(run: RunConfig) -> dict[str, Any]:
    """Settings that all rows share."""
    keys = {
        "adapter": ("rank", "alpha", "dropout", "target_modules"),
        "optimizer": ("weight_decay", "max_grad_norm"),
        "training": ("learning_rate", "batch_size", "epochs", "precision"),
        "schedule": ("name", "warmup_steps"),
        "dataset": ("max_length", "cut"),
    }
    return {f"{part}.{key}": getattr(getattr(run, part), key) for part, names in keys.items() for key in names}


def summarise(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each row's means over the seeds, and its differences from the Trainer's rows, paired by seed."""
    table = []
    for row in ROWS:
        own = {run["seed"]: run for run in report["runs"] if run["row"] == row}
        if not own:
            continue
        entry: dict[str, Any] = {"row": row}
        entry["train_s"] = round(statistics.fmean(run["train_s"] for run in own.values()), 1)
        for score in ("value", "test"):
            values = {seed: run[score] for seed, run in own.items() if run[score] is not None}
            if not values:
                continue
            entry[score], entry[f"{score}s"] = str(mean_of(list(values.values()))), list(values.values())
            for trainer in set(TRAINERS) - {row}:
                theirs = {run["seed"]: run[score] for run in report["runs"] if run["row"] == trainer}
                pairs = [values[seed] - theirs[seed] for seed in values if seed in theirs]
                if pairs and row not in TRAINERS:
                    entry[f"{score}_minus_{trainer}"] = str(mean_of(pairs))
        table.append(entry)
    return table


def show(report: dict[str, Any]) -> None:
    table, seeds = report["summary"], {run["seed"] for run in report["runs"]}
    found = set().union(*table)
    columns = {"row": "", "value": "validation"}
    columns |= {f"value_minus_{trainer}": f"minus {trainer}" for trainer in TRAINERS}
    columns |= {"test": "test"} | {f"test_minus_{trainer}": f"minus {trainer}" for trainer in TRAINERS}
    columns = {key: title for key, title in (columns | {"train_s": "train s"}).items() if key in found}
    title = f"{report['task']}: mean over {len(seeds)} seeds, 95 % t-interval"
    print_table(title, list(columns.values()), [[entry.get(key) for key in columns] for entry in table])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="mnli")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--epochs", type=float, help="the task's own when absent")
    parser.add_argument("--max-length", type=int, help="the task's own when absent")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS))
    parser.add_argument("--json", type=json_path)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of every row, as `fastpeft train` takes them")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.rows) - set(ROWS))
    if unknown:
        parser.error(f"--rows {', '.join(unknown)}: known are {', '.join(ROWS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    report = measure(args)
    report["summary"] = summarise(report)
    show(report)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
