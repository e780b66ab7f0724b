"""Full fine-tuning trains every weight in fp32 and leaves a folder that transformers loads."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastpeft.tasks.sequences.examples import collate
from fastpeft.trainer import train
from fastpeft.trainer.step import forward_backward, train_step
from tests.support.classifiers import classification_loss
from tests.support.tiny import FAMILIES

SETTINGS = {"method": "full", "training__learning_rate": 1e-3}


def first_batch(job):
    rows = job.batches.rows(0)
    return collate(job.batches.encoded, rows, job.device), len(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_autograds(make_job, family):
    job = make_job(family, **SETTINGS)
    batch, num_rows = first_batch(job)
    forward_backward(job.adapter, classification_loss, [batch], num_rows)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(job.run.model.name, num_labels=2)
    model.load_state_dict(job.adapter.model.state_dict())
    model.double().train()(**batch.inputs, labels=batch.labels).loss.backward()
    theirs = dict(model.named_parameters())
    assert sum(p.numel() for p in theirs.values()) == job.adapter.flat.data.numel()
    for name, parameter in job.adapter.model.named_parameters():
        want = theirs[name].grad
        want = torch.zeros_like(theirs[name]) if want is None else want
        torch.testing.assert_close(parameter.grad.double(), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_step_moves_every_weight_that_has_a_gradient(make_job, precision):
    job = make_job("deberta-v2", training__precision=precision, schedule__warmup_steps=0, **SETTINGS)
    assert {p.dtype for p in job.adapter.model.parameters()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in job.adapter.model.named_parameters()}
    batch, num_rows = first_batch(job)
    computed = set()
    for name, module in job.adapter.model.named_modules():
        if name.endswith("query_proj"):
            module.register_forward_hook(lambda module, args, out: computed.add(out.dtype))
    train_step(job.adapter, job.schedule, job.optimizer, job.task.loss, [batch], num_rows, 0.0)
    for name, parameter in job.adapter.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.grad.any()), name
    moved = [name for name, p in job.adapter.model.named_parameters() if not torch.equal(p, before[name])]
    assert any("word_embeddings" in n for n in moved)
    assert any("layer.1.output.dense" in n for n in moved)
    assert computed == {torch.bfloat16 if precision == "bf16" else torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_was_saved(make_job, tmp_path, family):
    job = make_job(family, **SETTINGS)
    batch, num_rows = first_batch(job)
    for i in range(3):
        train_step(job.adapter, job.schedule, job.optimizer, job.task.loss, [batch], num_rows, i / 3)
    job.adapter.save(tmp_path)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    want = job.adapter.model.eval()(**batch.inputs).logits
    torch.testing.assert_close(model.eval()(**batch.inputs).logits, want, rtol=1e-6, atol=1e-6)
    assert list(model.config.id2label.values()) == list(job.task.label_names)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("the dog ran")["input_ids"]


def test_a_run_leaves_model_and_model_best(make_run, tmp_path, capfd):
    run = make_run("bert", dropout=True, budget="8steps", evaluation__every="25%", **SETTINGS)
    capfd.readouterr()
    whole = train(run, results_dir=tmp_path, name="whole")
    folder = tmp_path / "whole"
    assert whole.status == "done"
    assert not (folder / "adapter").exists()
    size = (folder / "model" / "model.safetensors").stat().st_size / 2**20
    assert whole.adapter_mb == pytest.approx(size, abs=1e-3)
    values = {e["value"]: e["step"] for e in events(folder) if e["type"] == "eval"}
    assert whole.best["value"] == max(values)
    best = load_file(folder / "model_best" / "model.safetensors")
    last = load_file(folder / "model" / "model.safetensors")
    assert best.keys() == last.keys()
    assert all(torch.equal(best[k], last[k]) for k in last) == (whole.best["step"] == 8)
    assert "Writing model shards" not in "".join(capfd.readouterr())


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
