"""The loop: it learns, guards itself, writes down what happens, and spends its budget exactly."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastpeft.cli.commands import EXIT_DIVERGED, app
from fastpeft.config import run_values
from fastpeft.data.batches import micro_batches
from fastpeft.runs.events import number
from fastpeft.tasks.sequences.examples import collate
from fastpeft.trainer import StopRequest, train
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.calibrate import MIN_CALIBRATION_BATCHES
from fastpeft.trainer.loop import MAX_NON_FINITE
from fastpeft.trainer.step import forward_backward
from fastpeft.trainer.step_log import FETCH_STEPS
from tests.support.classifiers import classification_loss
from tests.support.tiers import some
from tests.support.tiny_runs import (
    BATCH_SIZE,
    Listener,
    peft_accuracy,
    steps_logged,
    strict_events,
    tiny_run,
    weights,
)

# ---- it learns -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", some(["iw_lora", "lora"]))
def test_accuracy_rises_and_both_adapters_load_in_peft(method: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, method=method, budget="150steps", evaluation={"every": "25steps"})
    result = train(run, results_dir=tmp_path, name="r")
    folder = tmp_path / "r"
    evals = [e for e in strict_events(folder) if e["type"] == "eval"]
    scores = [e["value"] for e in evals]
    assert len(scores) == 6
    assert result.status == "done"
    assert (result.metric["name"], result.metric["value"]) == ("accuracy", scores[-1])
    assert 0 < result.metric["more"]["majority"] < 1
    assert result.best["value"] == max(scores)
    best = max(range(len(evals)), key=lambda i: (evals[i]["value"], -evals[i]["loss"]))
    assert result.best["step"] == 25 * (best + 1)
    assert result.best["value"] > 0.9
    for adapter, value in (("adapter", result.metric["value"]), ("adapter_best", result.best["value"])):
        assert peft_accuracy(tmp_path, folder / adapter) == pytest.approx(value, abs=1e-9)


def test_a_schedule_is_told_of_the_end_once_and_what_it_says_is_logged(tmp_path: Path) -> None:
    train(tiny_run(tmp_path, method="lora", schedule={"name": "fot"}, budget="3steps"), results_dir=tmp_path, name="r")
    events = strict_events(tmp_path / "r")
    (said,) = [e for e in events if e["type"] == "schedule"]
    assert said["finished_at"] == 1.0
    assert said["step"] == 3
    assert events.index(said) < [e["type"] for e in events].index("eval")


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path, seed: int) -> None:
    tiny_run(tmp_path)
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    job = build_job(tiny_run(tmp_path, method="lora", adapter={"dropout": 0.0}, training={"seed": seed}))
    generator = torch.Generator().manual_seed(seed)
    job.adapter.flat.data.add_(torch.randn(job.adapter.flat.data.shape, generator=generator), alpha=0.1)
    rows = job.batches.rows(0)
    encoded = job.batches.encoded

    def gradient(max_tokens: int) -> tuple[torch.Tensor, float, int, int]:
        parts = list(micro_batches(encoded, rows, max_tokens))
        batches = (collate(encoded, part, job.device) for part in parts)
        signals = forward_backward(job.adapter, classification_loss, batches, len(rows))
        return job.adapter.flat.grad.clone(), float(signals.loss), signals.num_tokens, len(parts)

    whole, loss, num_tokens, num_parts = gradient(10**6)
    assert num_parts == 1
    assert whole.norm() > 1e-3
    for max_tokens in (64, 1):
        split, split_loss, split_tokens, num_parts = gradient(max_tokens)
        assert num_parts > 1
        assert split_tokens == num_tokens
        assert split_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    assert num_parts == BATCH_SIZE


def test_micro_batch_tokens_reaches_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_forward_passes(monkeypatch)
    train(tiny_run(tmp_path, method="lora", budget="3steps", training={"micro_batch_tokens": 1}), results_dir=tmp_path)
    assert passes.training == 3 * BATCH_SIZE


# ---- the guard -------------------------------------------------------------------------------


@dataclasses.dataclass
class Passes:
    training: int = 0
    before: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """The parameters at the start of each pass."""
    poisoned: Iterable[int] = ()


def count_forward_passes(monkeypatch: pytest.MonkeyPatch, poisoned: Iterable[int] = ()) -> Passes:
    """Every training pass from now on is counted; those in `poisoned` give NaN logits."""
    passes = Passes(poisoned=poisoned)

    def build(*args) -> Job:
        job = build_job(*args)

        def hook(model, args, kwargs, output):
            if model.training:
                if passes.training in passes.poisoned:
                    output.logits = output.logits * math.nan
                passes.before.append(job.adapter.flat.data.clone())
                passes.training += 1
            return output

        job.adapter.model.register_forward_hook(hook, with_kwargs=True)
        return job

    monkeypatch.setattr("fastpeft.trainer.run.build_job", build)
    return passes


@pytest.mark.parametrize("method", ["lora", "iw_lora"])
def test_a_step_that_is_not_finite_updates_nothing_and_is_told(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = 4 if method == "iw_lora" else 0  # passes before the first step
    bad = (3, 4, 9)
    passes = count_forward_passes(monkeypatch, [calibration + step for step in bad])
    listener = Listener()
    run = tiny_run(tmp_path, method=method, budget="14steps", evaluation={"every": "end"})
    result = train(run, results_dir=tmp_path, name="r", reporter=listener)
    assert result.status == "done"
    before = passes.before[calibration:]
    for step in range(13):
        assert torch.equal(before[step], before[step + 1]) == (step in bad), step
    steps = [e for e in strict_events(tmp_path / "r") if e["type"] == "step"]
    assert [e["step"] for e in steps if e["loss"] == "nan"] == list(bad)
    assert all(math.isfinite(e["loss"]) and math.isfinite(e["grad_norm"]) for e in steps if e["step"] not in bad)
    told = [w for w in listener.warnings() if "not finite" in w]
    assert [w.split(":")[0] for w in told] == [f"step {step}" for step in bad]
    assert "(1 in a row, 3 in all)" in told[-1]
    assert "(2 in a row, 2 in all)" in told[1]


def test_guard_counts_survive_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path, method="lora", budget="100steps", evaluation={"every": "end"})
    count_forward_passes(monkeypatch, range(2, 1000))
    stop = StopRequest()
    listener = Listener(lambda e: e["step"] >= 10 and setattr(stop, "signal", signal.SIGTERM))
    assert train(run, results_dir=tmp_path, name="r", reporter=listener, stop=stop).status == "stopped"
    count_forward_passes(monkeypatch, range(1000))
    listener = Listener()
    result = train(None, results_dir=tmp_path, name="r", resume=True, reporter=listener)
    assert result.status == "diverged"
    assert any(f"({MAX_NON_FINITE} in a row, {MAX_NON_FINITE} in all)" in w for w in listener.warnings())


def test_twenty_in_a_row_end_the_run_with_exit_code_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_forward_passes(monkeypatch, range(6, 10**6))
    tiny_run(tmp_path)
    args = ["--results-dir", tmp_path, "--name", "r", "method=lora", "budget=500steps", "evaluation.every=5steps"]
    done = CliRunner().invoke(app, ["train", "--run", str(tmp_path / "run.yaml"), *map(str, args)])
    assert done.exit_code == EXIT_DIVERGED, done.output
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["status"] == "diverged"
    # The device is asked every 32 steps at the latest.
    assert 6 + MAX_NON_FINITE <= result["steps"] <= 6 + MAX_NON_FINITE + FETCH_STEPS
    assert torch.equal(passes.before[6], passes.before[-1])
    assert f"{MAX_NON_FINITE} steps in a row" in done.output
    assert strict_events(tmp_path / "r")[-1]["status"] == "diverged"
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "r").values())


def test_a_rate_that_blows_up_diverges_by_itself(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, method="lora", budget="300steps", training={"learning_rate": 1e30})
    assert train(run, results_dir=tmp_path, name="r").status == "diverged"


# ---- what is written -------------------------------------------------------------------------


def test_event_log_and_result(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, budget="25steps")
    listener = Listener()
    result = train(run, results_dir=tmp_path, name="r", reporter=listener)
    folder = tmp_path / "r"
    events = strict_events(folder)
    assert events == listener.events
    assert all({"type", "time_s", "elapsed_s", "step"} <= e.keys() for e in events)
    elapsed = [e["elapsed_s"] for e in events if e["type"] not in ("step", "system")]  # these come from elsewhere
    assert elapsed == sorted(elapsed)
    by_type: dict[str, list] = {}
    for event in events:
        by_type.setdefault(event["type"], []).append(event)

    (begun,) = by_type["run"]
    assert {e["type"] for e in events[: events.index(begun)]} == {"phase"}
    assert begun["pid"] == os.getpid()
    assert begun["config"] == json.loads(json.dumps(run_values(run)))
    assert {"host", "budget", "notes"} <= begun.keys()

    steps = by_type["step"]
    assert [e["step"] for e in steps] == list(range(25))
    assert [e["progress"] for e in steps] == pytest.approx([i / 25 for i in range(25)])
    for event in steps:
        assert {"loss", "penalty", "lr", "grad_norm", "tokens", "energy_j"} <= event.keys()
        assert number(event["loss"]) > 0
        assert number(event["grad_norm"]) > 0
        assert 0 < event["lr"] <= 1e-2
    assert steps[0]["penalty"] == 0  # B is zero
    assert steps[-1]["penalty"] > 0

    evaluations = by_type["eval"]
    assert [e["step"] for e in evaluations] == [10, 20, 25]
    for event in evaluations:
        assert (event["split"], event["metric"], event["num"]) == ("validation", "accuracy", 64)
        assert event["value"] * 64 == pytest.approx(round(event["value"] * 64))
    assert [e["step"] for e in by_type["checkpoint"]] == list(range(3, 25, 3))
    importance = by_type["importance"][0]
    assert importance["num_batches"] == 4
    assert len(importance["names"]) == len(importance["layer"]) == len(importance["projection"]) == 12
    assert sum(importance["weights"]) == pytest.approx(1.0)

    assert events[-1]["type"] == "end"
    assert events[-1]["status"] == "done"
    assert events[-1]["metric"] == result.metric
    assert events[-1]["best"] == result.best

    assert json.loads((folder / "result.json").read_text()) == dataclasses.asdict(result)
    assert (result.run_id, result.name, result.status) == ("tiny", "r", "done")
    assert result.budget == {"kind": "steps", "limit": 25, "spent": 25}
    assert (result.steps, result.seed, result.stand_in) == (25, 42, False)
    assert result.model == str(tmp_path / "model")
    assert result.dataset == "pairs"
    calibration_tokens = result.tokens - sum(e["tokens"] for e in steps)
    assert 0 < calibration_tokens < max(e["tokens"] for e in steps) * 4 + 1
    assert result.elapsed_s > 0
    assert result.setup_s > 0
    assert result.peak_memory_mb > 50
    assert result.adapter_mb == pytest.approx(
        (folder / "adapter" / "adapter_model.safetensors").stat().st_size / 2**20, abs=1e-3
    )
    leftovers = [p.name for p in folder.rglob("*") if "writing" in p.name or p.name.endswith(".tmp")]
    assert leftovers == []


@pytest.mark.parametrize("method", ["lora", "iw_lora"])
@pytest.mark.parametrize("num_steps", [1, 13])
def test_budget_of_steps_is_exact_and_leaves_calibration_out(method: str, num_steps: int, tmp_path: Path) -> None:
    result = train(tiny_run(tmp_path, method=method, budget=f"{num_steps}steps"), results_dir=tmp_path, name="r")
    assert result.steps == num_steps
    assert steps_logged(tmp_path / "r") == list(range(num_steps))


@pytest.mark.parametrize(("epochs", "num_steps"), [(1, 12), (1.5, 18), (0.01, 1), (2.05, 25)])
def test_without_a_budget_epochs_decide(epochs: float, num_steps: int, tmp_path: Path) -> None:
    result = train(tiny_run(tmp_path, budget=None, training={"epochs": epochs}), results_dir=tmp_path)
    assert result.steps == num_steps
    assert result.budget == {"kind": "steps", "limit": num_steps, "spent": num_steps}


@pytest.mark.parametrize("method", ["lora", "iw_lora"])
def test_budget_of_tokens_is_never_overrun_and_used_up_to_a_batch(method: str, tmp_path: Path, seed: int) -> None:
    limit = random.Random(seed).randint(1500, 4000)
    run = tiny_run(tmp_path, method=method, budget=f"{limit}tok")
    result = train(run, results_dir=tmp_path, name="r")
    assert result.budget == {"kind": "tokens", "limit": limit, "spent": result.tokens}
    batches = build_job(run).batches
    next_batch = int(batches.encoded.lengths[batches.rows(result.steps)].sum())
    assert result.tokens <= limit < result.tokens + next_batch


def test_calibration_is_capped_and_says_so(tmp_path: Path) -> None:
    listener = Listener()
    run = tiny_run(tmp_path, budget="20steps", regulariser={"warmup_steps": 150})
    train(run, results_dir=tmp_path, reporter=listener)
    assert any(
        f"calibration ended after {MIN_CALIBRATION_BATCHES} of 150 batches" in w and "2%" in w
        for w in listener.warnings()
    )
