"""A run that a sweep ends after an evaluation."""

from __future__ import annotations

import shutil

import pytest

from fastpeft.errors import UserError
from fastpeft.runs.store import RunFolder
from fastpeft.tasks.base import Score
from fastpeft.trainer import train
from tests.support.tiny_runs import strict_events, tiny_run


def test_it_is_told_every_evaluation_but_the_last_and_ends_where_it_says(tmp_path):
    run = tiny_run(tmp_path, evaluation={"every": "25%"}, wandb={"mode": "disabled"})
    told: list[tuple[int, Score]] = []

    def prune(evaluation: int, score: Score) -> bool:
        told.append((evaluation, score))
        return evaluation == 2

    result = train(run, results_dir=tmp_path / "r", name="p", prune=prune)
    assert [evaluation for evaluation, _ in told] == [1, 2]
    assert (result.status, result.steps) == ("pruned", 10)
    folder = RunFolder(tmp_path / "r" / "p")
    assert folder.status() == "pruned"
    events = strict_events(folder.path)
    assert [event["value"] for event in events if event["type"] == "eval"] == [score.value for _, score in told]
    assert events[-1]["type"] == "end"
    assert events[-1]["status"] == "pruned"
    assert result.best["value"] == max(score.value for _, score in told)
    assert folder.weights("adapter", best=True).is_dir()

    whole: list[int] = []
    result = train(run, results_dir=tmp_path / "r", name="w", prune=lambda number, _: bool(whole.append(number)))
    assert (result.status, whole) == ("done", [1, 2, 3])


def test_the_test_split_can_be_left_out(tmp_path):
    run = tiny_run(tmp_path, budget="4steps", evaluation={"every": "end"}, wandb={"mode": "disabled"})
    shutil.copy(tmp_path / "pairs" / "dev.jsonl", tmp_path / "pairs" / "test.jsonl")
    results = {
        scored: train(run, results_dir=tmp_path, name=f"r{scored}", score_test=scored) for scored in (True, False)
    }
    assert results[True].test["num"] == 64
    assert results[False].test == {}
    assert results[True].metric == results[False].metric


def test_a_pruned_run_is_no_run_that_is_done(tmp_path):
    run = tiny_run(tmp_path, wandb={"mode": "disabled"})
    train(run, results_dir=tmp_path, name="r", prune=lambda *_: True)
    with pytest.raises(UserError, match="has this name"):
        train(run, results_dir=tmp_path, name="r")
