"""`train` in this process: what it leaves on disk, and what it does with every odd end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_runs import (
    BATCH_SIZE,
    STEPS_PER_EPOCH,
    Listener,
    assert_same_outcome,
    assert_same_weights,
    steps_logged,
    strict_events,
    tiny_run,
    weights,
)
from typer.testing import CliRunner

import fastpeft.trainer
from fastpeft.cli import EXIT_DIVERGED, app
from fastpeft.config import run_values
from fastpeft.data.batches import collate, micro_batches
from fastpeft.errors import UserError
from fastpeft.runs.events import number
from fastpeft.trainer import StopRequest, train
from fastpeft.trainer import loop as loop_module
from fastpeft.trainer.checkpoint import newest_checkpoint
from fastpeft.trainer.loop import MAX_NON_FINITE, MIN_CALIBRATION_BATCHES
from fastpeft.trainer.setup import Job, build_job
from fastpeft.trainer.step import forward_backward


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- it learns -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "iw_lora"])
def test_accuracy_rises_and_both_adapters_load_in_peft(method: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, method=method, budget="150steps", evaluation={"every": "25steps"})
    result = train(run, results_dir=tmp_path, name="r")
    folder = tmp_path / "r"
    scores = [e["value"] for e in strict_events(folder) if e["type"] == "eval"]
    assert len(scores) == 6
    assert result.status == "done"
    assert result.metric == {"name": "accuracy", "value": scores[-1]}
    assert result.best["value"] == max(scores)
    assert result.best["step"] == 25 * (scores.index(max(scores)) + 1)
    assert result.best["value"] > 0.9
    for adapter, value in (("adapter", result.metric["value"]), ("adapter_best", result.best["value"])):
        assert peft_accuracy(tmp_path, folder / adapter) == pytest.approx(value, abs=1e-9)


def peft_accuracy(files: Path, adapter: Path) -> float:
    """With transformers and PEFT alone."""
    rows = [json.loads(line) for line in (files / "pairs" / "dev.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "model")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(files / "model", num_labels=2)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    pairs = [row["premise"] for row in rows], [row["hypothesis"] for row in rows]
    inputs = tokenizer(*pairs, padding=True, return_tensors="pt", return_token_type_ids=True)
    with torch.inference_mode():
        predicted = model(**inputs).logits.argmax(-1).tolist()
    return sum(["no", "yes"][p] == row["label"] for p, row in zip(predicted, rows)) / len(rows)


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
        signals = forward_backward(job.adapter, batches, len(rows))
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

    def build(run) -> Job:
        job = build_job(run)

        def hook(model, args, kwargs, output):
            if model.training:
                if passes.training in passes.poisoned:
                    output.logits = output.logits * math.nan
                passes.before.append(job.adapter.flat.data.clone())
                passes.training += 1
            return output

        job.adapter.model.register_forward_hook(hook, with_kwargs=True)
        return job

    monkeypatch.setattr(fastpeft.trainer, "build_job", build)
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
    assert 6 + MAX_NON_FINITE <= result["steps"] <= 6 + MAX_NON_FINITE + loop_module.FETCH_STEPS
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

    assert events[0]["type"] == "run"
    assert events[0]["pid"] == os.getpid()
    assert events[0]["config"] == json.loads(json.dumps(run_values(run)))
    assert {"host", "budget", "notes"} <= events[0].keys()

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
    assert [e["path"] for e in by_type["checkpoint"]] == [f"step-{i:08d}" for i in range(3, 25, 3)]
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


# ---- the same again --------------------------------------------------------------------------


def test_twice_in_one_process_is_bit_identical_and_leaves_the_caller_as_it_was(tmp_path: Path, seed: int) -> None:
    run = tiny_run(tmp_path, training={"seed": seed})
    threads = torch.get_num_threads()
    torch.manual_seed(seed + 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)

    def caller() -> tuple:
        rng = torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())
        return *rng, torch.get_num_threads(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    torch.set_num_threads(2)
    try:
        before = caller()
        train(run, results_dir=tmp_path, name="a")
        assert caller() == before
        torch.rand(7)
        train(run, results_dir=tmp_path, name="b")
        assert torch.is_grad_enabled()
    finally:
        torch.set_num_threads(threads)
    for adapter in ("adapter", "adapter_best"):
        assert_same_weights(weights(tmp_path / "a", adapter), weights(tmp_path / "b", adapter))
    losses = [[e["loss"] for e in strict_events(tmp_path / n) if e["type"] == "step"] for n in "ab"]
    assert losses[0] == losses[1]


def test_caller_is_left_alone_by_a_resume_and_by_an_error(tmp_path: Path) -> None:
    stopped_run(tmp_path, "training")
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(None, results_dir=tmp_path, name="r", resume=True)
    (tmp_path / "pairs" / "dev.jsonl").write_text("not JSON\n")
    with pytest.raises(UserError):
        train(tiny_run(tmp_path), results_dir=tmp_path)
    assert (random.getstate(), str(np.random.get_state())) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        train(tiny_run(tmp_path, budget="3steps", training={"seed": seed}), results_dir=tmp_path, name=name)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "regulariser",
    [
        {"estimator": "exact"},
        {"estimator": "sketch"},
        {"estimator": "lora_a", "warmup_learning_rate": 1e-2},
        {"calibration": "inline"},
        {"decoupled": True, "decoupled_alpha": 0.0},
        {"penalty": "factors", "normalise": "max", "online": False},
    ],
    ids=lambda r: "-".join(map(str, r.values())),
)
def test_alpha_zero_is_lora_bit_for_bit(regulariser: dict, tmp_path: Path) -> None:
    train(tiny_run(tmp_path, method="lora"), results_dir=tmp_path, name="lora")
    train(tiny_run(tmp_path, regulariser={"alpha": 0.0, **regulariser}), results_dir=tmp_path, name="iw")
    assert_same_weights(weights(tmp_path / "lora"), weights(tmp_path / "iw"))


def test_a_penalty_changes_the_weights(tmp_path: Path) -> None:
    train(tiny_run(tmp_path, method="lora"), results_dir=tmp_path, name="lora")
    train(tiny_run(tmp_path, regulariser={"alpha": 1e-2}), results_dir=tmp_path, name="iw")
    a, b = weights(tmp_path / "lora"), weights(tmp_path / "iw")
    assert any(not torch.equal(a[name], b[name]) for name in a)


# ---- refusals --------------------------------------------------------------------------------


def test_a_name_that_exists_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, budget="2steps")
    train(run, results_dir=tmp_path, name="r")
    before = tree(tmp_path / "r")
    with pytest.raises(UserError, match=r"choose another --name, or continue it with --resume"):
        train(run, results_dir=tmp_path, name="r")
    assert tree(tmp_path / "r") == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is in the way"):
        train(run, results_dir=tmp_path, name="mine")
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("name", ["../r", "a/b", ".hidden", "a b", "x" * 129])
def test_a_name_that_is_no_folder_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="letters, digits"):
        train(tiny_run(tmp_path), results_dir=tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "pairs" / "train.jsonl").write_text("{}\n"), "train.jsonl"),
        (lambda f: (f / "pairs" / "dev.jsonl").write_text(""), "dev.jsonl"),
        (lambda f: (f / "model" / "model.safetensors").write_bytes(b"broken"), "model"),
        (lambda f: (f / "model" / "config.json").unlink(), "config.json"),
    ],
    ids=["train data", "validation data", "weights", "no model"],
)
def test_a_set_up_that_fails_leaves_no_folder(damage: Callable, message: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        train(run, results_dir=tmp_path / "out", name="r")
    assert not (tmp_path / "out" / "r").exists()


@pytest.mark.parametrize(
    ("budget", "reason"),
    [("0.001s", "the final evaluation and save alone would take"), ("5kJ", "a budget in joules needs an energy meter")],
)
def test_budgets_that_cannot_be_kept_are_refused(budget: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        train(tiny_run(tmp_path, budget=budget), results_dir=tmp_path / "out", name="r")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out" / "r").exists()


# ---- stopping and resuming -------------------------------------------------------------------

TOTAL_STEPS = 30


def stopped_run(files: Path, phase: str, monkeypatch: pytest.MonkeyPatch | None = None) -> Listener:
    """A run `r` that was asked to stop in `phase`."""
    stop = StopRequest()

    def request() -> None:
        stop.signal = signal.SIGTERM

    def on(event: dict) -> None:
        if phase == "training" and event["type"] == "step" and event["step"] == 13:
            request()

    if monkeypatch is not None and phase == "calibration":
        original = loop_module.forward_backward
        seen = []

        def third_asks(*args, **kwargs):
            seen.append(None)
            if len(seen) == 3:
                request()
            return original(*args, **kwargs)

        monkeypatch.setattr(loop_module, "forward_backward", third_asks)
    if monkeypatch is not None and phase in ("evaluation", "final evaluation"):
        score = loop_module.score
        at = {"evaluation": 2, "final evaluation": 3}[phase]
        calls = []

        def asks(*args, **kwargs):
            calls.append(None)
            if len(calls) == at:
                request()
            return score(*args, **kwargs)

        monkeypatch.setattr(loop_module, "score", asks)
    listener = Listener(on)
    run = tiny_run(files, budget=f"{TOTAL_STEPS}steps", regulariser={"warmup_steps": 6})
    result = train(run, results_dir=files, name="r", reporter=listener, stop=stop)
    assert result.status == "stopped"
    if monkeypatch is not None:
        monkeypatch.undo()
    return listener


def unbroken(files: Path):
    run = tiny_run(files, budget=f"{TOTAL_STEPS}steps", regulariser={"warmup_steps": 6})
    return train(run, results_dir=files, name="unbroken")


@pytest.mark.parametrize(
    ("phase", "steps"), [("calibration", 0), ("training", None), ("evaluation", 20), ("final evaluation", 30)]
)
def test_a_stop_request_saves_and_a_resume_ends_as_if_nothing_had_been(
    phase: str, steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = stopped_run(tmp_path, phase, monkeypatch)
    folder = tmp_path / "r"
    checkpoint, skipped = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert skipped == []
    assert steps is None or checkpoint.values["steps"] == steps
    assert 14 <= checkpoint.values["steps"] <= TOTAL_STEPS or phase == "calibration"
    assert steps_logged(folder) == list(range(checkpoint.values["steps"]))
    assert listener.events[-1]["status"] == "stopped"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()

    result = train(None, results_dir=tmp_path, name="r", resume=True)
    expected = unbroken(tmp_path)
    if phase == "calibration":
        assert result.tokens > expected.tokens  # what the first calibration took has been spent
        result.tokens = expected.tokens
    assert_same_outcome(result, expected)
    for adapter in ("adapter", "adapter_best"):
        assert_same_weights(weights(folder, adapter), weights(tmp_path / "unbroken", adapter))
    assert steps_logged(folder) == list(range(TOTAL_STEPS))
    kinds = [(e["type"], e["step"]) for e in strict_events(folder) if e["type"] == "eval"]
    assert kinds == [("eval", 10), ("eval", 20), ("eval", 30)]


def test_elapsed_time_goes_on_after_a_resume(tmp_path: Path) -> None:
    stopped_run(tmp_path, "training")
    checkpoint, _ = newest_checkpoint(tmp_path / "r" / "checkpoints")
    assert checkpoint is not None
    listener = Listener()
    result = train(None, results_dir=tmp_path, name="r", resume=True, reporter=listener)
    times = [e["elapsed_s"] for e in listener.events if e["type"] == "step"]
    assert 0 < checkpoint.values["elapsed_s"] < times[0] < times[-1] < result.elapsed_s


def test_resume_of_a_finished_run_says_so_and_does_nothing(tmp_path: Path) -> None:
    done = train(tiny_run(tmp_path, budget="3steps"), results_dir=tmp_path, name="r")
    before = tree(tmp_path / "r")
    listener = Listener()
    again = train(tiny_run(tmp_path, budget="3steps"), results_dir=tmp_path, name="r", resume=True, reporter=listener)
    assert again == done
    assert tree(tmp_path / "r") == before
    assert listener.events == []
    assert len(listener.said) == 1
    assert "is finished: accuracy" in listener.said[0]


def test_resume_with_other_settings_is_refused_naming_the_keys(tmp_path: Path) -> None:
    stopped_run(tmp_path, "training")
    before = tree(tmp_path / "r")
    other = tiny_run(
        tmp_path,
        budget="31steps",
        regulariser={"warmup_steps": 6},
        training={"learning_rate": 5e-3},
        adapter={"rank": 3},
    )
    with pytest.raises(UserError, match="started with other settings") as caught:
        train(other, results_dir=tmp_path, name="r", resume=True)
    message = str(caught.value)
    for key in ("training.learning_rate", "adapter.rank", "budget", "0.005", "0.01", "31steps", "30steps"):
        assert key in message
    assert "batch_size" not in message
    assert tree(tmp_path / "r") == before
    same = tiny_run(tmp_path, budget="30steps", regulariser={"warmup_steps": 6})
    assert train(same, results_dir=tmp_path, name="r", resume=True).status == "done"


def test_resume_needs_a_run_that_exists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        train(None, results_dir=tmp_path, name="r", resume=True)
    with pytest.raises(UserError, match="--resume needs --name"):
        train(None, results_dir=tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_two_trainers_of_one_run_do_not_meet(tmp_path: Path) -> None:
    """The second one is refused while the first trains, and the first does not notice."""
    refused = []

    def on(event: dict) -> None:
        if event["type"] == "eval" and event["step"] == 10:
            with pytest.raises(UserError, match="is being trained by another process") as caught:
                train(None, results_dir=tmp_path, name="r", resume=True)
            refused.append(caught.value)

    result = train(tiny_run(tmp_path), results_dir=tmp_path, name="r", reporter=Listener(on))
    assert len(refused) == 1
    assert result.status == "done"
    assert steps_logged(tmp_path / "r") == list(range(20))


@pytest.mark.parametrize("gone", ["broken", "deleted"])
def test_resume_without_a_valid_checkpoint_says_so_and_starts_over(gone: str, tmp_path: Path) -> None:
    stopped_run(tmp_path, "training")
    folder = tmp_path / "r"
    for path in (folder / "checkpoints").glob("*/state.safetensors"):
        path.write_bytes(path.read_bytes()[:-1]) if gone == "broken" else path.unlink()
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"type":"step","st')  # a kill in the middle of a write
    listener = Listener()
    result = train(None, results_dir=tmp_path, name="r", resume=True, reporter=listener)
    assert any("has no valid checkpoint: starting over" in line for line in listener.said)
    assert sum("checkpoint passed over" in line for line in listener.said) == 2
    assert_same_outcome(result, unbroken(tmp_path))
    assert_same_weights(weights(folder), weights(tmp_path / "unbroken"))
    assert steps_logged(folder) == list(range(TOTAL_STEPS))
    assert newest_checkpoint(folder / "checkpoints")[1] == []


def test_resume_falls_back_to_the_older_checkpoint_and_says_so(tmp_path: Path) -> None:
    stopped_run(tmp_path, "training")
    folder = tmp_path / "r"
    newest = max((folder / "checkpoints").iterdir())
    (newest / "state.json").write_text("{}")
    listener = Listener()
    result = train(None, results_dir=tmp_path, name="r", resume=True, reporter=listener)
    assert any(newest.name in line and "state.json is not what was written" in line for line in listener.said)
    assert_same_outcome(result, unbroken(tmp_path))
    assert_same_weights(weights(folder), weights(tmp_path / "unbroken"))
    assert steps_logged(folder) == list(range(TOTAL_STEPS))


def test_an_error_while_training_is_recorded_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop_module.train_step
    calls = []

    def fails(*args):
        calls.append(None)
        if len(calls) == 8:
            raise RuntimeError("the machine is on fire")
        return original(*args)

    monkeypatch.setattr(loop_module, "train_step", fails)
    run = tiny_run(tmp_path, budget=f"{TOTAL_STEPS}steps", regulariser={"warmup_steps": 6})
    with pytest.raises(RuntimeError, match="on fire"):
        train(run, results_dir=tmp_path, name="r")
    monkeypatch.undo()
    end = strict_events(tmp_path / "r")[-1]
    assert (end["type"], end["status"], end["error"]) == ("end", "failed", "RuntimeError: the machine is on fire")
    assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "failed"
    assert_same_outcome(train(None, results_dir=tmp_path, name="r", resume=True), unbroken(tmp_path))
    assert_same_weights(weights(tmp_path / "r"), weights(tmp_path / "unbroken"))


def test_epochs_differ_in_order_and_cover_every_row(tmp_path: Path) -> None:
    batches = build_job(tiny_run(tmp_path)).batches
    assert len(batches) == STEPS_PER_EPOCH
    orders = [[int(row) for rows in batches.epoch(epoch) for row in rows] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(96))
    assert orders[0] != orders[1]
