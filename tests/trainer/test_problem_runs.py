"""Whole runs on word problems: what is scored, with which weights, how often, and on whose clock."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.config import ConfigError
from fastpeft.device_memory import TokenLimits
from fastpeft.runs.curves import auc
from fastpeft.runs.store import RunFolder
from fastpeft.tasks.base import Score
from fastpeft.tasks.math_word_problems.task import MathWordProblems
from fastpeft.trainer import StopRequest, train
from fastpeft.trainer.build import Job, build_job
from tests.support.problem_runs import NUM_TEST, problem_run, write_run
from tests.support.tiers import some
from tests.support.tiny_runs import Child, Listener, assert_same_outcome, assert_same_weights, strict_events, weights

METHODS = ["lora", "iw_lora", "adalora", "full", "schedule_free"]


def of_method(method: str) -> dict:
    if method == "schedule_free":
        return {"method": "lora", "optimizer": {"name": "schedule_free"}, "schedule": {"name": "constant"}}
    return {"method": method}


def evals(folder: Path, split: str) -> list[dict]:
    return [e for e in strict_events(folder) if e["type"] == "eval" and e["split"] == split]


def go_on() -> bool:
    return False


# ---- it learns -------------------------------------------------------------------------------


def test_learns_a_few_problems_by_heart(tmp_path: Path) -> None:
    """Trained whole, as the random head of so small a model says little when it is frozen."""
    run = problem_run(
        tmp_path,
        method="full",
        budget="100steps",
        evaluation={"every": "25steps", "calculator": True, "pass_at": 2, "num_samples": 3},
    )
    result = train(run, results_dir=tmp_path, name="r")
    validation, (test,) = evals(tmp_path / "r", "validation"), evals(tmp_path / "r", "test")
    assert validation[0]["value"] < 1
    assert result.test["value"] == 1.0
    assert result.test["num"] == NUM_TEST
    assert result.test["more"].keys() == {"no_answer", "cut", "pass@2"}
    assert result.test["more"]["no_answer"] == result.test["more"]["cut"] == 0
    assert result.test["more"]["pass@2"] > 0.5
    assert (result.test["weights"], result.test["step"]) == ("best", result.best["step"])
    assert test["value"] == 1.0
    for event in (*validation, test):
        assert event["metric"] == "exact_match"
        assert {"decode_s", "decode_tokens", "energy_j", "elapsed_s", "loss"} <= event.keys()
        assert 0 < event["decode_s"] < event["elapsed_s"]
    times, values = [e["elapsed_s"] for e in validation], [e["value"] for e in validation]
    assert result.auc["seconds"] == pytest.approx(auc(times, values, result.elapsed_s), abs=1e-2)


def test_decoding_is_on_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the step before an evaluation and its event lies at least what decoding took."""
    train(problem_run(tmp_path), results_dir=tmp_path, name="r")
    events = [e for e in strict_events(tmp_path / "r") if e["type"] in ("step", "eval")]
    found = 0
    for before, event in itertools.pairwise(events):
        if event["type"] == "eval":
            assert event["elapsed_s"] - before["elapsed_s"] >= event["decode_s"]
            found += 1
    assert found == 3


# ---- which weights ---------------------------------------------------------------------------


@pytest.fixture
def rigged(monkeypatch: pytest.MonkeyPatch):
    """Evaluations tell the given values; returns the weights that were tested, those that were evaluated, the jobs."""
    tested: list[tuple[torch.Tensor, Score | None]] = []
    evaluated_at: list[torch.Tensor] = []
    jobs: list[Job] = []

    def rig(values: list[float], build=build_job) -> tuple[list, list[torch.Tensor], list[Job]]:
        told = iter(values)
        evaluate, evaluate_test = MathWordProblems.evaluate, MathWordProblems.evaluate_test

        def evaluated(self, *args):
            evaluated_at.append(jobs[-1].adapter.flat.data.clone())
            return dataclasses.replace(evaluate(self, *args), value=next(told))

        def scored(self, *args):
            found = evaluate_test(self, *args)
            tested.append((jobs[-1].adapter.flat.data.clone(), found))
            return found

        def built(*args: Any) -> Job:
            jobs.append(build(*args))
            return jobs[-1]

        monkeypatch.setattr(MathWordProblems, "evaluate", evaluated)
        monkeypatch.setattr(MathWordProblems, "evaluate_test", scored)
        monkeypatch.setattr("fastpeft.trainer.run.build_job", built)
        return tested, evaluated_at, jobs

    return rig


@pytest.mark.parametrize("method", some(METHODS, (1,)))
def test_the_best_weights_are_scored_once_and_the_last_are_kept(method: str, tmp_path: Path, rigged) -> None:
    tested, evaluated, jobs = rigged([0.2, 0.9, 0.4])
    run = problem_run(tmp_path, budget="30steps", training={"learning_rate": 5e-3}, **of_method(method))
    result = train(run, results_dir=tmp_path, name="r")
    assert (result.best["step"], result.metric["value"]) == (20, 0.4)
    ((at_test, score),) = tested
    (event,) = evals(tmp_path / "r", "test")
    assert event["value"] == result.test["value"] == score.value
    assert result.test["step"] == 20
    with jobs[0].optimizer.averaged():  # the trained weights are back in their place
        assert torch.equal(jobs[0].adapter.flat.data, evaluated[2])
    assert not torch.equal(at_test, evaluated[2])

    def load(best: bool) -> Job:
        job = build_job(run)
        job.adapter.load(RunFolder(tmp_path / "r").weights(job.adapter.saved_as, best))
        return job

    job = load(best=True)
    assert torch.equal(job.adapter.flat.data, at_test)
    again = job.task.evaluate_test(job.adapter.model, job.limits, go_on, None)
    assert (again.value, again.more, again.loss) == (score.value, score.more, score.loss)
    if method != "adalora":  # what it has pruned away is saved as zeros
        assert torch.equal(at_test, evaluated[1])
        assert torch.equal(load(best=False).adapter.flat.data, evaluated[2])


def test_the_last_weights_are_scored_as_they_are_where_they_are_the_best(tmp_path: Path, rigged) -> None:
    tested, evaluated, _ = rigged([0.2, 0.9])
    result = train(problem_run(tmp_path, **of_method("schedule_free")), results_dir=tmp_path, name="r")
    assert result.test["step"] == result.best["step"] == 20
    ((at_test, _),) = tested
    assert torch.equal(at_test, evaluated[1])


def test_without_a_test_file_nothing_is_scored_twice(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "problems" / "test.jsonl").unlink()
    listener = Listener()
    result = train(problem_run(tmp_path), results_dir=tmp_path, name="r", reporter=listener)
    assert result.status == "done"
    assert result.test == {}
    assert not evals(tmp_path / "r", "test")
    (notes,) = (event["notes"] for event in listener.events if event["type"] == "run")
    assert any("has no test split: nothing is scored but the 6 problems held out" in note for note in notes)


# ---- stops and kills -------------------------------------------------------------------------


@pytest.mark.parametrize("method", some(["lora", "schedule_free"]))
def test_a_stop_during_the_test_leaves_a_checkpoint_and_a_resume_scores_it(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = problem_run(tmp_path, budget="30steps", **of_method(method))
    stop, real = StopRequest(), MathWordProblems.evaluate_test

    def interrupted(self, *args):
        stop.signal = signal.SIGTERM
        return real(self, *args)

    monkeypatch.setattr(MathWordProblems, "evaluate_test", interrupted)
    result = train(run, results_dir=tmp_path, name="r", stop=stop)
    assert (result.status, result.test, result.steps) == ("stopped", {}, 30)
    assert len(evals(tmp_path / "r", "validation")) == 3
    monkeypatch.setattr(MathWordProblems, "evaluate_test", real)
    result = train(None, results_dir=tmp_path, name="r", resume=True)
    unbroken = train(run, results_dir=tmp_path, name="unbroken")
    assert_same_outcome(result, unbroken)
    assert result.test == unbroken.test != {}
    assert len(evals(tmp_path / "r", "validation")) == 3  # the last one is not repeated
    assert len(evals(tmp_path / "r", "test")) == 1
    for adapter in ("adapter", "adapter_best"):
        assert_same_weights(weights(tmp_path / "r", adapter), weights(tmp_path / "unbroken", adapter))


@pytest.mark.soak
def test_a_kill_after_a_new_best_scores_that_best(tmp_path: Path) -> None:
    """The last checkpoint is of step 6, the best of step 8; after the resume nothing is evaluated but the end."""
    path = write_run(tmp_path)
    places = ["--name", "r", "--results-dir", str(tmp_path)]
    settings = ["budget=4000steps", "evaluation.every=8steps", "training.checkpoint_steps=6"]
    with Child(tmp_path / "log", "train", "--run", str(path), *places, *settings) as child:
        child.wait_until((tmp_path / "r" / "adapter_best" / "best.json").is_file)
        child.process.kill()
        assert child.end() == -signal.SIGKILL
    folder = tmp_path / "r"
    best = json.loads((folder / "adapter_best" / "best.json").read_text())
    kept = weights(folder, "adapter_best")
    assert best["step"] % 8 == 0
    # From here on no evaluation beats it, and few steps are left.
    (folder / "run.yaml").write_text((folder / "run.yaml").read_text().replace("4000steps", f"{best['step'] + 3}steps"))
    with pytest.MonkeyPatch.context() as patch:
        real = MathWordProblems.evaluate

        def worse(self, *args):
            found = real(self, *args)
            return found and dataclasses.replace(found, value=-0.5)

        patch.setattr(MathWordProblems, "evaluate", worse)
        result = train(None, results_dir=tmp_path, name="r", resume=True)
    assert result.status == "done"
    assert result.best == best
    assert result.test["step"] == best["step"]
    assert_same_weights(weights(folder, "adapter_best"), kept)
    job = build_job(problem_run(tmp_path))
    job.adapter.load(folder / "adapter_best")
    score = job.task.evaluate_test(job.adapter.model, TokenLimits(10**6, 10**6), go_on, None)
    assert result.test["value"] == score.value


# ---- the budget ------------------------------------------------------------------------------

STEP_S, EVALUATION_S = 1.0, 2.0


@pytest.fixture
def virtual_time(monkeypatch: pytest.MonkeyPatch):
    """Runs on a clock of their own: a step takes STEP_S, an evaluation what it is told, the test that per problem."""

    class Time:
        now, seconds, test_s = 0.0, EVALUATION_S, math.nan

    time, built = Time(), build_job
    evaluate, evaluate_test = MathWordProblems.evaluate, MathWordProblems.evaluate_test

    def build(*args: Any) -> Job:
        job = built(*args)
        job.clock._now = lambda: time.now
        step, count = job.optimizer.clip_guard_and_update, job.clock.count_step

        def slow(*args):
            time.now += STEP_S
            return step(*args)

        job.optimizer.clip_guard_and_update = slow
        job.clock.count_step = lambda num_tokens, _: count(num_tokens, STEP_S)
        time.expected = EVALUATION_S * (1 + job.task.test_cost)
        return job

    def evaluated(self, *args):
        time.now += time.seconds
        return evaluate(self, *args)

    def scored(self, *args):
        time.now += time.seconds * self.test_cost if math.isnan(time.test_s) else time.test_s
        return evaluate_test(self, *args)

    monkeypatch.setattr(MathWordProblems, "evaluate", evaluated)
    monkeypatch.setattr(MathWordProblems, "evaluate_test", scored)
    monkeypatch.setattr(MathWordProblems, "time_evaluation", lambda *args: EVALUATION_S)
    monkeypatch.setattr("fastpeft.trainer.run.build_job", build)
    return time


@pytest.mark.parametrize("every", ["20%", "end", "3s"])
def test_a_budget_in_seconds_has_room_for_the_last_evaluation_and_the_test(
    every: str, tmp_path: Path, virtual_time
) -> None:
    run = problem_run(tmp_path, budget="40s", evaluation={"every": every})
    result = train(run, results_dir=tmp_path, name="r")
    assert result.status == "done"
    assert evals(tmp_path / "r", "test")
    assert 40 - 0.1 * virtual_time.expected - 1.5 * STEP_S <= result.elapsed_s <= 40
    assert evals(tmp_path / "r", "validation")[-1]["step"] == result.steps


def test_answers_that_take_longer_than_expected_are_reckoned_with_from_then_on(tmp_path: Path, virtual_time) -> None:
    """The first evaluation shows it; the run then ends sooner, and in time."""
    virtual_time.seconds = 3 * EVALUATION_S
    run = problem_run(tmp_path, budget="60s", evaluation={"every": "20%"})
    result = train(run, results_dir=tmp_path, name="r")
    assert result.status == "done"
    assert 60 - 0.1 * 3 * virtual_time.expected - 1.5 * STEP_S <= result.elapsed_s <= 60


def test_a_last_evaluation_that_alone_is_slower_costs_what_it_is_slower_by(tmp_path: Path, virtual_time) -> None:
    """Nothing warns of it. The scores are whole, the overrun is what the test took beyond the reserve."""
    virtual_time.test_s = 10.0
    run = problem_run(tmp_path, budget="40s", evaluation={"every": "20%"})
    result = train(run, results_dir=tmp_path, name="r")
    assert result.test["num"] == NUM_TEST
    over_s = 10.0 - EVALUATION_S * NUM_TEST / 6
    assert 40 < result.elapsed_s <= 40 + over_s
    assert result.budget["spent"] == pytest.approx(result.elapsed_s, abs=1e-3)


def test_a_budget_that_the_last_evaluation_and_the_test_would_eat_is_refused(tmp_path: Path, virtual_time) -> None:
    with pytest.raises(ConfigError, match=r"more than half of it.*evaluation\.max_test_examples"):
        train(problem_run(tmp_path, budget="9s"), results_dir=tmp_path, name="r")
    assert not (tmp_path / "r").exists()
    write_run(tmp_path / "other")
    shutil.rmtree(tmp_path / "problems")
    (tmp_path / "other" / "problems" / "test.jsonl").unlink()
    run = problem_run(tmp_path / "other", budget="9s")  # without a test split it has room
    assert train(run, results_dir=tmp_path, name="r").status == "done"
