"""IW-LoRA: estimators, weights and penalty against float64 autograd; calibration that leaves no trace."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from fastpeft.adapters import method_class
from fastpeft.adapters.iw_lora import MIN_INLINE_STEPS
from fastpeft.config import ConfigError, load_run
from fastpeft.data.batches import micro_batches
from fastpeft.errors import UserError
from fastpeft.signals import Rates, Signals
from fastpeft.tasks.sequences.examples import collate
from fastpeft.trainer.step import forward_backward, train_step
from tests.support.classifiers import classification_loss, load_backbone
from tests.support.tiny import FAMILIES


def batches_of(job, position: int) -> tuple[list, int]:
    rows = job.batches.rows(position)
    encoded, limit = job.batches.encoded, job.run.training.micro_batch_tokens
    limit = 16384 if limit == "auto" else limit
    return [collate(encoded, part, job.device) for part in micro_batches(encoded, rows, limit)], len(rows)


def calibrate(job, num_batches: int = 3, loss_scale: float = 1.0, same_batch: bool = False) -> None:
    adapter = job.adapter
    scale = torch.tensor(loss_scale)
    with adapter.calibrating():
        for position in range(num_batches):
            adapter.before_calibration_batch()
            batches, num_rows = batches_of(job, 0 if same_batch else position)
            forward_backward(adapter, classification_loss, batches, num_rows, loss_scale=scale)
            adapter.after_calibration_batch(loss_scale)
    adapter.finish_calibration()


def interrupted_calibration(job) -> None:
    with job.adapter.calibrating():
        job.adapter.before_calibration_batch()
        forward_backward(job.adapter, classification_loss, *batches_of(job, 5))
        job.adapter.after_calibration_batch(1.0)
        job.adapter.flat.data.add_(1)
        raise KeyboardInterrupt


def exact_sensitivity(job, num_batches: int = 3) -> list[float]:
    """Mean of ||dL/dW||_F by float64 autograd on the frozen weights of the plain model, B being 0."""
    assert not any(block.lora_b.any() for block in job.adapter.blocks)
    model = copy.deepcopy(job.adapter.model).merge_and_unload().double()
    for module in model.modules():
        module._forward_pre_hooks.clear()  # the head's hook would narrow to fp32
    weights = [model.get_submodule(block.name).weight.requires_grad_(True) for block in job.adapter.blocks]
    sums = torch.zeros(len(weights), dtype=torch.float64)
    for position in range(num_batches):
        batches, num_rows = batches_of(job, position)
        loss = 0
        for batch in batches:
            logits = model(**batch.inputs).logits
            loss = loss + torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum") / num_rows
        sums += torch.stack([gradient.norm() for gradient in torch.autograd.grad(loss, weights)])
    return (sums / num_batches).tolist()


def perturb(job, seed: int, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = job.adapter.flat.adapter
    data.copy_(torch.randn(data.shape, generator=generator) * std)


def set_sensitivity(job, sensitivity: list[float]) -> None:
    values = torch.tensor(sensitivity, dtype=torch.float64)
    job.adapter.load_state_dict({"sums": values, "num_batches": 1, "sensitivity": values})


def no_loss() -> Signals:
    return Signals(loss=torch.zeros(()), num_tokens=0)


# ---- estimators ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("micro_batch_tokens", [16384, 40])
def test_exact_equals_autograd(make_job, family, micro_batch_tokens):
    """One forward pass, and several that add up to one batch. DeBERTa's shared projections included."""
    job = make_job(family, training__micro_batch_tokens=micro_batch_tokens)
    assert (len(batches_of(job, 0)[0]) > 1) == (micro_batch_tokens == 40)
    want = exact_sensitivity(job)
    calibrate(job)
    assert job.adapter.importance().sensitivity == pytest.approx(want, rel=1e-4)


def test_debertas_query_and_key_are_used_twice(make_job, monkeypatch):
    """Its relative positions pass through them as well; the norm is of the sum of both uses."""
    from fastpeft.adapters import iw_lora

    job = make_job("deberta-v2", regulariser__warmup_steps=1)
    uses: dict[int, int] = {}
    original = iw_lora._ProbedLinear.apply

    def count(x, anchor, frozen):
        uses[id(frozen[0])] = uses.get(id(frozen[0]), 0) + 1
        return original(x, anchor, frozen)

    monkeypatch.setattr(iw_lora._ProbedLinear, "apply", count)
    calibrate(job, 1)
    for block in job.adapter.blocks:
        twice = block.projection in ("query_proj", "key_proj")
        assert uses[id(block.module.base_layer.weight)] == (2 if twice else 1), block.name


def test_exact_with_a_loss_scale(make_job):
    job = make_job("bert")
    want = exact_sensitivity(job)
    calibrate(job, loss_scale=1024.0)
    assert job.adapter.importance().sensitivity == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_exact_in_half_precision(make_job, precision):
    want = exact_sensitivity(make_job("bert"))
    job = make_job("bert", training__precision=precision)
    calibrate(job, loss_scale=128.0)
    assert job.adapter.importance().sensitivity == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_adapter_dropout_is_off_while_calibrating(make_job, estimator):
    """The norms are those without it, and the model's own dropout is none here."""
    measured = []
    for dropout in (0.0, 0.5):
        job = make_job("bert", adapter__dropout=dropout, regulariser__estimator=estimator)
        torch.manual_seed(1)
        calibrate(job)
        measured.append(job.adapter.importance().sensitivity)
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)


@pytest.mark.parametrize("rank", [1, 4])
def test_sketch_formula(make_job, rank):
    """||dL/dB|| / (s sqrt(v r)), v being the mean square of this very A."""
    job = make_job("bert", adapter__rank=rank, regulariser__estimator="sketch")
    batches, num_rows = batches_of(job, 0)
    want = []
    with job.adapter.calibrating():
        job.adapter.before_calibration_batch()
        forward_backward(job.adapter, classification_loss, batches, num_rows)
        for block in job.adapter.blocks:
            variance = float(block.lora_a.detach().double().square().mean())
            want.append(float(block.lora_b.grad.double().norm()) / (block.scale * math.sqrt(variance * rank)))
        job.adapter.after_calibration_batch(1.0)
    job.adapter.finish_calibration()
    assert job.adapter.importance().sensitivity == pytest.approx(want, rel=1e-5)


def test_sketch_comes_near_exact(make_job, seed):
    """A is drawn anew for every batch: 80 draws on one batch average to the exact norm."""
    job = make_job("deberta-v2", adapter__rank=8, regulariser__estimator="sketch")
    want = exact_sensitivity(job, 1)
    torch.manual_seed(seed)
    calibrate(job, 80, same_batch=True)
    ratios = [got / exact for got, exact in zip(job.adapter.importance().sensitivity, want)]
    assert 0.8 < min(ratios) <= max(ratios) < 1.15, ratios
    assert 0.9 < sum(ratios) / len(ratios) < 1.05


def test_sketch_draws_a_anew(make_job, seed):
    job = make_job("bert", regulariser__estimator="sketch")
    torch.manual_seed(seed)
    drawn = []
    with job.adapter.calibrating():
        for _ in range(2):
            job.adapter.before_calibration_batch()
            drawn.append(job.adapter.flat.adapter.clone())
    assert not torch.equal(*drawn)
    for block in job.adapter.blocks:
        assert not block.lora_b.any()


def test_gradient_of_a_is_zero_at_the_start(make_job):
    """Why lora_a needs a warm-up rate: B = 0 makes dL/dA vanish identically."""
    job = make_job("deberta-v2")
    forward_backward(job.adapter, classification_loss, *batches_of(job, 0))
    for block in job.adapter.blocks:
        assert not block.lora_a.grad.any()
        assert block.lora_b.grad.any()


def test_lora_a_is_refused_without_a_warmup_rate(make_run, make_job):
    with pytest.raises(ConfigError, match="warmup_learning_rate"):
        make_run("bert", regulariser__estimator="lora_a")
    job = make_job("bert")
    job.adapter.config = replace(job.adapter.config, estimator="lora_a")
    with pytest.raises(UserError, match="every gradient is zero"):
        calibrate(job)


def test_lora_a_with_a_warmup_rate(make_job):
    job = make_job("bert", regulariser__estimator="lora_a", regulariser__warmup_learning_rate=0.01)
    before = job.adapter.flat.data.clone()
    calibrate(job)
    importance = job.adapter.importance()
    assert all(weight > 0 for weight in importance.weights)
    assert sum(importance.weights) == pytest.approx(1)
    assert torch.equal(job.adapter.flat.data, before)


# ---- calibration ---------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "sketch", "lora_a"])
@pytest.mark.parametrize("fails", [False, True])
def test_calibration_leaves_no_trace(make_job, estimator, fails):
    job = make_job(
        "deberta-v2",
        dropout=True,
        adapter__dropout=0.2,
        regulariser__estimator=estimator,
        regulariser__warmup_learning_rate=0.01,
    )
    adapter = job.adapter
    parameters = {name: p.detach().clone() for name, p in adapter.model.named_parameters()}
    modes = {name: module.training for name, module in adapter.model.named_modules()}
    assert any(modes.values())
    if fails:
        with pytest.raises(KeyboardInterrupt):
            interrupted_calibration(job)
    else:
        calibrate(job)
    assert all(torch.equal(p, parameters[name]) for name, p in adapter.model.named_parameters())
    assert {name: module.training for name, module in adapter.model.named_modules()} == modes
    assert not adapter.flat.grad.any()
    assert all(block.module.probe is None for block in adapter.blocks)
    assert (adapter.importance() is None) == fails


def test_calibration_can_be_started_again(make_job):
    job = make_job("bert")
    calibrate(job)
    first = job.adapter.importance()
    with pytest.raises(KeyboardInterrupt):
        interrupted_calibration(job)
    calibrate(job)
    assert job.adapter.importance() == first


@pytest.mark.parametrize(("value", "said"), [(0.0, "every gradient is zero"), (math.nan, "not finite at bert.")])
@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_weights_that_cannot_be_normalised(make_job, estimator, value, said):
    """A head that lets no gradient through, and one that spoils it."""
    job = make_job("bert", regulariser__estimator=estimator)
    job.adapter.flat.data[job.adapter.flat.num_adapter :] = value
    with pytest.raises(UserError, match=said) as error:
        calibrate(job)
    assert "3 calibration batches" in str(error.value)
    assert job.adapter.importance() is None


@pytest.mark.parametrize("normalise", ["sum", "max"])
def test_importance(make_job, normalise):
    job = make_job("distilbert", regulariser__normalise=normalise)
    version = job.adapter.importance_version
    assert job.adapter.importance() is None
    calibrate(job)
    importance = job.adapter.importance()
    assert job.adapter.importance_version == version + 1
    assert importance.names == [block.name for block in job.adapter.blocks]
    assert importance.layer == [0] * 6 + [1] * 6
    assert importance.projection == ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"] * 2
    total = (sum if normalise == "sum" else max)(importance.sensitivity)
    assert importance.weights == pytest.approx([s / total for s in importance.sensitivity])
    assert (sum if normalise == "sum" else max)(importance.weights) == pytest.approx(1)
    assert min(importance.weights) > 0


# ---- the penalty ---------------------------------------------------------------------------


def explicit_penalty(job) -> tuple[float, torch.Tensor]:
    """alpha sum_k (1 - w_k)^beta P_k and its gradient in the flat layout, by float64 autograd."""
    adapter, config = job.adapter, job.adapter.config
    total = torch.zeros((), dtype=torch.float64)
    leaves = []
    strength = config.decoupled_alpha if config.decoupled else config.alpha
    for block, weight in zip(adapter.blocks, adapter.importance().weights):
        a, b = (p.detach().double().requires_grad_(True) for p in (block.lora_a, block.lora_b))
        size = (
            (block.scale * b @ a).square().sum() if config.penalty == "product" else a.square().sum() + b.square().sum()
        )
        total = total + strength * (1 - weight) ** config.beta * size
        leaves += [(block.lora_a, a), (block.lora_b, b)]
    total.backward()
    flat = torch.zeros(adapter.flat.data.numel(), dtype=torch.float64)
    for parameter, leaf in leaves:
        start = parameter.data.storage_offset()
        flat[start : start + leaf.numel()] = leaf.grad.flatten()
    return float(total.detach()), flat


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("penalty", ["product", "factors"])
@pytest.mark.parametrize("normalise", ["sum", "max"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_penalty_equals_autograd(make_job, seed, penalty, normalise, beta):
    job = make_job(
        "deberta-v2",
        regulariser__alpha=0.3,
        regulariser__beta=beta,
        regulariser__penalty=penalty,
        regulariser__normalise=normalise,
    )
    calibrate(job)
    perturb(job, seed)
    value, gradient = explicit_penalty(job)
    signals = no_loss()
    job.adapter.after_backward(signals, 0.5)
    assert float(signals.penalty) == pytest.approx(value, rel=1e-5)
    assert relative(job.adapter.flat.grad, gradient) < 1e-5
    assert float(signals.penalty_share) == pytest.approx(1)


def test_penalty_is_added_to_the_tasks_gradient(make_job, seed):
    job = make_job("bert", regulariser__alpha=0.3)
    calibrate(job)
    perturb(job, seed)
    signals = forward_backward(job.adapter, classification_loss, *batches_of(job, 0))
    task, loss = job.adapter.flat.grad.clone(), signals.loss.clone()
    _, gradient = explicit_penalty(job)
    job.adapter.after_backward(signals, 0.5)
    assert relative(job.adapter.flat.grad, task.double() + gradient) < 1e-5
    assert signals.loss == loss  # the task's alone
    cut = job.adapter.flat.num_adapter
    assert torch.equal(job.adapter.flat.grad[cut:], task[cut:])
    share = float(gradient.norm() / (task.double() + gradient)[:cut].norm())
    assert float(signals.penalty_share) == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_equal_weights_are_a_uniform_penalty(make_job, seed, beta):
    job = make_job("distilbert", regulariser__alpha=0.3, regulariser__beta=beta)
    num = len(job.adapter.blocks)
    set_sensitivity(job, [2.5] * num)
    perturb(job, seed)
    signals = no_loss()
    job.adapter.after_backward(signals, 0.5)
    sizes = [float((b.scale * b.lora_b @ b.lora_a).detach().double().square().sum()) for b in job.adapter.blocks]
    assert float(signals.penalty) == pytest.approx(0.3 * (1 - 1 / num) ** beta * sum(sizes), rel=1e-5)


def test_under_max_the_most_important_matrix_goes_free(make_job, seed):
    job = make_job("bert", regulariser__alpha=0.3, regulariser__normalise="max")
    num = len(job.adapter.blocks)
    set_sensitivity(job, [float(i + 1) for i in range(num)])
    perturb(job, seed)
    job.adapter.after_backward(no_loss(), 0.5)
    touched = [bool(b.lora_a.grad.any() or b.lora_b.grad.any()) for b in job.adapter.blocks]
    assert touched == [True] * (num - 1) + [False]


def test_no_penalty_before_there_are_weights(make_job, seed):
    job = make_job("bert", regulariser__alpha=0.3)
    perturb(job, seed)
    signals = no_loss()
    job.adapter.after_backward(signals, 0.0)
    assert signals.penalty == signals.penalty_share == 0
    assert not job.adapter.flat.grad.any()


@pytest.mark.parametrize("penalty", ["product", "factors"])
def test_decoupled_shrinks_by_the_penaltys_gradient(make_job, seed, penalty):
    job = make_job(
        "bert",
        regulariser__decoupled=True,
        regulariser__decoupled_alpha=0.7,
        regulariser__alpha=9.0,
        regulariser__penalty=penalty,
    )
    calibrate(job)
    perturb(job, seed)
    value, gradient = explicit_penalty(job)
    flat, rates = job.adapter.flat, Rates(lr=0.01)
    for skipped in (1.0, 0.0):
        before = flat.data.clone()
        signals = no_loss()
        job.adapter.after_backward(signals, 0.5)
        assert not flat.grad.any()
        assert float(signals.penalty) == pytest.approx(value, rel=1e-5)
        signals.skipped = torch.tensor(skipped)
        job.adapter.after_step(signals, rates, 0.5)
        if skipped:
            assert torch.equal(flat.data, before)
            continue
        want = before.double() - 0.01 * gradient
        torch.testing.assert_close(flat.data.double(), want, rtol=1e-5, atol=1e-6)
        assert float(signals.penalty_share) == pytest.approx(1, rel=1e-3)


def test_decoupled_takes_the_weights_from_before_the_step(make_job, seed):
    """AdamW moves A and B in between: the shrinkage is of where they were, as weight decay's is."""
    job = make_job("bert", regulariser__decoupled=True, regulariser__decoupled_alpha=0.7)
    calibrate(job)
    perturb(job, seed)
    _, gradient = explicit_penalty(job)
    flat = job.adapter.flat
    signals = no_loss()
    job.adapter.after_backward(signals, 0.5)
    moved = torch.randn(flat.data.shape, generator=torch.Generator().manual_seed(seed)) * 0.01
    flat.data.add_(moved)
    before = flat.data.clone()
    signals.skipped = torch.zeros(())
    job.adapter.after_step(signals, Rates(lr=0.01), 0.5)
    torch.testing.assert_close(flat.data.double(), before.double() - 0.01 * gradient, rtol=1e-5, atol=1e-6)
    cut = flat.num_adapter
    whole = (moved.double() - 0.01 * gradient)[:cut].norm()
    assert float(signals.penalty_share) == pytest.approx(float(0.01 * gradient.norm() / whole), rel=1e-3)


# ---- measuring while training --------------------------------------------------------------


def take_steps(job, num_steps: int, progress: float = 0.0, start: int = 0):
    for position in range(start, start + num_steps):
        yield train_step(job.adapter, job.schedule, job.optimizer, job.task.loss, *batches_of(job, position), progress)[
            0
        ]


def sketch_of(job) -> list[float]:
    """From the gradient that lies in the buffer, penalty not in it."""
    values = []
    for block in job.adapter.blocks:
        variance = float(block.lora_a.detach().double().square().mean())
        norm = float(block.lora_b.grad.double().norm())
        values.append(norm / (block.scale * math.sqrt(variance * block.lora_a.shape[0])))
    return values


def test_online_updates_the_weights(make_job, seed):
    job = make_job("bert", regulariser__online=True, regulariser__online_decay=0.9)
    calibrate(job)
    perturb(job, seed)
    before, version = job.adapter.importance(), job.adapter.importance_version
    signals = forward_backward(job.adapter, classification_loss, *batches_of(job, 0))
    measured = sketch_of(job)
    job.adapter.after_backward(signals, 0.5)
    after = job.adapter.importance()
    want = [0.9 * old + 0.1 * new for old, new in zip(before.sensitivity, measured)]
    assert after.sensitivity == pytest.approx(want, rel=1e-5)
    assert sum(after.weights) == pytest.approx(1)
    assert job.adapter.importance_version > version


def test_online_passes_over_a_gradient_that_is_not_finite(make_job):
    job = make_job("bert", regulariser__online=True)
    calibrate(job)
    before = job.adapter.importance()
    job.adapter.flat.grad.fill_(math.nan)
    job.adapter.after_backward(no_loss(), 0.5)
    assert job.adapter.importance().sensitivity == pytest.approx(before.sensitivity)


def test_not_online_keeps_the_weights(make_job):
    job = make_job("bert")
    calibrate(job)
    before = job.adapter.importance()
    list(take_steps(job, 3))
    assert job.adapter.importance() == before


@pytest.mark.parametrize(
    ("warmup_steps", "progress", "expected"),
    [(20, 0.0, 20), (20, 0.5, MIN_INLINE_STEPS), (3, 0.0, MIN_INLINE_STEPS), (MIN_INLINE_STEPS + 1, 0.01, 9)],
)
def test_inline_calibration_waits(make_job, warmup_steps, progress, expected):
    job = make_job(
        "bert",
        regulariser__calibration="inline",
        regulariser__warmup_steps=warmup_steps,
        regulariser__alpha=0.3,
        schedule__warmup_steps=50,
    )
    assert job.adapter.calibration_batches == 0
    assert MIN_INLINE_STEPS == 8
    for step, signals in enumerate(take_steps(job, 21, progress), 1):
        assert (job.adapter.importance() is not None) == (step >= expected), step
        assert (float(signals.penalty) > 0) == (step >= expected), step
    assert job.adapter.importance_version == 1


def test_inline_is_the_mean_of_the_sketches(make_job):
    job = make_job("bert", regulariser__calibration="inline", regulariser__warmup_steps=8)
    measured = []
    for position in range(8):
        signals = forward_backward(job.adapter, classification_loss, *batches_of(job, position))
        measured.append(sketch_of(job))
        job.adapter.after_backward(signals, 0.0)
    want = [sum(column) / 8 for column in zip(*measured)]
    assert job.adapter.importance().sensitivity == pytest.approx(want, rel=1e-5)


# ---- state and files -----------------------------------------------------------------------


def test_state_round_trip(make_job):
    job = make_job("bert")
    calibrate(job)
    other = make_job("bert")
    assert other.adapter.calibration_batches == 3
    other.adapter.load_state_dict(copy.deepcopy(job.adapter.state_dict()))
    assert other.adapter.importance() == job.adapter.importance()
    assert other.adapter.calibration_batches == 0
    perturb(job, 1)
    perturb(other, 1)
    for each in (job, other):
        each.adapter.flat.grad.zero_()
        each.adapter.after_backward(no_loss(), 0.5)
    assert torch.equal(job.adapter.flat.grad, other.adapter.flat.grad)


def test_state_in_the_middle_of_inline_calibration(make_job):
    settings = {"regulariser__calibration": "inline", "regulariser__warmup_steps": 10}
    whole, first, second = (make_job("bert", **settings) for _ in range(3))
    list(take_steps(whole, 12))
    list(take_steps(first, 5))
    second.adapter.load_state_dict(copy.deepcopy(first.adapter.state_dict()))
    second.adapter.flat.data.copy_(first.adapter.flat.data)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.schedule.load_state_dict(first.schedule.state_dict())
    list(take_steps(second, 7, start=5))
    assert second.adapter.importance() == whole.adapter.importance()
    assert torch.equal(second.adapter.flat.data, whole.adapter.flat.data)


def test_importance_is_saved_beside_the_adapter(make_job, tmp_path):
    job = make_job("bert")
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    job.adapter.save(tmp_path / "before")
    assert not (tmp_path / "before" / "importance.json").exists()
    calibrate(job)
    job.adapter.save(tmp_path / "after")
    saved = json.loads((tmp_path / "after" / "importance.json").read_text())
    importance = job.adapter.importance()
    assert saved["names"] == importance.names
    assert saved["weights"] == pytest.approx(importance.weights)
    assert (saved["normalise"], saved["estimator"]) == ("sum", "exact")
    assert json.loads((tmp_path / "after" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_registered_under_its_name(make_run):
    run = make_run("bert")
    backbone = load_backbone(run.model, ("no", "yes"), torch.float32, torch.device("cpu"))
    assert type(method_class("iw_lora").build(run.adapter, run.regulariser, backbone)).__name__ == "IwLora"
    assert load_run("iwlora_mnli").method == "iw_lora"
