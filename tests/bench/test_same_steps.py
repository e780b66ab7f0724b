"""From the same weights, by the same batches and rates and with no dropout, the Trainer's losses are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import fastpeft
from bench import hf_trainer
from fastpeft.data.batches import Batches
from fastpeft.runs.events import read_events
from fastpeft.tasks import load_task, task_class
from tests.support.tiny import WORDS, make_model

NUM_ROWS, BATCH_SIZE, EPOCHS = 24, 4, 2
NUM_STEPS = EPOCHS * NUM_ROWS // BATCH_SIZE


def rows_of(kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(NUM_ROWS):
        words = [WORDS[(5 * i + 3 * j) % len(WORDS)] for j in range(2 + i % 7)]
        if kind == "token-classification":
            rows.append({"tokens": words, "tags": [("O", "B-PER", "B-LOC")[len(word) % 3] for word in words]})
        else:
            label = len(words) % 3 if kind == "classification" else len(words) / 2 + 0.25
            rows.append({"text": " ".join(words), "text_pair": words[-1], "label": label})
    return rows


@pytest.mark.parametrize("kind", ["classification", "regression", "token-classification"])
def test_the_trainers_losses_are_ours(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "dev"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    run = fastpeft.load_run(
        "lora_mnli",
        **{
            "model.name": str(make_model(tmp_path / "model", "bert", **no_dropout)),
            "dataset.name": "own",
            "dataset.path": str(data),
            "dataset.task": kind,
            "adapter.dropout": 0,
            "adapter.target_modules": "all-linear",
            "training.epochs": EPOCHS,
            "training.batch_size": BATCH_SIZE,
            "training.learning_rate": 1e-2,
            "training.precision": "fp32",
            "training.threads": 1,
            "schedule.warmup_steps": 0,
            "evaluation.every": "end",
            "wandb.mode": "disabled",
        },
    )
    first: dict[str, torch.Tensor] = {}
    batches: dict[int, list[int]] = {}
    whole_loss, batch_rows = task_class(kind).loss, Batches.rows

    def loss(self, model, *args: Any, **more: Any):
        if model.training and not first:
            first.update({name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()})
        return whole_loss(self, model, *args, **more)

    def rows(self, position: int):
        batches[position] = batch_rows(self, position).tolist()
        return batch_rows(self, position)

    monkeypatch.setattr(task_class(kind), "loss", loss)
    monkeypatch.setattr(Batches, "rows", rows)
    fastpeft.train(run, results_dir=tmp_path, name="run", allow_stand_in=False)
    steps = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["type"] == "step"]
    assert len(steps) == NUM_STEPS
    order = [row for step in range(NUM_STEPS) for row in batches[step]]
    assert sorted(order) == sorted([*range(NUM_ROWS)] * EPOCHS)

    theirs = trainer_losses(run, first, order, [step["lr"] for step in steps], monkeypatch)
    assert theirs[0] != pytest.approx(theirs[-1], rel=0.1)
    assert [step["loss"] for step in steps] == pytest.approx(theirs, rel=1e-3)


def trainer_losses(
    run: fastpeft.RunConfig,
    first: dict[str, torch.Tensor],
    order: list[int],
    rates: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> list[float]:
    import transformers

    losses: list[float] = []

    class Trainer(transformers.Trainer):
        def __init__(self, train_dataset: Any, **arguments: Any) -> None:
            super().__init__(train_dataset=train_dataset.select(order), **arguments)
            assert not peft.set_peft_model_state_dict(self.model, first).unexpected_keys

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            share = [rate / run.training.learning_rate for rate in rates] + [0.0]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share.__getitem__)
            return self.lr_scheduler

        def log(self, logs: dict[str, Any], *args: Any, **more: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    arguments = hf_trainer._arguments(run, Path(run.dataset.path).parent / "trainer", "sequential")
    arguments.logging_steps, arguments.num_train_epochs = 1, 1
    monkeypatch.setattr(hf_trainer, "_arguments", lambda *_: arguments)
    monkeypatch.setattr(transformers, "Trainer", Trainer)
    task = load_task(run.dataset, run.evaluation, run.training.seed)
    monkeypatch.setattr(hf_trainer, "load_task", lambda *_: task)
    hf_trainer.train_with_trainer(run, "sequential")
    return losses
