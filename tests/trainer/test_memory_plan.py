"""What a pass takes is counted right, and what is planned by it fits, on whatever machine."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastpeft.config.schema import TrainingConfig
from fastpeft.device_memory import OutOfMemory, TokenLimits, free_bytes
from fastpeft.errors import UserError
from fastpeft.trainer import StopRequest, memory_plan, train
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.memory_plan import (
    FEWEST,
    FOOTPRINT,
    MOST,
    MOST_EVALUATED,
    SHARE,
    choose,
    suits_evaluation,
    suits_training,
)
from fastpeft.trainer.pass_cost import Cost, evaluation_cost, training_cost
from fastpeft.trainer.peak_memory import peak_bytes
from fastpeft.trainer.step import forward_backward
from tests.support.every_kind import ALL_KINDS, run_of_kind
from tests.support.problem_runs import problem_run
from tests.support.tiny_runs import Listener, assert_same_weights, strict_events, tiny_run, weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MB = 2**20


# ---- counting ------------------------------------------------------------------------------


def test_the_peak_is_what_lives_at_once() -> None:
    x = torch.ones(MB // 4)

    def work() -> None:
        y = x + 1  # 1 MB
        z = y * 2  # 2
        del y
        w = z.view(2, -1)[0].add_(1)  # no more: views, and in place
        (w[:10].clone(), z.sin())  # 2 and a bit

    assert peak_bytes(CPU, work) == 2 * MB + 40


def test_what_was_there_before_does_not_count() -> None:
    x, out = torch.ones(MB), torch.empty(MB)
    assert peak_bytes(CPU, lambda: torch.sin(x.view(2, -1).view(-1), out=out)) == 0


def test_a_backward_pass_counts() -> None:
    """The results of exp and tanh wait for it, and with them a gradient or two live."""
    x = torch.ones(MB // 4, requires_grad=True)
    x.grad = torch.zeros_like(x)
    forward = peak_bytes(CPU, lambda: x.sin().exp().tanh().sum())
    both = peak_bytes(CPU, lambda: x.sin().exp().tanh().sum().backward())
    assert forward == pytest.approx(2 * MB, abs=100)
    assert 3 * MB <= both <= 4 * MB + 100


def test_counting_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    x = torch.randn(5, 8)

    def gradient() -> list[torch.Tensor]:
        torch.manual_seed(1)
        return list(torch.autograd.grad(model(x).sum(), list(model.parameters())))

    plain, counted = gradient(), []
    peak_bytes(CPU, lambda: counted.extend(gradient()))
    assert all(torch.equal(one, other) for one, other in zip(plain, counted, strict=True))


LEAST = 0.8
"""Of what is found: many rows go through a merged weight, which two do not. The plan leaves a fifth of the room."""


def peak_of(job: Job, rows: np.ndarray) -> int:
    batch = job.task.collate(rows, job.device)
    return peak_bytes(
        job.device, lambda: forward_backward(job.adapter, job.task.loss, [batch], job.task.num_items(rows))
    )


@pytest.mark.parametrize("kind", ["pairs", "problems"])
def test_the_cost_of_two_rows_foretells_that_of_many(kind: str, tmp_path: Path) -> None:
    job = build_job(tiny_run(tmp_path, method="lora") if kind == "pairs" else problem_run(tmp_path))
    cost = training_cost(job.adapter, job.task)
    widths = job.task.train.widths
    order = np.argsort(widths, kind="stable")
    for rows in (order[:8], order[-1:], order[-16:]):
        width = int(widths[rows].max())
        found, foretold = peak_of(job, rows), cost.bytes(len(rows) * width, width)
        assert LEAST * found <= foretold <= 1.25 * found, (width, len(rows))


def test_measuring_leaves_no_trace(tmp_path: Path) -> None:
    job = build_job(tiny_run(tmp_path))
    before, rng = job.adapter.flat.data.clone(), torch.get_rng_state()
    training_cost(job.adapter, job.task)
    assert torch.equal(job.adapter.flat.data, before)
    assert not job.adapter.flat.grad.any()
    assert torch.equal(torch.get_rng_state(), rng)
    assert job.adapter.model.training


def test_what_grows_with_the_square_is_told_from_the_rest() -> None:
    def size(width: int) -> float:
        return 100 * width + 3 * width**2

    cost = Cost.of_rows((8, size(8)), (17, size(17)))
    assert (cost.linear, cost.square) == (pytest.approx(100), pytest.approx(3))
    assert cost.bytes(5 * 400, 400) == pytest.approx(5 * size(400))
    assert Cost.of_rows((8, 800.0), (8, 800.0)) == Cost(0.0, 100.0)
    assert Cost.of_rows((8, 808.0), (16, 1600.0)).square == 0.0  # what does not grow is no negative square


def test_tokens_and_bytes_are_each_others_inverse() -> None:
    cost = Cost(fixed=1000.0, linear=10.0, square=0.5)
    for width in (1, 40, 300):
        tokens = cost.tokens(1e6, width)
        assert cost.bytes(tokens, width) <= 1e6 < cost.bytes(tokens + 1, width)
    assert cost.tokens(999.0, 40) == 0
    assert Cost(0.0, 0.0).tokens(1e6, 1) == 10**6


def test_an_evaluation_has_a_part_that_does_not_grow() -> None:
    def attempt(limits: TokenLimits) -> None:
        merged, cache = torch.ones(3 * MB // 4), torch.ones(largest(limits)[0] * MB // 4)
        assert len(merged) > 0
        assert len(cache) > 0

    def largest(limits: TokenLimits) -> tuple[int, int]:
        return max(1, min(2, limits.evaluation // 64)), 64

    cost = evaluation_cost(attempt, largest, 512, CPU)
    assert cost.fixed == pytest.approx(3 * MB)
    assert cost.linear == pytest.approx(MB / 64)


# ---- choosing ------------------------------------------------------------------------------


def test_a_cpu_takes_a_footprint_and_a_gpu_many() -> None:
    dear, cheap, usual = Cost(0.0, 1e6), Cost(0.0, 1e3), Cost(0.0, 2e5)
    assert suits_training(dear, 200, CPU) == FEWEST
    assert suits_training(cheap, 200, CPU) == MOST
    assert suits_training(usual, 200, CPU) == int(FOOTPRINT / 2e5)
    assert suits_training(Cost(0.0, 1e5, 500.0), 200, CPU) == int(FOOTPRINT / 2e5)
    assert {suits_training(cost, 200, CUDA) for cost in (dear, cheap)} == {MOST}


def test_decoding_may_take_a_quarter_of_the_weights() -> None:
    small, large = nn.Linear(8, 8), nn.Linear(1, 8 * FOOTPRINT // 4, bias=False, device="meta")
    assert suits_evaluation(Cost(0.0, 1e5), small) == int(FOOTPRINT / 1e5)
    assert suits_evaluation(Cost(0.0, 1e5), large) == int(2 * FOOTPRINT / 1e5)
    assert suits_evaluation(Cost(0.0, 1.0), small) == MOST
    assert MOST < MOST_EVALUATED


@pytest.mark.parametrize(
    ("setting", "suits", "fit", "chosen", "told"),
    [
        ("auto", 512, 9000, 512, False),
        ("auto", 512, 300, 300, False),
        (2048, 512, 9000, 2048, False),
        (2048, 512, 2048, 2048, False),
        (2048, 512, 300, 300, True),
        (100, 512, 300, 100, False),
    ],
)
def test_a_number_is_taken_at_its_word_as_far_as_there_is_room(setting, suits, fit, chosen, told) -> None:
    most, notes = choose("training.micro_batch_tokens", setting, suits, fit)
    assert most == chosen
    said = ["training.micro_batch_tokens is 2,048, and 300 fit into the memory that is free"]
    assert notes == (said if told else [])


# ---- a run's plan --------------------------------------------------------------------------


class Free:
    """So much is free, whatever the machine says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bytes: float) -> None:
        self.bytes = bytes
        monkeypatch.setattr(memory_plan, "free_bytes", lambda device: int(self.bytes))


def moments(job: Job) -> int:
    return memory_plan.MOMENTS * job.adapter.flat.data.nbytes


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_kind_is_planned(kind: str, tmp_path: Path, fewer_rows: None) -> None:
    job = build_job(run_of_kind(tmp_path, kind, training={"micro_batch_tokens": "auto"}))
    plan = job.plan
    assert FEWEST <= plan.limits.training <= MOST
    assert FEWEST <= plan.limits.evaluation <= MOST
    assert plan.training > plan.evaluation > 0
    assert 0 < plan.held < plan.peak
    (line,) = [note for note in job.notes if note.startswith("memory: ")]
    assert f"micro-batches of at most {plan.limits.training:,} tokens" in line
    assert f"evaluation batches of {plan.limits.evaluation:,}," in line


def test_the_same_run_plans_the_same(tmp_path: Path) -> None:
    plans = [build_job(tiny_run(tmp_path)).plan for _ in range(2)]
    assert plans[0].limits == plans[1].limits
    assert (plans[0].training, plans[0].evaluation) == (plans[1].training, plans[1].evaluation)


def test_what_is_chosen_stands_in_the_events(tmp_path: Path) -> None:
    train(tiny_run(tmp_path, method="lora", budget="2steps"), results_dir=tmp_path, name="r")
    (event,) = [event for event in strict_events(tmp_path / "r") if event["type"] == "run"]
    memory = event["memory"]
    assert memory["micro_batch_tokens"] == MOST
    assert 0 < memory["held_mb"] < memory["peak_mb"]
    assert memory["bytes_per_token"] > memory["bytes_per_evaluation_token"] > 0
    assert memory["checkpointed"] is False
    assert sum(note.startswith("memory: ") for note in event["notes"]) == 1
    peak_mb = json.loads((tmp_path / "r" / "result.json").read_text())["peak_memory_mb"]
    assert peak_mb >= 0.9 * memory["held_mb"]


@pytest.mark.parametrize("setting", ["auto", 5000])
def test_no_pass_is_larger_than_what_is_free(setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 longest rows' room SHARE is taken; training goes on in parts, to the same losses."""
    settings: dict[str, Any] = {"method": "lora", "adapter": {"dropout": 0.0}, "model": {"check": False}}
    job = build_job(tiny_run(tmp_path, **settings))
    width = int(job.task.train.widths.max())
    cost = training_cost(job.adapter, job.task)
    Free(monkeypatch, moments(job) + cost.bytes(40 * width, width))
    tight = build_job(tiny_run(tmp_path, **settings, training={"micro_batch_tokens": setting}))
    assert SHARE * 40 * width - width <= tight.limits.training <= SHARE * 40 * width
    told = [note for note in tight.notes if note.startswith("training.micro_batch_tokens is 5,000, and ")]
    assert len(told) == (setting == 5000)
    assert tight.limits.evaluation >= tight.limits.training


def test_a_row_that_does_not_fit_is_refused_before_it_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = build_job(tiny_run(tmp_path, method="lora"))
    width = int(job.task.train.widths.max())
    Free(monkeypatch, moments(job) + 0.7 * training_cost(job.adapter, job.task).bytes(width, width))
    run = tiny_run(tmp_path, method="lora", training={"checkpoint_layers": False})
    with pytest.raises(
        OutOfMemory, match=rf"in training: a row of {width} tokens takes .* kB, and .* kB are free"
    ) as e:
        build_job(run)
    assert e.value.exit_code == 2
    assert "dataset.max_length" in str(e.value)


def test_where_a_row_does_not_fit_otherwise_layers_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"method": "lora", "budget": "4steps", "adapter": {"dropout": 0.0}}
    tiny_run(tmp_path)
    config = tmp_path / "model" / "config.json"  # smaller parts draw other dropout
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | off))
    job = build_job(tiny_run(tmp_path, **settings))
    width = int(job.task.train.widths.max())
    train(tiny_run(tmp_path, **settings), results_dir=tmp_path, name="plain")
    Free(monkeypatch, moments(job) + training_cost(job.adapter, job.task).bytes(width, width) / SHARE * 0.95)
    listener = Listener()
    train(tiny_run(tmp_path, **settings), results_dir=tmp_path, name="again", reporter=listener)
    (event,) = [event for event in listener.events if event["type"] == "run"]
    assert event["memory"]["checkpointed"]
    assert "layers computed again in the backward pass" in " ".join(event["notes"])
    losses = [[e["loss"] for e in strict_events(tmp_path / n) if e["type"] == "step"] for n in ("plain", "again")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_where_even_measuring_does_not_fit_rows_go_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*args: Any) -> Cost:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory_plan, "training_cost", short)
    job = build_job(tiny_run(tmp_path, method="lora"))
    assert job.limits == TokenLimits(1, 1)
    assert any(note.startswith("the memory is too short to measure what a row takes") for note in job.notes)


def test_other_errors_are_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Cost:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(memory_plan, "training_cost", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        build_job(tiny_run(tmp_path, method="lora"))


def test_a_resume_has_the_cut_that_the_run_had_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, even where today's plan is another one."""
    settings: dict[str, Any] = {"budget": "16steps", "training": {"micro_batch_tokens": "auto", "checkpoint_steps": 5}}
    monkeypatch.setattr(memory_plan, "suits_training", lambda *args: 50)
    train(tiny_run(tmp_path, **settings), results_dir=tmp_path, name="whole")
    stop = StopRequest()
    listener = Listener(lambda e: e["step"] >= 8 and setattr(stop, "signal", signal.SIGTERM))
    run = tiny_run(tmp_path, **settings)
    assert train(run, results_dir=tmp_path, name="cut", reporter=listener, stop=stop).status == "stopped"
    monkeypatch.setattr(memory_plan, "suits_training", lambda *args: 9000)
    listener = Listener()
    assert train(None, results_dir=tmp_path, name="cut", resume=True, reporter=listener).status == "done"
    assert_same_weights(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert [e["memory"]["micro_batch_tokens"] for e in listener.events if e["type"] == "run"] == [50]


def test_a_resume_where_there_is_less_room_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = build_job(tiny_run(tmp_path))
    job.plan.limits.load_state_dict({"training": 4000, "evaluation": 100})
    plan = dataclasses.replace(job.plan, fit=TokenLimits(300, 200))
    assert plan.keep_within() == [
        "the run had micro-batches of 4,000 tokens, and 300 fit into the memory that is free now"
    ]
    assert plan.limits == TokenLimits(300, 100)
    assert plan.keep_within() == []


def test_this_machine_has_memory() -> None:
    assert 2**20 < free_bytes(CPU) < 2**50


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "[1]"])
@pytest.mark.parametrize("key", ["training.micro_batch_tokens", "evaluation.batch_tokens"])
def test_a_number_or_auto(key: str, value: str, tmp_path: Path) -> None:
    from fastpeft.config import ConfigError, load_run

    path = tmp_path / "run.yaml"
    tiny_run(tmp_path)
    with pytest.raises(ConfigError, match=rf"{key}: expected a whole number of at least 1, or auto, got"):
        load_run(path, [f"{key}={value}"])
    section, name = key.split(".")
    for good in (7, "auto"):
        assert getattr(getattr(load_run(path, [f"{key}={good}"]), section), name) == good


@pytest.mark.parametrize(("text", "value"), [("on", True), ("off", False), ("auto", "auto"), ("true", True)])
def test_on_off_or_auto(text: str, value: Any, tmp_path: Path) -> None:
    from fastpeft.config import load_run

    tiny_run(tmp_path)
    run = load_run(tmp_path / "run.yaml", [f"training.checkpoint_layers={text}"])
    assert run.training.checkpoint_layers is value or run.training.checkpoint_layers == value == "auto"
    assert TrainingConfig().checkpoint_layers == "auto"
    with pytest.raises(UserError, match=r"training.checkpoint_layers: expected on, off or auto, got 'never'"):
        load_run(tmp_path / "run.yaml", ["training.checkpoint_layers=never"])
