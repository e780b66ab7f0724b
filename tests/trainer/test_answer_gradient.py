"""Gradients of the labelled tokens, measured by layers alone and in groups, against PEFT's own layers in fp64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from fastpeft.data.batches import Batch
from fastpeft.errors import UserError
from fastpeft.kernels import linear_cross_entropy
from fastpeft.models import fused_projections as siblings
from fastpeft.models.layers import is_fused
from fastpeft.models.lm_head import hidden_states
from fastpeft.signals import Need
from fastpeft.trainer.step import forward_backward
from tests.support.probe_runs import Recorder, Steps, pairs_run, problem_run, put_in

NEEDS = frozenset({Need.ANSWER_GRADIENT})


def reference(run: Steps, batch: Batch, num_items: int) -> tuple[torch.Tensor, torch.Tensor]:
    """||dB_k||^2 of the labelled rows, and of all, of the model as it is."""
    model = copy.deepcopy(run.job.adapter.model).double()
    blocks = [model.base_model.model.get_submodule(block.name) for block in run.job.adapter.blocks]
    for module in model.modules():
        if is_fused(module):
            module.__class__ = type(module).__mro__[2]
            module.watch = None
    labelled = (batch.labels != -100).flatten()
    squares = {}

    def watch(name: int, b: nn.Linear) -> None:
        def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            s_TR = args[0].detach().flatten(0, 1)

            def measure(dy: torch.Tensor) -> None:
                dy_TO = dy.flatten(0, 1)
                parts = dy_TO[labelled].T @ s_TR[labelled], dy_TO.T @ s_TR
                squares[name] = [part.square().sum() for part in parts]

            output.register_hook(measure)

        b.register_forward_hook(keep)

    for k, layer in enumerate(blocks):
        watch(k, layer.lora_B["default"])
    hidden, weight, bias = hidden_states(model, batch.inputs["input_ids"])
    linear_cross_entropy(hidden, weight, batch.labels, bias, rows=batch.rows, num_items=num_items).loss.backward()
    found = torch.tensor([squares[k] for k in range(len(blocks))], dtype=torch.float64)
    return found[:, 0], found[:, 1]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """A few steps in, so that B is not zero."""
    put_in(monkeypatch, Recorder, NEEDS)
    return Steps(problem_run(tmp_path)).take(3)


def squares(run: Steps, batches: list[Batch], num_items: int, scale: torch.Tensor | None = None) -> torch.Tensor:
    run.probes.begin(17, 0.0, 0.0)
    loss = run.job.task.loss
    forward_backward(run.job.adapter, loss, batches, num_items, loss_scale=scale, probes=run.probes)
    return run.probes._found["answer_grad_sq"].double()


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_one_micro_batch_is_exact(
    scale: float | None, grouped: bool, run: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = []
    original = siblings.lora_linear_grouped
    monkeypatch.setattr(siblings, "lora_linear_grouped", lambda *a, **k: groups.append(len(a[1])) or original(*a, **k))
    if not grouped:
        for block in run.job.adapter.blocks:
            block.module.siblings = None
    (batch,), num_items = run.batches(4)
    found_K = squares(run, [batch], num_items, None if scale is None else torch.tensor(scale))
    want_K, all_K = reference(run, batch, num_items)
    torch.testing.assert_close(found_K, want_K, rtol=1e-4, atol=0)
    assert (want_K < 0.99 * all_K).any()
    assert sorted(set(groups)) == ([2, 3] if grouped else [])


def test_several_micro_batches_take_their_cross_terms_from_the_whole_gradient(run: Steps) -> None:
    batches, num_items = run.batches(4, max_tokens=64)
    assert len(batches) > 2
    parts = [reference(run, batch, num_items) for batch in batches]
    found_K = squares(run, batches, num_items)
    whole_K = run.job.adapter.flat.layout.b_squares(run.job.adapter.flat.grad).double()
    labelled_K, all_K = (torch.stack(column).sum(0) for column in zip(*parts))
    torch.testing.assert_close(found_K, whole_K * labelled_K / all_K, rtol=1e-4, atol=0)
    assert ((whole_K / all_K - 1).abs() > 0.1).any()


def test_several_micro_batches_that_are_alike_are_exact(run: Steps) -> None:
    """Their gradients are parallel."""
    (batch,), num_items = run.batches(4)
    once_K = squares(run, [batch], num_items)
    torch.testing.assert_close(squares(run, [batch] * 3, 3 * num_items), once_K, rtol=1e-4, atol=0)


@pytest.mark.parametrize("max_tokens", [None, 64])
def test_a_classifiers_rows_are_all_labelled(
    max_tokens: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in(monkeypatch, Recorder, NEEDS)
    run = Steps(pairs_run(tmp_path)).take(17, max_tokens).finish()
    assert (len(run.batches(17, max_tokens)[0]) == 1) == (max_tokens is None)
    flat = run.job.adapter.flat
    want = flat.layout.b_squares(run.grad(17))
    assert run.measured[16].answer_grad_sq_K == pytest.approx(want.numpy(), rel=1e-5)
    for group in flat.groups:
        for k, b_OR in zip(group.index_K.tolist(), group.grad_b_KOR):
            assert flat.layout.b_squares(flat.grad)[k] == pytest.approx(float(b_OR.square().sum()))


def test_nothing_is_measured_outside_of_training_passes(run: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = siblings.lora_linear_grouped
    monkeypatch.setattr(
        siblings, "lora_linear_grouped", lambda *a, **k: seen.append(k["measures"]) or original(*a, **k)
    )
    (batch,), num_items = run.batches(4)
    with torch.no_grad():
        run.job.adapter.model(input_ids=batch.inputs["input_ids"])
    forward_backward(run.job.adapter, run.job.task.loss, [batch], num_items)
    assert seen
    assert not any(seen)


def test_a_layer_that_peft_computes_is_named(run: Steps) -> None:
    block = run.job.adapter.blocks[5]
    block.module.base_layer.register_forward_hook(lambda *_: None)
    (batch,), num_items = run.batches(4)
    with pytest.raises(UserError, match=rf"labelled tokens.*{block.name}.*hooks.*another schedule"):
        squares(run, [batch], num_items)


def test_adalora_measures_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, Recorder, NEEDS)
    run = Steps(problem_run(tmp_path, method="adalora")).take(17).finish()
    whole_K = run.job.adapter.flat.layout.b_squares(run.grad(17)).numpy()
    assert (run.measured[16].answer_grad_sq_K > 0.01 * whole_K).all()
    assert (run.measured[16].answer_grad_sq_K < 100 * whole_K).all()


def test_whole_models_have_no_adapted_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, Recorder, NEEDS)
    run = Steps(problem_run(tmp_path, method="full")).take(1).finish()
    assert run.measured[0].answer_grad_sq_K.shape == (0,)
