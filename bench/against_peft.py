"""Accuracy against wall clock: fastpeft beside a bare PEFT loop, on a local model and local data.

    python bench/against_peft.py --model DIR --data DIR [--epochs 2] [--rows peft,lora,iw_lora] [--json OUT]

All rows train in one process, in turns of a few seconds each, so that noise of the machine meets them
alike; each has its own clock, which runs only in its turns and not while it is scored. Model, data,
rank, targets, batch size and peak rate are the same. The PEFT row is what its documentation shows:
LoraConfig, AdamW, transformers' linear schedule over a known number of steps, batches padded to their
longest row, fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import peft
import torch
import transformers

import fastpeft
from fastpeft.data.batches import micro_batches
from fastpeft.models.backbone import load_backbone
from fastpeft.models.inject import match_targets
from fastpeft.runs.system import git_commit
from fastpeft.tasks import classification_loss
from fastpeft.tasks.sequence_classification.scoring import score
from fastpeft.tasks.sequences.examples import collate
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.step import forward_backward, train_step

TURN_S = 10.0
WARMUP_STEPS = 50


def peft_steps(job: Job, epochs: float) -> Iterator[torch.nn.Module]:
    """A bare PEFT loop over the job's data; yields the model after each step."""
    run = job.run
    torch.manual_seed(run.training.seed)
    backbone = load_backbone(run.model, job.task.label_names, torch.float32, job.device)
    targets = match_targets(backbone.model, backbone.head, run.adapter.target_modules)
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS, r=run.adapter.rank, lora_alpha=run.adapter.alpha, target_modules=targets
    )
    model = peft.get_peft_model(backbone.model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=run.training.learning_rate)
    num_steps = round(epochs * len(job.batches))
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, WARMUP_STEPS, num_steps)
    generator = np.random.default_rng(run.training.seed)
    order: list[int] = []
    for _ in range(num_steps):
        if len(order) < run.training.batch_size:
            order = list(generator.permutation(len(job.batches.encoded)))
        rows, order = np.array(order[: run.training.batch_size]), order[run.training.batch_size :]
        batch = collate(job.batches.encoded, rows, job.device)
        model(**batch.inputs, labels=batch.labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield model


def fastpeft_steps(job: Job, epochs: float) -> Iterator[torch.nn.Module]:
    """The trainer's own step over the same number of passes, calibration included."""
    adapter, encoded, num_steps = job.adapter, job.batches.encoded, round(epochs * len(job.batches))

    def batches(rows: np.ndarray) -> Iterator:
        for part in micro_batches(encoded, rows, job.run.training.micro_batch_tokens):
            yield collate(encoded, part, job.device)

    if adapter.calibration_batches:
        with adapter.calibrating():
            for i in range(max(8, num_steps // 50)):
                adapter.before_calibration_batch()
                rows = job.batches.rows(i)
                forward_backward(adapter, classification_loss, batches(rows), len(rows))
                adapter.after_calibration_batch(1.0)
        adapter.finish_calibration()
    for step in range(num_steps):
        rows = job.batches.rows(step)
        train_step(adapter, job.schedule, job.optimizer, job.task.loss, batches(rows), len(rows), step / num_steps)
        yield adapter.model


class Row:
    """One way of training: its steps, its own clock, its scores."""

    def __init__(self, name: str, job: Job, epochs: float) -> None:
        self.name, self.job = name, job
        self.precision = "torch.float32" if name.startswith("peft") else str(job.dtype)
        steps = peft_steps if name.startswith("peft") else fastpeft_steps
        self._steps = steps(job, epochs)
        self._marks = [round(epochs * len(job.batches) * q / 4) for q in (1, 2, 3, 4)]
        self.seconds = 0.0
        self.num_steps = 0
        self.scores: list[dict] = []
        self.done = False
        self.model: torch.nn.Module | None = None

    def turn(self) -> None:
        began = time.perf_counter()
        while time.perf_counter() - began < TURN_S:
            try:
                self.model = next(self._steps)
            except StopIteration:
                self.done = True
                break
            self.num_steps += 1
            if self.num_steps in self._marks:
                break
        self.seconds += time.perf_counter() - began
        if self.num_steps in self._marks[len(self.scores) :]:
            self._score()

    def _score(self) -> None:
        measured = score(self.model, self.job.task.validation, 16384, self.job.device)
        self.scores.append({"step": self.num_steps, "seconds": round(self.seconds, 1), "accuracy": measured.value})
        print(f"{self.name:14} step {self.num_steps:5} {self.seconds:7.1f} s  {measured.value:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument(
        "--rows", default="peft,lora,iw_lora", help="peft, lora, iw_lora; with -fp32 for that precision"
    )
    parser.add_argument("--dev-rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.rows.split(","):
        method, _, precision = name.partition("-")
        settings = {
            "method": "iw_lora" if method == "iw_lora" else "lora",
            "model.name": args.model,
            "dataset.path": args.data,
            "adapter.target_modules": "all-linear",
            "training.learning_rate": 1e-3,
            "training.seed": args.seed,
            "training.precision": precision or "auto",
            "schedule.warmup_steps": WARMUP_STEPS,
            "evaluation.max_examples": args.dev_rows,
        }
        rows.append(Row(name, build_job(fastpeft.load_run("iwlora_mnli", **settings)), args.epochs))
    while not all(row.done for row in rows):
        for row in rows:
            if not row.done:
                row.turn()
    report = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "commit": git_commit(),
        "epochs": args.epochs,
        "rows": [{"name": row.name, "precision": row.precision, "scores": row.scores} for row in rows],
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
