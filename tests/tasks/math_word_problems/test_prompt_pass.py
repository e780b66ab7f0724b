"""The references' loss comes from the pass that reads the prompts, and is that of training's own passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastpeft.tasks.causal_lm import decode_batches
from fastpeft.tasks.causal_lm.answering import reads_references
from fastpeft.tasks.math_word_problems.task import MathWordProblems
from fastpeft.trainer.build import Job, build_job
from tests.support.every_kind import run_of_kind


def job_of(folder: Path, method: str = "lora", **evaluation: int) -> Job:
    return build_job(run_of_kind(folder, "word-problems", method=method, evaluation=evaluation))


def both(job: Job) -> tuple[float, float]:
    """(by the prompts' pass, by the loss's own)."""
    task, model = job.task, job.adapter.model
    assert isinstance(task, MathWordProblems)
    assert reads_references(task.validation, task._plain), "or there is nothing to compare"
    score = task.evaluate(model, job.limits, lambda: False, None)
    mean = task.answer_loss.mean(model, task.validation, job.limits, lambda: False)
    assert score is not None
    assert mean is not None
    return score.loss, mean


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("max_new_tokens", [2, 40])
def test_it_is_the_losss_own(tmp_path: Path, method: str, max_new_tokens: int) -> None:
    """References longer than an answer may be are read to their end all the same."""
    job = job_of(tmp_path, method, max_new_tokens=max_new_tokens)
    with torch.no_grad():
        for parameter in job.adapter.flat.data.split(1000):
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    labelled = job.task.validation.num_labelled
    assert (labelled > 2).any()
    found, wanted = both(job)
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("part_tokens", [1, 60, 10**6])
def test_parts_of_a_prompt_pass_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_tokens: int
) -> None:
    """One row at a time, a few, all: the same loss and the same answers."""
    job = job_of(tmp_path, max_new_tokens=6)
    task, model = job.task, job.adapter.model
    wanted = task.evaluate(model, job.limits, lambda: False, None)
    monkeypatch.setattr(decode_batches, "PART_TOKENS", part_tokens)
    found = task.evaluate(model, job.limits, lambda: False, None)
    assert wanted is not None
    assert found is not None
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert replace(found, loss=0.0, decode_s=0.0) == replace(wanted, loss=0.0, decode_s=0.0)
