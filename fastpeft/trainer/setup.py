"""From a run's configuration to everything that the loop works with. Outside the budget clock."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fastpeft.adapters import Adapter, method_class
from fastpeft.budget import BudgetClock, Due
from fastpeft.config import Budget, ConfigError, RunConfig, parse_budget, parse_interval
from fastpeft.data import Batches, ClassificationTask, Encoded, encode, load_task
from fastpeft.data.batches import collate, evaluation_batches
from fastpeft.models.backbone import choose_dtype, load_backbone
from fastpeft.schedules import Schedule, make_schedule
from fastpeft.trainer.optim import FlatAdamW

_MEASURED_BATCHES = 4


@dataclass
class Job:
    """One run, ready to train."""

    run: RunConfig
    task: ClassificationTask
    adapter: Adapter
    schedule: Schedule
    optimizer: FlatAdamW
    batches: Batches
    validation: Encoded
    clock: BudgetClock
    evaluation_due: Due
    device: torch.device
    dtype: torch.dtype
    notes: list[str]
    """What the user should know about this set-up."""


def build_job(run: RunConfig) -> Job:
    """Load data and model, tokenise, attach the adapter.

    Raises:
        UserError: data, model or configuration that cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(run.training.precision, device)
    task = load_task(run.dataset)
    torch.manual_seed(run.training.seed)
    method = method_class(run.method)
    backbone = load_backbone(run.model, task.label_names, dtype, device, trained=method.trains_backbone)
    adapter = method.build(run, backbone)
    adapter.model.train()
    max_length = min(run.dataset.max_length, backbone.max_positions or run.dataset.max_length)
    rows = task.validation.head(run.evaluation.max_examples)
    train, validation = (
        encode(examples, backbone.tokenizer, max_length, backbone.reads_segments) for examples in (task.train, rows)
    )
    batches = Batches(train, run.training.batch_size, run.training.seed)
    clock = BudgetClock(_budget(run, batches))
    job = Job(
        run=run,
        task=task,
        adapter=adapter,
        schedule=make_schedule(run.schedule, run.training.learning_rate),
        optimizer=FlatAdamW(adapter.flat, run.optimizer, dtype),
        batches=batches,
        validation=validation,
        clock=clock,
        evaluation_due=Due(parse_interval(run.evaluation.every), len(batches)),
        device=device,
        dtype=dtype,
        notes=_notes(task, train, validation, max_length, run),
    )
    job.notes += adapter.describe()
    if clock.budget.kind == "seconds":
        clock.final_s = _measure_final(job)
        if clock.final_s > clock.budget.limit / 2:
            raise ConfigError(
                f"budget {run.budget}",
                [
                    f"the final evaluation and save alone would take about {clock.final_s:.0f} s, more than half of "
                    "it; give a larger budget, or set evaluation.max_examples"
                ],
            )
    return job


def _budget(run: RunConfig, batches: Batches) -> Budget:
    if run.budget is None:
        return Budget("steps", math.ceil(run.training.epochs * len(batches)))
    budget = parse_budget(run.budget)
    if budget.kind == "joules":
        raise ConfigError(
            f"budget {run.budget}",
            ["a budget in joules needs an energy meter, and none can be read here; give one in s, steps or tok"],
        )
    return budget


def _measure_final(job: Job) -> float:
    """Seconds that a whole evaluation and a save will take, from a few batches spread over all lengths."""
    groups = evaluation_batches(job.validation, job.run.evaluation.batch_tokens)
    chosen = [groups[i * (len(groups) - 1) // max(1, _MEASURED_BATCHES - 1)] for i in range(_MEASURED_BATCHES)]

    def area(rows) -> int:
        return len(rows) * int(job.validation.lengths[rows].max())

    job.adapter.model.eval()
    seconds = []
    with torch.inference_mode():
        for rows in [chosen[-1], *chosen]:  # the first is a warm-up
            start = time.perf_counter()
            batch = collate(job.validation, rows, job.device)
            job.adapter.model(**batch.inputs).logits.sum().item()
            seconds.append((time.perf_counter() - start) / area(rows))
    job.adapter.model.train()
    evaluation_s = sum(seconds[1:]) / _MEASURED_BATCHES * sum(map(area, groups))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        job.adapter.save(Path(folder))
    return evaluation_s + 2 * (time.perf_counter() - start)


def _notes(task: ClassificationTask, train: Encoded, validation: Encoded, max_length: int, run: RunConfig) -> list[str]:
    notes = [task.describe()]
    for split, count in task.skipped_rows.items():
        notes.append(f"{count:,} malformed rows of the {split} split were skipped")
    for split, encoded in (("training", train), ("validation", validation)):
        if encoded.num_truncated:
            notes.append(f"{encoded.num_truncated:,} {split} rows were cut to {max_length} tokens")
    if max_length < run.dataset.max_length:
        notes.append(f"dataset.max_length is {run.dataset.max_length}, but the model takes {max_length} tokens")
    if run.method != "iw_lora" and any(key.startswith("regulariser.") for key in run.overrides):
        notes.append(f"regulariser.* was set, but method {run.method} has no penalty: it is ignored")
    return notes
