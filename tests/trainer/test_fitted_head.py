"""A classifier's output layer that is fitted in closed form before the first step."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
import transformers

from fastpeft.errors import UserError
from fastpeft.trainer import train
from fastpeft.trainer.build import build_job
from fastpeft.trainer.fitted_head import fit_head
from fastpeft.trainer.head_layer import output_layer
from fastpeft.trainer.interrupt import StopRequest
from tests.support.every_kind import run_of_kind
from tests.support.tiny_runs import Listener, assert_same_outcome, assert_same_weights, strict_events, tiny_run, weights


def test_a_fitted_head_answers_what_features_tell(tmp_path: Path) -> None:
    """On the training rows it is at least as right as ridge regression by normal equations in float64 has it."""
    job = build_job(tiny_run(tmp_path))
    model, rows = job.adapter.model, job.batches.rows(0)
    head = job.backbone.head
    assert fit_head(job) == 96
    layer = output_layer(model, head, 2)
    seen: list[torch.Tensor] = []
    model.eval()
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    labels = []
    with torch.no_grad():
        for position in range(12):
            batch = job.task.collate(job.batches.rows(position), job.device)
            model(**batch.inputs)
            labels.append(batch.labels)
    x, y = torch.cat(seen).double(), torch.cat(labels)
    target = torch.where(torch.arange(2) == y[:, None], 1.0, -1.0).double()
    mean = x.mean(0)
    gram = x.t() @ x
    ridge = 1e-2 * gram.diagonal().mean()
    centred = (x - mean).t() @ (x - mean)
    want = torch.linalg.solve(
        centred + ridge * torch.eye(len(gram)).double(), (x - mean).t() @ (target - target.mean(0))
    )
    torch.testing.assert_close(layer.weight.double().t(), want, rtol=1e-3, atol=1e-4)
    assert len(rows)
    with pytest.raises(UserError, match="no linear layer of 7 outputs"):
        output_layer(model, head, 7)


def test_a_run_begins_with_the_fitted_head_and_says_so_while_it_fits(tmp_path: Path) -> None:
    still = {"training": {"fit_head": True, "learning_rate": 1e-12}, "budget": "1steps", "method": "lora"}
    job = build_job(tiny_run(tmp_path, **still))
    fit_head(job)
    score = job.task.evaluate(job.adapter.model.eval(), job.limits, lambda: False, None)
    assert score is not None
    result = train(tiny_run(tmp_path, **still), results_dir=tmp_path, name="r")
    assert result.metric["value"] == score.value
    phases = [event["name"] for event in strict_events(tmp_path / "r") if event["type"] == "phase"]
    assert "head" in phases


@pytest.mark.parametrize("kind", ["classification", "token-classification", "regression", "multi-label"])
def test_without_a_step_the_loss_is_lower_than_with_a_drawn_head(kind: str, tmp_path: Path) -> None:
    job = build_job(run_of_kind(tmp_path, kind))
    assert job.backbone.head

    def loss() -> float:
        score = job.task.evaluate(job.adapter.model.eval(), job.limits, lambda: False, None)
        assert score is not None
        return score.loss

    drawn = loss()
    assert fit_head(job) > 0
    assert loss() < drawn


def test_a_resume_goes_on_to_the_bit(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, training={"fit_head": True}, budget="9steps", evaluation={"every": "end"})
    unbroken = train(run, results_dir=tmp_path, name="unbroken")
    stop = StopRequest()
    listener = Listener(lambda e: e["type"] == "checkpoint" and setattr(stop, "signal", signal.SIGTERM))
    assert train(run, results_dir=tmp_path, name="broken", reporter=listener, stop=stop).status == "stopped"
    assert_same_outcome(train(None, results_dir=tmp_path, name="broken", resume=True), unbroken)
    assert_same_weights(weights(tmp_path / "broken"), weights(tmp_path / "unbroken"))


def test_a_language_model_keeps_its_head(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training.fit_head fits a classifier's head, and a language"):
        build_job(run_of_kind(tmp_path, "word-problems", training={"fit_head": True}))


def test_a_head_that_the_checkpoint_brings_is_not_fitted_anew(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    folder = tmp_path / "model"
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, **names).save_pretrained(
        folder
    )
    assert fit_head(build_job(run)) == 0
    with pytest.raises(UserError, match="would fit the head anew that the checkpoint brings for these very labels"):
        build_job(tiny_run(tmp_path, training={"fit_head": True}))
