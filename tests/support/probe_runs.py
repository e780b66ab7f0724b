"""A schedule that reads everything that can be measured, and runs small enough to be trained with it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fastpeft.config import RunConfig, load_run
from fastpeft.config.schedules import SCHEDULES, ScheduleConfig
from fastpeft.data.batches import micro_batches
from fastpeft.schedules import Schedule
from fastpeft.signals import Blocks, Measured, Need, Rates, Signals
from fastpeft.trainer import StopRequest
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.step import train_step
from tests.support.tiny import make_causal_lm
from tests.support.tiny_runs import tiny_run

CURVATURE = (Need.SECANT, Need.PLAIN_SECANT, Need.PRODUCT)
PRODUCT_STEP = 17
"""The first step with an exact product."""
STAND_IN = "rex"
"""The schedule whose name the tests' own take."""


def all_but(*kinds: Need) -> frozenset[Need]:
    return frozenset(Need) - set(kinds)


def needs_with(curvature: Need) -> frozenset[Need]:
    """Everything, with one kind of curvature."""
    return all_but(*CURVATURE) | {curvature}


class Recorder(Schedule):
    """Keeps what it is given; its rates go up and down, and each matrix has its own."""

    wanted: frozenset[Need] = frozenset()

    def __init__(self, config: ScheduleConfig, peak_lr: float, blocks: Blocks | None = None, **more: Any) -> None:
        super().__init__(config, peak_lr, blocks, **more)
        self.seen: list[Measured | None] = []
        self.emitted: list[Rates] = []

    @property
    def needs(self) -> frozenset[Need]:
        return self.wanted

    def rates(self, measured: Measured | None, progress: float) -> Rates:
        self.seen.append(measured)
        self.emitted.append(self.next_rates(measured))
        return self.emitted[-1]

    def next_rates(self, measured: Measured | None) -> Rates:
        step = len(self.seen)
        multiplier_K = 1 + 0.5 * np.sin(step + np.arange(len(self.blocks)))
        return Rates(self.peak_lr * (1 + 0.3 * np.cos(step)), multiplier_K)


class ReadsAll(Recorder):
    """Every figure that it reads moves the rates, so that a figure that is not the same gives other weights."""

    def __init__(self, config: ScheduleConfig, peak_lr: float, blocks: Blocks | None = None, **more: Any) -> None:
        super().__init__(config, peak_lr, blocks, **more)
        self.mixed = 0.0
        self.found: set[str] = set()

    def next_rates(self, measured: Measured | None) -> Rates:
        for name, values in figures(measured).items():
            self.found.add(name)
            # In [-1, 1], and no two figures weigh the same.
            self.mixed = 0.9 * self.mixed + 0.1 * float(np.sin(np.log1p(np.abs(values)).sum() + len(name)))
        multiplier_K = 1 + 0.2 * np.sin(self.mixed * np.arange(1, 1 + len(self.blocks)))
        return Rates(self.peak_lr * (1 + 0.5 * self.mixed), multiplier_K)

    def state_dict(self) -> dict[str, Any]:
        return {"mixed": self.mixed, "found": sorted(self.found)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixed, self.found = state["mixed"], set(state["found"])


def figures(measured: Measured | None) -> dict[str, np.ndarray]:
    """Every number in it that a resumed run can repeat: all but the clock's."""
    if measured is None:
        return {}
    values = {k: v for k, v in vars(measured).items() if k not in ("blocks", "secant", "elapsed_s")}
    for part in (measured.blocks, measured.secant):
        values |= {} if part is None else vars(part)
    return {name: np.atleast_1d(np.asarray(v, dtype=float)) for name, v in values.items() if v is not None}


def put_in(monkeypatch: pytest.MonkeyPatch, kind: type[Schedule], wanted: frozenset[Need]) -> None:
    """Runs of `schedule.name=rex` train with a `kind` that needs `wanted`."""
    monkeypatch.setattr(kind, "wanted", wanted)
    load = SCHEDULES.load
    monkeypatch.setattr(SCHEDULES, "load", lambda name: kind if name == STAND_IN else load(name))


def problem_run(folder: Path, **settings: Any) -> RunConfig:
    """Sums of two numbers for a random Qwen3, all of whose linear layers are adapted. `settings` as in load_run."""
    path = folder / "problems.yaml"
    if not path.is_file():
        make_causal_lm(folder / "lm")
        rng = random.Random(0)
        (folder / "sums").mkdir()
        rows = []
        for _ in range(64):
            a, b = rng.randrange(100), rng.randrange(10 ** rng.randrange(1, 4))
            rows.append({"question": f"{a}+{b}=", "answer": f"{a + b} #### {a + b}"})
        (folder / "sums" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "run_id": "problems",
            "method": "lora",
            "model": {"name": str(folder / "lm")},
            "adapter": {"target_modules": "all-linear", "rank": 4},
            "schedule": {"name": STAND_IN, "warmup_steps": 0},
            "dataset": {
                "task": "word-problems", "path": str(folder / "sums"), "held_out": 8, "prompt": "{question}",
                "max_length": 48,
            },
            "training": {
                "learning_rate": 1e-2, "batch_size": 8, "checkpoint_steps": 100, "precision": "fp32", "threads": 1,
            },
            "evaluation": {"every": "end", "max_new_tokens": 4},
            "budget": "21steps",
        }  # fmt: skip
        path.write_text(yaml.safe_dump(values))
    return load_run(path, settings)


def pairs_run(folder: Path, **settings: Any) -> RunConfig:
    """The encoder's run, with weight decay and a faster head; `settings` as in tiny_run."""
    optimizer = {"weight_decay": 0.3, "head_weight_decay": 0.7, "head_lr_ratio": 3.0, "max_grad_norm": 0.5}
    values = {"method": "lora", "schedule": {"name": STAND_IN, "warmup_steps": 0}, "optimizer": optimizer}
    return tiny_run(folder, **(values | settings))


class Steps:
    """Takes a job's steps one by one, and keeps what they went through, in fp64."""

    def __init__(self, run: RunConfig | Job, bad: tuple[int, ...] = ()) -> None:
        """`bad`: numbers of steps whose loss is not finite."""
        self.job = build_job(run) if isinstance(run, RunConfig) else run
        self.probes = self.job.probes
        self.bad = bad
        self.thetas: list[torch.Tensor] = []
        """Before each step, and after the last."""
        self.grads: list[torch.Tensor] = []
        self.moments: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Bias-corrected, after each step."""
        self.measured: list[Measured] = []
        self.signals: list[Signals] = []

    def batches(self, number: int, max_tokens: int | None = None) -> tuple[list, int]:
        job, rows = self.job, self.job.batches.rows(number - 1)
        parts = micro_batches(job.batches.encoded, rows, max_tokens or job.limits.training)
        return [job.task.collate(part, job.device) for part in parts], job.task.num_items(rows)

    def take(self, count: int, max_tokens: int | None = None) -> Steps:
        for number in range(len(self.grads) + 1, len(self.grads) + count + 1):
            self.step(number, max_tokens)
        return self

    def step(self, number: int, max_tokens: int | None) -> None:
        job, flat = self.job, self.job.adapter.flat
        self.thetas.append(flat.data.double())
        original = job.optimizer.clip_guard_and_update

        def watched(*args: Any) -> None:
            self.grads.append(flat.grad.double())
            original(*args)

        def loss(*args: Any) -> Any:
            found = job.task.loss(*args)
            if number in self.bad:
                found.loss = found.loss * float("nan")
            return found

        job.optimizer.clip_guard_and_update = watched
        self.probes.begin(number, number / 100, float(number))
        step = job.adapter, job.schedule, job.optimizer, loss, *self.batches(number, max_tokens), number / 100
        self.signals.append(train_step(*step, self.probes)[0])
        del job.optimizer.clip_guard_and_update
        state = job.optimizer.state_dict()
        count, config = float(state["step"]), job.run.optimizer
        self.moments.append(
            tuple(
                state[name].double() / (1 - beta ** max(count, 1))
                for name, beta in (("exp_avg", config.beta1), ("exp_avg_sq", config.beta2))
            )
        )

    def finish(self) -> Steps:
        """The last step's figures too."""
        self.thetas.append(self.job.adapter.flat.data.double())
        self.measured = [m for m in (*self.job.schedule.seen, self.probes.take_measured()) if m is not None]
        return self

    # ---- by the number of a step, from 1 ----

    def change(self, number: int) -> torch.Tensor:
        return self.thetas[number] - self.thetas[number - 1]

    def grad(self, number: int) -> torch.Tensor:
        return self.grads[number - 1]

    def sums(self, flat: torch.Tensor) -> np.ndarray:
        return self.job.adapter.flat.layout.unit_sums(flat).numpy()

    def rate(self, number: int) -> np.ndarray:
        """Of each unit."""
        layout, rates = self.job.adapter.flat.layout, self.job.schedule.emitted[number - 1]
        rate_U = np.full(layout.num_units, rates.lr)
        rate_U[: layout.num_matrices] *= rates.multiplier_K
        for unit, (start, _) in enumerate(layout.others, start=layout.num_matrices):
            rate_U[unit] *= self.job.run.optimizer.head_lr_ratio if start >= layout.num_adapter else 1.0
        return rate_U


def assert_near(got: np.ndarray, want: np.ndarray, scale: np.ndarray | float, rtol: float = 1e-5) -> None:
    """Within rtol of `scale`, of which cancellation may leave little."""
    assert got.dtype == np.float64
    assert got.shape == want.shape
    assert np.abs(want).max() > 0
    assert (np.abs(got - want) <= rtol * (np.abs(want) + scale) + 1e-30).all()


class StopAfter(StopRequest):
    """Asks to stop once so many steps have been taken."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def __call__(self) -> bool:
        return self.left <= 0

    def counting(self, original: Any) -> Any:
        def counted(*args: Any) -> None:
            original(*args)
            self.left -= 1

        return counted
