"""Whole runs of the kinds whose answers are no single class: they learn, resume to the bit, and add up over parts."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpeft.data.batches import IGNORE
from fastpeft.runs.store import RunFolder
from fastpeft.signals import Need
from fastpeft.trainer import StopRequest, train
from fastpeft.trainer.build import Job, build_job
from tests.support.kind_runs import KINDS, METRICS, kind_run
from tests.support.tiny import FAMILIES
from tests.support.tiny_runs import Listener, assert_same_outcome, assert_same_weights, strict_events, weights

CPU = torch.device("cpu")
SCHEDULES: dict[str, dict[str, Any]] = {
    "graff": {"warm_start": "shipped"},
    "graff, exact curvature": {"curvature": "hvp"},
    "fot": {"window": 1, "calibrate": True},
    "fot, aligned": {"window": 1, "alignment": True, "confidence": 0.5},
    "bats": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns(kind: str, tmp_path: Path) -> None:
    """Trained whole, as the random encoder of so small a model says little when it is frozen."""
    settings = {"training": {"learning_rate": 3e-3}, "evaluation": {"every": "50steps"}, "budget": "150steps"}
    result = train(kind_run(tmp_path, kind, method="full", **settings), results_dir=tmp_path, name="r")
    assert (result.status, result.kind, result.metric["name"]) == ("done", kind, METRICS[kind])
    losses = [event["loss"] for event in strict_events(tmp_path / "r") if event["type"] == "step"]
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:10])
    assert result.best["value"] >= 0.65
    evals = [event for event in strict_events(tmp_path / "r") if event["type"] == "eval"]
    assert evals[-1]["value"] == result.metric["value"]
    assert evals[-1].get("groups") == result.metric.get("groups")
    assert RunFolder(tmp_path / "r").read_result() == result


@pytest.mark.parametrize("method", ["lora", "iw_lora", "adalora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_goes_on_to_the_bit(kind: str, method: str, tmp_path: Path) -> None:
    """With dropout, after the first evaluation."""
    run = kind_run(tmp_path, kind, method=method, regulariser={"warmup_steps": 2})
    unbroken = train(run, results_dir=tmp_path, name="unbroken")
    stop = StopRequest()
    listener = Listener(lambda e: e["type"] == "eval" and setattr(stop, "signal", signal.SIGTERM))
    assert train(run, results_dir=tmp_path, name="r", stop=stop, reporter=listener).status == "stopped"
    result = train(None, results_dir=tmp_path, name="r", resume=True)
    assert_same_outcome(result, unbroken)
    assert_same_weights(weights(tmp_path / "r"), weights(tmp_path / "unbroken"))
    logged = [
        [(e["step"], e["loss"]) for e in strict_events(tmp_path / name) if e["type"] in ("step", "eval")]
        for name in ("r", "unbroken")
    ]
    assert logged[0] == logged[1]


def job_of(folder: Path, kind: str, **sections: Any) -> Job:
    """Without dropout."""
    return build_job(kind_run(folder, kind, dropout=0.0, **sections))


def gradient(job: Job, parts: list[np.ndarray], num_items: int) -> tuple[float, torch.Tensor]:
    """Of the loss of a batch that is taken in parts."""
    job.adapter.flat.grad.zero_()
    total = 0.0
    for rows in parts:
        loss = job.task.loss(job.adapter.model, job.task.collate(rows, CPU), num_items).loss
        loss.backward()
        total += loss.item()
    return total, job.adapter.flat.grad.double().clone()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_add_up_to_its_gradient(kind: str, tmp_path: Path) -> None:
    """The parts have unequal numbers of rows, and of labelled tokens."""
    job = job_of(tmp_path, kind)
    for block in job.adapter.blocks:  # B starts as zeros: A would have no gradient
        torch.nn.init.normal_(block.lora_b, std=0.1)
    rows = np.arange(17)
    parts = [rows[:1], rows[1:12], rows[12:15], rows[15:]]
    num_items = job.task.num_items(rows)
    counts = [job.task.num_items(part) for part in parts]
    assert sum(counts) == num_items
    shares = {count / len(part) for count, part in zip(counts, parts)}
    assert len(shares) == (4 if kind == "token-classification" else 1)
    loss, whole = gradient(job, [rows], num_items)
    loss_of_parts, summed = gradient(job, parts, num_items)
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    assert whole.norm() > 1e-3
    assert float((summed - whole).norm() / whole.norm()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_small_parts_takes_the_same_steps(kind: str, tmp_path: Path) -> None:
    runs = {}
    for name, most in (("whole", 16_384), ("parts", 40)):
        run = kind_run(tmp_path, kind, dropout=0.0, training={"micro_batch_tokens": most}, budget="8steps")
        train(run, results_dir=tmp_path, name=name)
        runs[name] = [event["loss"] for event in strict_events(tmp_path / name) if event["type"] == "step"]
    assert runs["parts"] == pytest.approx(runs["whole"], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_tags_is_the_mean_over_the_labelled_tokens(family: str, tmp_path: Path) -> None:
    job = job_of(tmp_path, "token-classification", family=family)
    rows = np.arange(12)
    batch, model = job.task.collate(rows, CPU), job.adapter.model
    loss = job.task.loss(model, batch, job.task.num_items(rows)).loss
    assert job.task.num_items(rows) == int((batch.labels != IGNORE).sum())
    assert loss.item() == pytest.approx(model(**batch.inputs, labels=batch.labels).loss.item(), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_does_not_change_the_loss(kind: str, family: str, tmp_path: Path) -> None:
    job = job_of(tmp_path, kind, family=family)
    rows = np.arange(12)
    batch, num_items = job.task.collate(rows, CPU), job.task.num_items(rows)
    plain = job.task.loss(job.adapter.model, batch, num_items)
    read = job.task.loss(job.adapter.model, batch, num_items, (Need.TOKENS, Need.LENS))
    assert torch.equal(plain.loss, read.loss)
    assert plain.statistics == {}
    assert read.statistics.keys() == {"entropy", "answer_fisher", "lens_entropy"}
    assert all(torch.isfinite(value) and value >= 0 for value in read.statistics.values())
    assert (read.statistics["lens_entropy"] == 0) == (kind == "regression")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_that_reads_the_answers_trains_every_kind(kind: str, schedule: str, tmp_path: Path) -> None:
    name = schedule.partition(",")[0]
    settings = {"name": name, "warmup_steps": 2} | {
        f"{name}.{key}": value for key, value in SCHEDULES[schedule].items()
    }
    run = kind_run(tmp_path, kind, budget="20steps", schedule=settings, evaluation={"every": "end"})
    result = train(run, results_dir=tmp_path, name="r")
    assert (result.status, result.steps) == ("done", 20)
    steps = [event for event in strict_events(tmp_path / "r") if event["type"] == "step"]
    assert all(isinstance(event["loss"], float) and 0 < event["lr"] < 1 for event in steps)


def test_the_ranks_of_adalora_are_no_trained_parameters_over_a_base_in_16_bits(tmp_path: Path) -> None:
    job = build_job(kind_run(tmp_path, "token-classification", method="adalora", training={"precision": "bf16"}))
    ranks = [p for name, p in job.adapter.model.named_parameters() if ".ranknum." in name]
    assert ranks
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in ranks)
    before = job.adapter.flat.data.clone()
    job.adapter.save(tmp_path)
    job.adapter.load(tmp_path)
    assert torch.equal(job.adapter.flat.data, before)
