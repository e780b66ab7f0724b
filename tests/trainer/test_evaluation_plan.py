"""evaluation.every: auto: how often, on how many rows; and what the best weights are where it is a sample."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpeft.config import Interval
from fastpeft.tasks.base import Score
from fastpeft.tasks.sequences.task import SequenceTask
from fastpeft.trainer import StopRequest, build, train
from fastpeft.trainer.build import build_job
from fastpeft.trainer.evaluation_plan import LEAST_ROWS, MOST, SHARE, EvaluationPlan, plan_evaluations
from tests.support.every_kind import ALL_KINDS, run_of_kind
from tests.support.tiny_runs import Listener, assert_same_weights, strict_events, tiny_run, weights, write_run

# ---- the plan ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "num_rows", "count", "sampled"),
    [
        (0.001, 300, 4, None),  # cheap: all rows
        (0.025, 300, 4, None),
        (0.054, 300, 4, 138),  # a five-minute run on 1,700 reviews
        (0.5, 10_000, 4, 500),
        (0.03, 120, 4, 100),
        (0.06, 105, 1, None),  # no sample of a hundred costs so little
        (0.3, 300, 1, 100),
        (0.5, 300, 0, None),
    ],
)
def test_four_then_a_sample_then_fewer(share: float, num_rows: int, count: int, sampled: int | None) -> None:
    plan = plan_evaluations(share, num_rows)
    interval = Interval("fraction", 1 / (count + 1)) if count else Interval("end")
    assert (plan.interval, plan.num_rows) == (interval, sampled)
    assert plan.is_auto
    assert count * share * (sampled or num_rows) / num_rows <= SHARE + 1e-9
    assert sampled is None or sampled >= LEAST_ROWS
    assert (plan.note is None) == (count == MOST and sampled is None)


def test_what_is_said_names_rows_and_setting() -> None:
    note = plan_evaluations(0.054, 300).note
    assert note is not None
    assert "138 of 300 validation rows" in note
    assert "evaluation.every" in note


# ---- the sample ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_sample_is_what_max_examples_takes(tmp_path: Path, kind: str) -> None:
    """The same rows: the same score of the same weights."""
    whole = build_job(run_of_kind(tmp_path, kind, model={"check": False}))
    few = build_job(run_of_kind(tmp_path, kind, model={"check": False}, evaluation={"max_examples": 5}))
    sample = whole.task.sampled(5, whole.backbone, whole.device)
    assert sample.num_validation == few.task.num_validation == 5 < whole.task.num_validation
    scores = [task.evaluate(whole.adapter.model, whole.limits, lambda: False, None) for task in (sample, few.task)]
    assert scores[0] is not None
    assert scores[1] is not None
    assert scores[0].num_rows == scores[1].num_rows == 5
    np.testing.assert_allclose(scores[0].loss, scores[1].loss, rtol=1e-5)
    assert scores[0].value == scores[1].value
    rest = whole.task.evaluate(whole.adapter.model, whole.limits, lambda: False, None)
    assert rest is not None
    assert rest.num_rows == whole.task.num_validation, "the task itself keeps all of its rows"


# ---- the run -------------------------------------------------------------------------------

SAMPLE = 20


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth of a budget in steps, on a sample."""
    plan = EvaluationPlan(Interval("fraction", 0.25), SAMPLE, "on 20 rows", is_auto=True)
    monkeypatch.setattr(build, "EvaluationPlan", lambda *_: plan)


def scored(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    left = iter(values)

    def evaluate(self: Any, *_: Any) -> Score:
        return Score(next(left), 1.0, self.num_validation)

    monkeypatch.setattr(SequenceTask, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.5, 0.9, 0.6, 0.7, 0.65], {"value": 0.9, "step": 4, "num": SAMPLE}),  # 0.65 is of other rows
        ([0.5, 0.6, 0.7, 0.8, 0.65], {"value": 0.65, "step": 8}),  # the last: its whole score
        ([0.5, 0.9, 0.6, 0.7, 0.95], {"value": 0.9, "step": 4, "num": SAMPLE}),
    ],
)
def test_the_best_is_found_on_the_same_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    values: list[float],
    best: dict[str, float],
) -> None:
    request.getfixturevalue("sampling")
    scored(monkeypatch, values)
    result = train(tiny_run(tmp_path, method="lora", budget="8steps"), results_dir=tmp_path, name="r")
    scores = [e for e in strict_events(tmp_path / "r") if e["type"] == "eval"]
    assert [(e["step"], e["num"], e["value"]) for e in scores] == list(
        zip([2, 4, 6, 8, 8], [SAMPLE] * 4 + [64], values, strict=True)
    )
    assert result.metric["value"] == values[-1]
    assert "num" not in result.metric
    assert {key: result.best[key] for key in best} == best
    assert ("num" in result.best) == ("num" in best)
    assert [e["notes"][-1] for e in strict_events(tmp_path / "r") if e["type"] == "run"] == ["on 20 rows"]


def test_a_resume_keeps_rows_and_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Measured again, an evaluation may cost otherwise: what was chosen stays."""
    settings: dict[str, Any] = {"method": "lora", "budget": "16steps", "training": {"checkpoint_steps": 3}}
    request.getfixturevalue("sampling")
    train(tiny_run(tmp_path, **settings), results_dir=tmp_path, name="whole")
    stop = StopRequest()
    listener = Listener(lambda e: e["step"] >= 9 and setattr(stop, "signal", signal.SIGTERM))
    run = tiny_run(tmp_path, **settings)
    assert train(run, results_dir=tmp_path, name="cut", reporter=listener, stop=stop).status == "stopped"
    other = EvaluationPlan(Interval("fraction", 0.5), 7, "on 7 rows", is_auto=True)
    monkeypatch.setattr(build, "EvaluationPlan", lambda *_: other)
    assert train(None, results_dir=tmp_path, name="cut", resume=True).status == "done"
    assert_same_weights(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    scores = [
        [(e["step"], e["num"], e["value"]) for e in strict_events(tmp_path / name) if e["type"] == "eval"]
        for name in ("cut", "whole")
    ]
    assert scores[0] == scores[1]
    assert [num for _, num, _ in scores[0]] == [SAMPLE] * 4 + [64]


def test_a_budget_in_seconds_goes_into_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows that cost 2 ms each, 400 of them a tenth of the budget of 8 s: by 20 % each they took half of it."""
    original = SequenceTask.evaluate

    def evaluate(self: SequenceTask, *arguments: Any) -> Score | None:
        time.sleep(0.002 * self.num_validation)
        return original(self, *arguments)

    monkeypatch.setattr(SequenceTask, "evaluate", evaluate)
    monkeypatch.setattr(SequenceTask, "time_evaluation", lambda self, *_: 0.002 * self.num_validation + 0.05)
    write_run(tmp_path, num_dev=400)
    run = tiny_run(tmp_path, method="lora", budget="8s", evaluation={"every": "auto"})
    result = train(run, results_dir=tmp_path, name="r")
    events = strict_events(tmp_path / "r")
    nums = [e["num"] for e in events if e["type"] == "eval"]
    assert nums[-1] == 400
    assert len(nums) >= 3
    assert all(100 <= num < 400 for num in nums[:-1])
    assert 0.002 * sum(nums[:-2]) <= SHARE * 8
    assert result.elapsed_s <= 8.4  # beside other work a step may take longer than was foreseen
