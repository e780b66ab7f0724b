"""Schedule-free AdamW against the paper's equations in fp64, and runs that evaluate and keep the average."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.config import ConfigError, RunConfig
from fastpeft.config.optimizers import OptimizerConfig
from fastpeft.errors import UserError
from fastpeft.signals import Rates, Signals
from fastpeft.tasks.sequences import task as task_module
from fastpeft.trainer import StopRequest, train
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.checkpoint_files import newest_checkpoint
from tests.support.optimizers import CONFIGS, Model
from tests.support.tiers import some
from tests.support.tiny_runs import (
    Listener,
    assert_same_outcome,
    assert_same_weights,
    peft_accuracy,
    strict_events,
    tiny_run,
    weights,
)

# ---- the update ------------------------------------------------------------------------------


class Reference:
    """arXiv:2405.15682, section 2 and algorithm 1, on one fp64 vector, x, y and z each by itself.

    One departure, the package's: Adam's bias correction divides v and is not part of the rate, so that the weights of
    the average, the squares of the rate, do not rise with it.
    """

    def __init__(self, start: torch.Tensor, config: OptimizerConfig, decay: float) -> None:
        self.x, self.y, self.z = start.clone(), start.clone(), start.clone()
        self.v = torch.zeros_like(start)
        self.config, self.decay = config, decay
        self.rates: list[float] = []

    def step(self, gradient: torch.Tensor, lr: float) -> None:
        beta1, beta2 = self.config.beta1, self.config.beta2
        self.rates.append(max([lr, *self.rates]))
        weights = [rate**2 for rate in self.rates]
        c = weights[-1] / math.fsum(weights)
        self.v = beta2 * self.v + (1 - beta2) * gradient**2
        v_hat = self.v / (1 - beta2 ** len(weights))
        self.z = self.z - lr * (gradient / (v_hat.sqrt() + self.config.eps) + self.decay * self.y)
        self.x = (1 - c) * self.x + c * self.z
        self.y = (1 - beta1) * self.z + beta1 * self.x


def warmed_up(step: int) -> float:
    return 0.01 * min(1.0, (step + 1) / 8)


def schedule_free(**settings: float) -> OptimizerConfig:
    return OptimizerConfig(name="schedule_free", **settings)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_the_papers_equations(config: OptimizerConfig, seed: int) -> None:
    config = schedule_free(**{k: v for k, v in vars(config).items() if k != "name"})
    model = Model(seed, config)
    start, cut = model.flat.data.double(), model.flat.num_adapter
    parts = slice(0, cut), slice(cut, None)
    references = [
        Reference(start[part], config, decay)
        for part, decay in zip(parts, (config.weight_decay, config.head_weight_decay))
    ]
    for step in range(30):
        lr = warmed_up(step)
        model.set_gradients(scale=10.0 ** (step % 4 - 2))
        gradient = model.flat.grad.double()
        norm = gradient.norm()
        if config.max_grad_norm:
            gradient *= (config.max_grad_norm / norm).clamp_max(1.0)
        for reference, part, ratio in zip(references, parts, (1.0, config.head_lr_ratio)):
            reference.step(gradient[part], lr * ratio)
        signals = model.step(lr)
        assert float(signals.grad_norm) == pytest.approx(float(norm), rel=1e-5)
        assert float(signals.skipped) == 0.0

    def assert_are(found: torch.Tensor, name: str) -> None:
        for reference, part in zip(references, parts):
            expected = getattr(reference, name)
            moved = (expected - start[part]).norm()
            assert moved > 0.005
            assert (found[part].double() - expected).norm() < 2e-5 * moved + 1e-6 * expected.norm(), name

    assert_are(model.flat.data, "y")
    assert_are(model.optimizer.state_dict()["z"], "z")
    with model.optimizer.averaged():
        assert_are(model.flat.data, "x")
    assert (references[0].x - references[0].y).norm() > 1e-3  # so that one is not taken for the other


def test_steps_of_the_warm_up_weigh_the_square_of_their_rate(seed: int) -> None:
    """With gradients whose sign stays, every step moves z by its rate: the average is known by hand."""
    model = Model(seed, schedule_free(weight_decay=0.0, head_weight_decay=0.0, max_grad_norm=0.0, eps=1e-12))
    start = model.flat.data.double()
    rates = [0.01, 0.02, 0.04, 0.04]
    for lr in rates:
        model.flat.grad.fill_(-1.0)
        model.optimizer.clip_guard_and_update(Signals(loss=torch.tensor(0.0), num_tokens=1), Rates(lr))
    places = torch.tensor([0.01, 0.03, 0.07, 0.11])  # of z, from the start
    squares = torch.tensor(rates).square()
    expected = float((places * squares).sum() / squares.sum())
    with model.optimizer.averaged():
        moved = model.flat.data.double() - start
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_the_weights_come_back_bit_for_bit(num_steps: int, seed: int) -> None:
    model, twin = (Model(seed, schedule_free()) for _ in range(2))
    for step in range(num_steps + 3):
        if step >= num_steps:
            before = model.snapshot()
            with model.optimizer.averaged():
                inside = model.flat.data.clone()
            assert torch.equal(inside, before["flat"]) == (step < 2)  # after none or one, x is y is z
            with pytest.raises(KeyError), model.optimizer.averaged():
                raise KeyError
            after = model.snapshot()
            assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
        for each in (model, twin):
            each.set_gradients(1.0)
            each.step(0.3)
    assert torch.equal(model.flat.data, twin.flat.data)


def test_rates_per_matrix_are_refused(seed: int) -> None:
    model = Model(seed, schedule_free())
    model.set_gradients(1.0)
    with pytest.raises(ValueError, match=r"no rates per matrix: use schedule\.name constant, or adamw"):
        model.optimizer.clip_guard_and_update(Signals(torch.tensor(0.1), 1), Rates(0.1, torch.ones(3)))


def test_ends_nearer_to_the_minimum_than_adamw_at_the_same_constant_rate(seed: int) -> None:
    """A noisy quadratic: what AdamW's last iterate pays for not decaying, the average does not."""
    distances = {}
    for name in ("adamw", "schedule_free"):
        model = Model(seed, OptimizerConfig(name=name, weight_decay=0.0, head_weight_decay=0.0, max_grad_norm=0.0))
        target = torch.randn(model.flat.data.shape, generator=model.generator)
        for _ in range(1200):
            noise = torch.randn(target.shape, generator=model.generator)
            model.flat.grad.copy_(model.flat.data - target + noise)
            model.step(0.03)
        with model.optimizer.averaged():
            distances[name] = float((model.flat.data - target).square().mean())
    assert distances["schedule_free"] < 0.5 * distances["adamw"] < 0.05, distances


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(UserError, match=r"schedule_free needs the package .*: pip install schedulefree$") as caught:
        Model(0, schedule_free())
    assert caught.value.exit_code == 2
    Model(0, OptimizerConfig())


# ---- settings --------------------------------------------------------------------------------


def free_run(files: Path, **sections) -> RunConfig:
    optimizer = {"name": "schedule_free"} | sections.pop("optimizer", {})
    schedule = {"name": "constant"} | sections.pop("schedule", {})
    return tiny_run(files, optimizer=optimizer, schedule=schedule, **sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"schedule": {"name": "linear"}}, r"schedule\.name: linear does not go .* set schedule\.name=constant"),
        ({"optimizer": {"beta1": 0.0}}, r"optimizer\.beta1: .* expected 0\.1 or more, got 0\.0"),
        ({"method": "adalora"}, r"method: adalora prunes .* set optimizer\.name=adamw"),
        ({"regulariser": {"decoupled": True}}, r"regulariser\.decoupled: .* set regulariser\.decoupled=false"),
        ({"training": {"learning_rate": 1e200}}, r"training\.learning_rate: schedule_free computes in fp32"),
        ({"optimizer": {"head_lr_ratio": 1e60}}, r"training\.learning_rate: .*the head's rate too"),
        ({"optimizer": {"eps": 1e60}}, r"optimizer\.eps: schedule_free computes in fp32; expected 1e\+30 or less"),
        ({"optimizer": {"head_weight_decay": 1e60}}, r"optimizer\.head_weight_decay: schedule_free computes"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_contradict_it_are_refused_with_the_fix(sections: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        free_run(tmp_path, **sections)
    tiny_run(tmp_path, **sections)  # AdamW takes them


# ---- runs ------------------------------------------------------------------------------------


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Job]]:
    """Of every run that is trained."""
    built: list[Job] = []

    def build(*args: Any) -> Job:
        built.append(build_job(*args))
        return built[-1]

    monkeypatch.setattr("fastpeft.trainer.run.build_job", build)
    return built


def test_what_is_evaluated_and_saved_is_the_average(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated, answer_rows = [], task_module.answer_rows

    def watched(*args):
        evaluated.append(jobs[-1].adapter.flat.data.clone())
        return answer_rows(*args)

    monkeypatch.setattr(task_module, "answer_rows", watched)
    run = free_run(tmp_path, budget="150steps", evaluation={"every": "25steps"}, method="lora")
    result = train(run, results_dir=tmp_path, name="r")
    job = jobs[0]
    y, z = job.adapter.flat.data.double(), job.optimizer.state_dict()["z"].double()
    x = (y - (1 - run.optimizer.beta1) * z) / run.optimizer.beta1
    assert (x - y).norm() > 1e-3 * x.norm()
    torch.testing.assert_close(evaluated[-1].double(), x, rtol=1e-5, atol=1e-6)

    best = evaluated[result.best["step"] // 25 - 1]
    for folder, flat, value in (
        ("adapter", evaluated[-1], result.metric["value"]),
        ("adapter_best", best, result.best["value"]),
    ):
        saved = torch.cat([tensor.flatten() for tensor in weights(tmp_path / "r", folder).values()])
        assert torch.equal(saved.sort().values, flat.sort().values), folder
        assert peft_accuracy(tmp_path, tmp_path / "r" / folder) == pytest.approx(value, abs=1e-9)
    assert result.best["value"] > 0.9


def test_evaluations_change_no_bit_of_the_training(tmp_path: Path, seed: int) -> None:
    losses = {}
    for every in ("3steps", "end"):
        run = free_run(tmp_path, budget="17steps", evaluation={"every": every}, training={"seed": seed})
        train(run, results_dir=tmp_path, name=every)
        events = strict_events(tmp_path / every)
        losses[every] = [(e["loss"], e["grad_norm"]) for e in events if e["type"] == "step"]
        assert sum(e["type"] == "eval" for e in events) == {"3steps": 6, "end": 1}[every]
    assert losses["3steps"] == losses["end"]
    assert_same_weights(weights(tmp_path / "3steps"), weights(tmp_path / "end"))


@pytest.mark.parametrize(("what", "step"), some([("step", 13), ("checkpoint", 9), ("eval", 20)], unpack=True))
def test_a_resume_ends_as_an_unbroken_run(what: str, step: int, tmp_path: Path, seed: int) -> None:
    run = free_run(tmp_path, budget="30steps", training={"seed": seed})
    stop = StopRequest()
    listener = Listener(lambda e: (e["type"], e["step"]) == (what, step) and setattr(stop, "signal", signal.SIGTERM))
    assert train(run, results_dir=tmp_path, name="r", reporter=listener, stop=stop).status == "stopped"
    checkpoint, _ = newest_checkpoint(tmp_path / "r" / "checkpoints")
    assert {"z", "exp_avg_sq", "counters"} <= checkpoint.parts["optimizer"].keys()
    stopped = torch.cat([tensor.flatten() for tensor in weights(tmp_path / "r").values()])
    trained_at = checkpoint.parts["parameters"]["data"]
    assert not torch.equal(stopped.sort().values, trained_at.sort().values)  # x there, y here
    result = train(None, results_dir=tmp_path, name="r", resume=True)
    expected = train(run, results_dir=tmp_path, name="unbroken")
    assert_same_outcome(result, expected)
    for adapter in ("adapter", "adapter_best"):
        assert_same_weights(weights(tmp_path / "r", adapter), weights(tmp_path / "unbroken", adapter))
