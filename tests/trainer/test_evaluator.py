"""Which weights are the best so far."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fastpeft.runs.events import EventLog
from fastpeft.runs.store import Result, RunFolder, read_json
from fastpeft.tasks.base import Score
from fastpeft.trainer import train
from fastpeft.trainer.build import build_job
from fastpeft.trainer.evaluator import BEST_SCORE, Evaluator
from fastpeft.trainer.step_log import StepLog
from tests.support.tiny_runs import tiny_run


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 1.0), (0.6, 2.0), (0.4, 0.1)], 1),
        ([(0.5, 1.0), (0.5, 0.9), (0.5, 0.9)], 1),  # ties: the lower loss, then the earlier
        ([(0.5, 1.0), (math.nan, 0.1), (0.5, 1.1)], 0),
        ([(math.nan, 1.0), (0.0, 9.0), (math.nan, 0.1)], 1),
        ([(math.nan, 1.0), (math.nan, 0.5)], 1),
        ([(-0.8, 1.0), (-0.2, 1.0), (-0.5, 1.0)], 1),  # a correlation
        ([(0.5, math.nan), (0.5, 7.0)], 1),
        ([(0.5, 7.0), (0.5, math.nan)], 0),
    ],
)
def test_the_best_is_kept(
    scores: list[tuple[float, float]], best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = build_job(tiny_run(tmp_path, method="lora"))
    (tmp_path / "r").mkdir()
    folder, result = RunFolder(tmp_path / "r"), Result(run_id="tiny", name="r")
    log = EventLog(folder.events)
    evaluator = Evaluator(job, folder, result, StepLog(log, job.clock, job.device), lambda: False)
    for step, (value, loss) in enumerate(scores):
        job.clock.steps = step
        monkeypatch.setattr(job.task, "evaluate", lambda *_, v=value, x=loss: Score(v, x, 8))
        evaluator.evaluate()
    log.close()
    assert result.best["step"] == best
    assert read_json(folder.weights("adapter", best=True) / BEST_SCORE)["step"] == best
    assert len(evaluator.state_dict()["curve"]) == sum(math.isfinite(value) for value, _ in scores)


def test_a_run_whose_scores_are_all_nan_ends_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path, method="lora", budget="4steps", evaluation={"every": "2steps"})
    kind = type(build_job(run).task)
    monkeypatch.setattr(kind, "evaluate", lambda *_: Score(math.nan, 1.0, 8))
    result = train(run, results_dir=tmp_path, name="r")
    assert (result.status, result.best["step"]) == ("done", 2)
    assert (tmp_path / "r" / "adapter_best" / "adapter_model.safetensors").is_file()
