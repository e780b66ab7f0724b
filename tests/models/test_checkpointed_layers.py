"""Layers that are computed again in the backward pass: the same losses and gradients, and less memory."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastpeft.config.methods import METHODS
from fastpeft.models.checkpointed_layers import blocks_of, checkpoint_layers
from fastpeft.trainer import StopRequest, train
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.peak_memory import peak_bytes
from fastpeft.trainer.step import forward_backward
from tests.support.every_kind import ALL_KINDS, run_of_kind
from tests.support.tiers import some
from tests.support.tiny_runs import Listener, assert_same_weights, strict_events, tiny_run, weights

SETTINGS: dict[str, Any] = {"adapter": {"dropout": 0.1}, "model": {"check": False}}


def first_pass(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient, with dropout."""
    torch.manual_seed(3)
    rows = job.batches.rows(0)
    batch = job.task.collate(rows, job.device)
    signals = forward_backward(job.adapter, job.task.loss, [batch], job.task.num_items(rows))
    return signals.loss, job.adapter.flat.grad.clone()


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_loss_and_gradient_are_the_same(kind: str, tmp_path: Path, fewer_rows: None) -> None:
    found = []
    for setting in (False, True):
        job = build_job(run_of_kind(tmp_path, kind, **SETTINGS, training={"checkpoint_layers": setting}))
        assert job.plan.checkpointed == setting
        found.append(first_pass(job))
    (loss, gradient), (again, other) = found
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    assert float((gradient - other).norm()) <= 1e-5 * float(gradient.norm())


@pytest.mark.parametrize("method", some(METHODS.names, (METHODS.names.index("iw_lora"),)))
def test_runs_of_every_method_are_the_same(method: str, tmp_path: Path) -> None:
    for setting in (False, True):
        lifted = {key: {"max_extra_flops": 100.0} for key in ("unihyperlora", "sat_lora")}
        run = tiny_run(tmp_path, method=method, budget="6steps", training={"checkpoint_layers": setting}, **lifted)
        train(run, results_dir=tmp_path, name=str(setting))
    losses = [[e["loss"] for e in strict_events(tmp_path / n) if e["type"] == "step"] for n in ("False", "True")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_resume_is_the_run_to_the_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"budget": "14steps", "training": {"checkpoint_layers": True, "checkpoint_steps": 4}}
    train(tiny_run(tmp_path, **settings), results_dir=tmp_path, name="whole")
    stop = StopRequest()
    listener = Listener(lambda e: e["step"] >= 7 and setattr(stop, "signal", signal.SIGTERM))
    train(tiny_run(tmp_path, **settings), results_dir=tmp_path, name="cut", reporter=listener, stop=stop)
    train(None, results_dir=tmp_path, name="cut", resume=True)
    assert_same_weights(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.second(self.first(x).tanh())


class Model(nn.Module):
    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x


def test_of_all_blocks_the_inputs_are_held_and_of_one_the_rest() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(512, 64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def peak() -> int:
        return peak_bytes(x.device, lambda: model(x).sum().backward())

    plain = peak()
    assert checkpoint_layers(model) == 6
    assert peak() < 0.5 * plain


def test_without_gradients_or_training_nothing_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.models import checkpointed_layers

    calls: list[Any] = []
    original = checkpointed_layers.checkpoint
    monkeypatch.setattr(checkpointed_layers, "checkpoint", lambda *a, **k: calls.append(a) or original(*a, **k))
    model, x = Model(2), torch.randn(3, 64)
    plain = model(x)
    checkpoint_layers(model)
    model.eval()
    assert torch.equal(model(x), plain)
    with torch.no_grad():
        assert torch.equal(model.train()(x), plain)
    assert not calls
    assert torch.equal(model(x), plain)
    assert len(calls) == 2


def test_what_wrapped_a_block_before_stays_inside() -> None:
    model, x, calls = Model(1), torch.randn(3, 64, requires_grad=True), []
    block = model.blocks[0]
    inner = block.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return inner(*args, **kwargs)

    block.forward = patched
    checkpoint_layers(model)
    model(x).sum().backward()
    assert calls == [True, True]


def test_a_model_without_blocks_is_left_alone() -> None:
    assert checkpoint_layers(nn.Linear(2, 2)) == 0
    assert blocks_of(nn.Linear(2, 2)) == []


def test_it_takes_less_in_a_run(tmp_path: Path) -> None:
    peaks = []
    for setting in (False, True):
        training = {"checkpoint_layers": setting, "batch_size": 32}
        # of two layers, the last of which keeps one token's row where layers are fast, there is nothing to save
        run = tiny_run(tmp_path, method="lora", training=training, model={"fast_layers": False})
        job = build_job(run)
        batch = job.task.collate(np.argsort(job.task.train.lengths)[-32:], job.device)
        peaks.append(peak_bytes(job.device, lambda j=job, b=batch: forward_backward(j.adapter, j.task.loss, [b], 32)))
        assert job.plan.checkpointed == setting
    assert peaks[1] < 0.8 * peaks[0]
