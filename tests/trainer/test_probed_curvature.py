"""Curvature along steps: where the Hessian is known, and against autograd's exact product; what it leaves as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastpeft.adapters.flat import FlatParameters
from fastpeft.config.optimizers import OptimizerConfig
from fastpeft.models.fast.swaps import Fast
from fastpeft.models.layers import is_fused
from fastpeft.signals import Measured, Need, Rates
from fastpeft.tasks.base import BatchLoss
from fastpeft.trainer.build import build_job
from fastpeft.trainer.optim import make_optimizer
from fastpeft.trainer.probes.hooks import Probes
from fastpeft.trainer.step import train_step
from tests.support.flat_model import low_rank_block
from tests.support.probe_runs import (
    CURVATURE,
    PRODUCT_STEP,
    Recorder,
    Steps,
    assert_near,
    pairs_run,
    problem_run,
    put_in,
)
from tests.support.tiers import some

SHAPES = ((4, 10, 6), (4, 10, 6), (2, 7, 9))
HEAD_SHAPES = ((3, 6), (3,))
HESSIAN_U = (0.5, 2.0, 7.0, 1.0, 3.0)


class Quadratic:
    """sum_i h_i ||theta_i||^2 / 2 over the units i, plus a linear term that each batch draws anew."""

    def __init__(self, seed: int, needs: frozenset[Need], noise: float) -> None:
        self.random, self.noise = torch.Generator().manual_seed(seed), noise
        blocks = [
            low_rank_block(i, self.parameter(rank, num_in), self.parameter(num_out, rank))
            for i, (rank, num_in, num_out) in enumerate(SHAPES)
        ]
        self.flat = FlatParameters(blocks, [self.parameter(*shape) for shape in HEAD_SHAPES])
        self.model = None
        self.thetas: list[torch.Tensor] = []
        self.optimizer = make_optimizer(self.flat, OptimizerConfig(max_grad_norm=0.0), torch.float32)
        self.probes = Probes(needs, self, self.optimizer)
        hessian_K = torch.tensor(HESSIAN_U[: len(SHAPES)])
        self.hessian = self.flat.layout.spread(hessian_K, 0.0)
        for (start, size), value in zip(self.flat.layout.others, HESSIAN_U[len(SHAPES) :]):
            self.hessian[start : start + size] = value

    def discard_pass(self) -> None:
        """Nothing is kept from pass to pass."""

    def parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=self.random))

    def after_backward(self, *args: object) -> None: ...

    def after_step(self, *args: object) -> None: ...

    def loss(self, model: None, batch: SimpleNamespace, num_items: int, needs: frozenset[Need]) -> BatchLoss:
        theta = self.flat.data.clone().requires_grad_(True)
        theta.register_hook(self.keep)
        return BatchLoss((self.hessian * theta.square() / 2).sum() + (batch.draw * theta).sum())

    def keep(self, grad: torch.Tensor) -> None:
        self.flat.grad.add_(grad)

    def train(self, num_steps: int) -> list[Measured]:
        measured: list[Measured] = []

        def rates(found: Measured, progress: float) -> Rates:
            measured.append(found)
            return Rates(0.01, np.array([0.5, 1.0, 2.0]))

        schedule = SimpleNamespace(rates=rates)
        for step in range(1, num_steps + 1):
            draw = self.noise * torch.randn(len(self.flat.data), generator=self.random)
            batch = SimpleNamespace(draw=draw, rows=None, num_tokens=1, counts=True)
            self.probes.begin(step, 0.0, 0.0)
            self.thetas.append(self.flat.data.double())
            train_step(self, schedule, self.optimizer, self.loss, [batch], 1, 0.0, self.probes)
        return [*measured[1:], self.probes.take_measured()]

    def dots(self, step: int, other: int) -> np.ndarray:
        """<d_step, d_other> of each unit."""
        changes = [self.thetas[number] - self.thetas[number - 1] for number in (step, other)]
        return self.flat.layout.unit_sums(changes[0] * changes[1]).numpy()


@pytest.mark.parametrize("kind", CURVATURE)
def test_a_quadratic_has_the_curvature_of_its_hessian(kind: Need, seed: int) -> None:
    model = Quadratic(seed, frozenset({kind}), noise=0.0)
    found = model.train(PRODUCT_STEP)[-1].secant
    along = {Need.SECANT: PRODUCT_STEP - 2}.get(kind, PRODUCT_STEP - 1)
    dots_U = model.dots(PRODUCT_STEP - 1, along)
    np.testing.assert_allclose(found.change_U, HESSIAN_U * dots_U, rtol=3e-4, atol=3e-4 * np.abs(dots_U).max())


def test_noise_of_the_batches_does_not_reach_the_product(seed: int) -> None:
    """It is in the secants: one noisy gradient minus another."""
    ratios = {}
    for kind in (Need.PRODUCT, Need.PLAIN_SECANT):
        model = Quadratic(seed, frozenset({kind}), noise=30.0)
        found = model.train(PRODUCT_STEP)[-1].secant
        ratios[kind] = found.change_U / model.dots(PRODUCT_STEP - 1, PRODUCT_STEP - 1) / HESSIAN_U
    np.testing.assert_allclose(ratios[Need.PRODUCT], 1, rtol=1e-2)
    assert np.abs(ratios[Need.PLAIN_SECANT] - 1).max() > 1


# ---- against autograd ----------------------------------------------------------------------


def without_dropout(folder: Path) -> None:
    path = folder / "model" / "config.json"
    settings = json.loads(path.read_text()) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path.write_text(json.dumps(settings))


def exact_product(run: Steps, step: int) -> np.ndarray:
    """d^T H d of each unit in fp64, by two passes of autograd through PEFT's own layers; d led to this step."""
    job, flat = run.job, run.job.adapter.flat
    trained = [p for p in job.adapter.model.parameters() if p.requires_grad]
    places = [p.data.storage_offset() for p in trained]
    model = copy.deepcopy(job.adapter.model).double()
    model.set_attn_implementation("eager")
    for module in model.modules():
        module._forward_pre_hooks.clear()  # the head's cast to fp32
        if is_fused(module):
            module.__class__ = type(module).__mro__[2]
        elif isinstance(module, Fast):
            module.__class__ = type(module).__bases__[1]  # transformers' own
    parameters = [p for p in model.parameters() if p.requires_grad]
    theta, change = run.thetas[step - 1], run.change(step - 1)

    def parts(values: torch.Tensor) -> list[torch.Tensor]:
        return [values[at : at + p.numel()].view(p.shape) for at, p in zip(places, parameters)]

    for parameter, value in zip(parameters, parts(theta)):
        parameter.data.copy_(value)
    (batch,), num_items = run.batches(step)
    loss = nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels, reduction="sum") / num_items
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, parts(change)))
    along = torch.zeros_like(theta)
    for at, parameter, value in zip(places, parameters, torch.autograd.grad(slope, parameters)):
        along[at : at + parameter.numel()] = value.flatten()
    assert flat.data.shape == along.shape
    return run.sums(along * change)


def test_product_is_autograds_within_a_thousandth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, Recorder, frozenset({Need.PRODUCT}))
    settings = {"adapter": {"dropout": 0.0}, "training": {"learning_rate": 1e-3}}
    pairs_run(tmp_path)
    without_dropout(tmp_path)
    run = Steps(pairs_run(tmp_path, **settings)).take(2 * 16 + 2).finish()
    steps = [m.step for m in run.measured if m.secant is not None]
    assert steps == [PRODUCT_STEP, PRODUCT_STEP + 16]
    for step in steps:
        found, want_U = run.measured[step - 1].secant, exact_product(run, step)
        assert_near(found.change_U, want_U, np.abs(want_U).max(), 1e-3)
        last = run.change(step - 1)
        assert_near(found.square_U, run.sums(last.square() * run.moments[step - 2][1].sqrt()), 0)


# ---- what a product leaves as it was -------------------------------------------------------


@pytest.mark.parametrize("task", some(["pairs", "problems"]))
@pytest.mark.parametrize("kind", CURVATURE)
def test_measuring_curvature_changes_no_bit_of_the_training(
    kind: Need, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: its random numbers, and so the passes behind a product, are those that they would have been."""
    config = pairs_run(tmp_path) if task == "pairs" else problem_run(tmp_path, **{"adapter.dropout": 0.1})
    ends = []
    for needs in (frozenset(), frozenset({kind})):
        put_in(monkeypatch, Recorder, needs)
        run = Steps(config).take(PRODUCT_STEP + 1)
        ends.append((run, torch.get_rng_state(), run.job.optimizer.state_dict()))
    (bare, *state), (measuring, *other) = ends
    assert all(torch.equal(a, b) for a, b in zip(bare.thetas, measuring.thetas))
    assert all(torch.equal(a, b) for a, b in zip(bare.grads, measuring.grads))
    assert all(float(a.loss) == float(b.loss) for a, b in zip(bare.signals, measuring.signals))
    assert torch.equal(state[0], other[0])
    assert all(torch.equal(value, other[1][name]) for name, value in state[1].items())


def test_a_product_that_fails_leaves_the_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in its second pass: the step is tried again, from where it was."""
    put_in(monkeypatch, Recorder, frozenset({Need.PRODUCT}))
    run = Steps(pairs_run(tmp_path)).take(PRODUCT_STEP - 1)
    before = run.job.adapter.flat.data.clone()
    calls = []
    original = run.job.task.loss

    def fails(*args: object) -> BatchLoss:
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return original(*args)

    monkeypatch.setattr(run.job.task, "loss", fails)
    with pytest.raises(torch.OutOfMemoryError):
        run.take(1)
    assert torch.equal(run.job.adapter.flat.data, before)


def test_two_kinds_of_curvature_are_refused(tmp_path: Path) -> None:
    job = build_job(pairs_run(tmp_path))
    with pytest.raises(ValueError, match="one kind of curvature"):
        Probes({Need.SECANT, Need.PRODUCT}, job.adapter, job.optimizer)


def test_an_optimizer_without_moments_is_refused(tmp_path: Path) -> None:
    job = build_job(pairs_run(tmp_path, optimizer={"name": "schedule_free"}, schedule={"name": "constant"}))
    with pytest.raises(ValueError, match="schedule_free has no second moment"):
        Probes({Need.SECANT}, job.adapter, job.optimizer)
