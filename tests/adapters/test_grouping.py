"""The trainer computes projections of one input together, from its first pass on and whatever went before."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from fastpeft.adapters import iw_lora
from fastpeft.models import fused_projections as siblings
from fastpeft.models import inject, layers
from fastpeft.tasks.sequences.examples import collate
from fastpeft.trainer.build import Job
from fastpeft.trainer.step import forward_backward, train_step
from tests.support.classifiers import classification_loss
from tests.support.tiny import FAMILIES

GROUPS = {"bert": [2, 3], "roberta": [2, 3], "distilbert": [3, 3], "deberta-v2": [2, 2, 2, 3]}
"""How many are computed together. The last layer's query is alone where it reads the first token's row."""


@pytest.fixture
def make_single(make_job, monkeypatch) -> Callable[..., Job]:
    """As make_job, but each layer is alone."""

    def make(*args, **settings) -> Job:
        with monkeypatch.context() as patch:
            patch.setattr(inject, "join_settled", lambda *_, **__: None)
            return make_job(*args, **settings)

    return make


def perturbed(job: Job, seed: int) -> Job:
    data = job.adapter.flat.data
    data.add_(torch.randn(data.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.05)
    return job


def batches(job: Job, position: int):
    rows = job.batches.rows(position)
    return [collate(job.batches.encoded, rows, job.device)], len(rows)


def gradient(job: Job, position: int = 0, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    forward_backward(job.adapter, classification_loss, *batches(job, position))
    return job.adapter.flat.grad.clone()


def take(job: Job, position: int) -> float:
    return float(
        train_step(job.adapter, job.schedule, job.optimizer, job.task.loss, *batches(job, position), 0.5)[0].loss
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_pass_is_together_and_the_losses_are_the_same(make_job, make_single, grouped, family, seed):
    settings = {"method": "lora", "adapter__dropout": 0.0}
    alone, together = (perturbed(make(family, **settings), seed) for make in (make_single, make_job))
    grouped.clear()
    expected = gradient(alone)
    assert grouped == []
    found = gradient(together)
    assert sorted(grouped) == GROUPS[family]
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())
    for position in range(6):
        assert take(together, position) == pytest.approx(take(alone, position), rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_no_pass_before_changes_the_bits(make_job, grouped, seed, dropout):
    """Evaluation, calibration, and passes that break off midway lie before the second job's pass."""
    fresh, used = (perturbed(make_job("bert", dropout=True, adapter__dropout=dropout), seed) for _ in range(2))
    model, part = used.adapter.model, used.adapter.blocks[1].module

    def refuse(*_):
        raise torch.OutOfMemoryError("midway")

    for _ in range(siblings._LESSONS + 1):
        hook = part.register_forward_pre_hook(refuse)
        with pytest.raises(torch.OutOfMemoryError, match="midway"):
            gradient(used)
        hook.remove()
    model.eval()
    with torch.inference_mode():
        model(**batches(used, 1)[0][0].inputs)
    model.train()
    with used.adapter.calibrating():
        gradient(used, 1)
        used.adapter.after_calibration_batch(1.0)
    grouped.clear()
    assert torch.equal(gradient(used), gradient(fresh))
    assert grouped == [3, 2] * 2


def test_a_step_after_a_resume_has_the_bits_of_an_unbroken_one(make_job, grouped):
    unbroken, resumed = (make_job("bert", dropout=True, method="lora", adapter__dropout=0.1) for _ in range(2))
    for position in range(2):
        take(unbroken, position)
    resumed.adapter.flat.data.copy_(unbroken.adapter.flat.data)
    resumed.optimizer.load_state_dict(copy.deepcopy(unbroken.optimizer.state_dict()))
    state = torch.get_rng_state()
    for job in (unbroken, resumed):
        torch.set_rng_state(state)
        grouped.clear()
        take(job, 2)
        assert grouped == [3, 2]
    assert torch.equal(resumed.adapter.flat.data, unbroken.adapter.flat.data)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_set_up_draws_nothing_and_changes_no_mode(make_job, make_single, dropout):
    one, other = (make("bert", dropout=dropout, adapter__dropout=0.1) for make in (make_single, make_job))
    assert torch.equal(one.adapter.flat.data, other.adapter.flat.data)
    states = []
    for make in (make_single, make_job):
        make("bert", dropout=dropout, adapter__dropout=0.1)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    model = other.adapter.model
    modes = [index % 3 == 0 for index, _ in enumerate(model.modules())]
    for module, mode in zip(model.modules(), modes):
        module.training = mode
    siblings.join_settled(model, input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_calibration_measures_the_same(make_job, make_single, grouped, estimator):
    found = []
    for make in (make_single, make_job):
        job = make("bert", regulariser__estimator=estimator)
        grouped.clear()
        torch.manual_seed(0)
        with job.adapter.calibrating():
            for position in range(2):
                job.adapter.before_calibration_batch()
                forward_backward(job.adapter, classification_loss, *batches(job, position))
                job.adapter.after_calibration_batch(1.0)
        job.adapter.finish_calibration()
        found.append(torch.tensor(job.adapter.importance().sensitivity))
    assert grouped == ([] if estimator == "exact" else [3, 2] * 2), "a probe stands in for its layer"
    if estimator == "exact":
        assert torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_a_probe_may_stand_in_for_some(make_job, grouped, seed):
    """The others are computed, and nothing that was made for one is handed to another."""
    job = perturbed(make_job("bert"), seed)
    expected = gradient(job)
    key = next(block for block in job.adapter.blocks if block.projection == "key")
    key.module.probe = iw_lora._GradientProbe(key)
    key.lora_b.data.zero_()
    gradient(job)
    key.module.probe = None
    key.lora_b.data.copy_(perturbed(make_job("bert"), seed).adapter.blocks[job.adapter.blocks.index(key)].lora_b)
    grouped.clear()
    assert torch.equal(gradient(job), expected)
    assert grouped == [3, 2]


def test_adalora_is_alone(make_job, grouped):
    job = make_job("bert", method="adalora")
    assert siblings.join(job.adapter.model) == []
    for position in range(3):
        take(job, position)
    assert grouped == []


def test_a_model_that_refuses_the_first_tokens_is_trained_alone(make_job, grouped, monkeypatch, capfd, recwarn):
    import transformers

    real = transformers.BertForSequenceClassification.forward

    def odd(self, input_ids, **inputs):
        if (input_ids == input_ids.flatten()[0]).all():
            raise KeyError("all tokens are the same")
        return real(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(transformers.BertForSequenceClassification, "forward", odd)
    capfd.readouterr()
    recwarn.clear()
    job = make_job("bert", method="lora")
    assert "all tokens" not in "".join(capfd.readouterr())
    assert not [w for w in recwarn if "all tokens" in str(w.message)]
    assert job.adapter.model.training
    for position in range(3):
        assert take(job, position) > 0
    assert grouped == []


def test_a_merged_model_is_the_adapted_one(make_job, seed):
    job = perturbed(make_job("bert", method="lora"), seed)
    inputs = batches(job, 0)[0][0].inputs
    model = job.adapter.model.eval()
    with torch.no_grad():
        want = model(**inputs).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**inputs).logits, want, rtol=0, atol=1e-3 * float(want.abs().max()))
        model.unmerge_adapter()
        torch.testing.assert_close(model(**inputs).logits, want, rtol=0, atol=1e-3 * float(want.abs().max()))
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(**inputs).logits, want, rtol=0, atol=1e-3 * float(want.abs().max()))
    assert not any(layers.is_fused(module) for module in plain.modules())
