"""What every optimizer keeps to, and FlatAdamW against torch.optim.AdamW on separate parameters."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from fastpeft.config.schema import OptimizerConfig
from fastpeft.trainer import optim
from fastpeft.trainer.optim import FIRST_LOSS_SCALE
from tests.support.optimizers import CONFIGS, Model

every_optimizer = pytest.mark.parametrize("name", get_args(get_type_hints(OptimizerConfig)["name"]))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_torch_adamw_on_separate_parameters(config: OptimizerConfig, seed: int) -> None:
    model = Model(seed, config)
    start = [p.detach().double() for p in model.parameters]
    reference = [nn.Parameter(p.clone()) for p in start]
    cut = len(model.adapter)
    groups = [
        {"params": reference[:cut], "weight_decay": config.weight_decay},
        {"params": reference[cut:], "weight_decay": config.head_weight_decay},
    ]
    adamw = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)
    for step in range(30):
        lr = 0.01 * (1 - step / 40)
        gradients = model.set_gradients(scale=10.0 ** (step % 4 - 2))  # norms of 0.15 to 150: clipped at times only
        for parameter, gradient in zip(reference, gradients):
            parameter.grad = gradient
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(reference, config.max_grad_norm)
        adamw.param_groups[0]["lr"], adamw.param_groups[1]["lr"] = lr, lr * config.head_lr_ratio
        adamw.step()
        signals = model.step(lr)
        assert float(signals.grad_norm) == pytest.approx(float(norm), rel=1e-5)
        assert float(signals.skipped) == 0.0
    for parameter, expected, before in zip(model.parameters, reference, start):
        moved = (expected - before).norm()
        assert moved > 0.005
        # fp32 beside fp64, and clip_grad_norm_ adds 1e-6 to the norm that it divides by.
        assert (parameter.double() - expected).norm() < 2e-5 * moved + 1e-6 * expected.norm()


@every_optimizer
def test_head_moves_by_its_ratio(name: str, seed: int) -> None:
    decays = {"weight_decay": 0.0, "head_weight_decay": 0.0}
    config = OptimizerConfig(name=name, **decays, head_lr_ratio=3.0, max_grad_norm=0.0, eps=1e-12)
    model = Model(seed, config)
    before = model.flat.data.clone()
    model.set_gradients(1.0)
    model.step(1e-2)
    moved = (model.flat.data - before).abs()
    cut = model.flat.num_adapter
    # The first step of Adam is lr * sign(gradient); schedule-free, y is x is z after it.
    torch.testing.assert_close(moved[:cut], torch.full_like(moved[:cut], 1e-2), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved[cut:], torch.full_like(moved[cut:], 3e-2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["adapter", "head", "loss"])
@pytest.mark.parametrize("first", [True, False])
@every_optimizer
def test_what_is_not_finite_changes_no_bit(name: str, bad: float, where: str, first: bool, seed: int) -> None:
    model = Model(seed, OptimizerConfig(name=name))
    twin = Model(seed, OptimizerConfig(name=name))
    if not first:
        for each in (model, twin):
            each.set_gradients(1.0)
            each.step(1e-2)
    before = model.snapshot()
    model.set_gradients(1.0)
    if where != "loss":
        gradient = (model.adapter if where == "adapter" else model.head)[-1].grad
        gradient.view(-1)[int(torch.randint(gradient.numel(), (), generator=model.generator))] = bad
    signals = model.step(1e-2, loss=bad if where == "loss" else 0.7)
    assert float(signals.skipped) == 1.0
    after = model.snapshot()
    assert before.keys() <= after.keys()  # the very first step makes the moments
    for key, tensor in after.items():
        assert torch.equal(tensor, before.get(key, torch.zeros_like(tensor))), key
    # The next good step is the one that a run without the bad one takes.
    model.generator.manual_seed(seed)
    twin.generator.manual_seed(seed)
    for each in (model, twin):
        each.set_gradients(1.0)
        assert float(each.step(1e-2).skipped) == 0.0
    expected = twin.snapshot()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.snapshot().items())
    assert not torch.equal(model.flat.data, before["flat"])


@every_optimizer
def test_loss_scale_halves_after_an_overflow_and_doubles_after_good_steps(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "SCALE_GROWTH_STEPS", 4)
    model = Model(seed, OptimizerConfig(name=name), torch.float16)
    scales = []
    for good in (True, True, False, True, True, True, True, True, True, True, True, False):
        model.set_gradients(1.0)
        if not good:
            model.head[0].grad[0, 0] = float("inf")
        model.step(1e-3)
        scales.append(float(model.optimizer.loss_scale) / FIRST_LOSS_SCALE)
    assert scales == [1, 1, 0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 2, 1]


def test_loss_scale_stays_within_bounds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "SCALE_GROWTH_STEPS", 1)
    model = Model(seed, OptimizerConfig(), torch.float16)
    for _ in range(20):
        model.set_gradients(1.0)
        model.step(1e-3)
    assert float(model.optimizer.loss_scale) == 2.0**24
    for _ in range(40):
        model.set_gradients(float("nan"))
        model.step(1e-3)
    assert float(model.optimizer.loss_scale) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_fp16_is_scaled(dtype: torch.dtype) -> None:
    assert Model(0, OptimizerConfig(), dtype).optimizer.loss_scale is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_before", [0, 3, 5])
@every_optimizer
def test_state_round_trip_continues_bit_for_bit(name: str, dtype: torch.dtype, num_before: int, seed: int) -> None:
    config = dataclasses.replace(CONFIGS["two_groups"], name=name)
    model, twin = (Model(seed, config, dtype) for _ in range(2))
    for i in range(num_before):
        model.set_gradients(1.0 if i != 2 else float("nan"))  # the last one of three
        model.step(1e-2)
    twin.step(1e-2, loss=float("nan"))  # what a load replaces
    twin.optimizer.load_state({name: tensor.clone() for name, tensor in model.optimizer.state().items()})
    twin.flat.data.copy_(model.flat.data)
    twin.generator.set_state(model.generator.get_state())
    for _ in range(5):
        for each in (model, twin):
            each.set_gradients(1.0)
            each.step(1e-2)
    assert torch.equal(model.flat.data, twin.flat.data)
    ours, theirs = model.optimizer.state(), twin.optimizer.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@every_optimizer
def test_an_adapter_reads_the_clipped_gradient_after_the_step(name: str, seed: int) -> None:
    model = Model(seed, OptimizerConfig(name=name, max_grad_norm=0.5))
    model.set_gradients(1.0)
    raw = model.flat.grad.double()
    model.step(1e-2)
    torch.testing.assert_close(model.flat.grad.double(), raw * (0.5 / raw.norm()), rtol=1e-5, atol=0)
