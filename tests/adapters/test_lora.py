"""Adapters are ordinary PEFT adapters, and IW-LoRA without a penalty is LoRA bit for bit."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers

from fastpeft.tasks.sequences.examples import collate
from fastpeft.trainer import train
from tests.support.tiny import FAMILIES


def perturb_all(job, seed: int) -> None:
    """A, B and the head."""
    data = job.adapter.flat.data
    data.add_(torch.randn(data.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.2)


@pytest.mark.parametrize("method", ["lora", "rslora", "iw_lora"])
@pytest.mark.parametrize("masked_lm", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_was_saved(make_job, tmp_path, seed, family, method, masked_lm):
    job = make_job(family, method=method, masked_lm=masked_lm)
    perturb_all(job, seed)
    folder = tmp_path / "saved"
    folder.mkdir()
    job.adapter.save(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["target_modules"] == sorted(settings["target_modules"]), "another order in each process"
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (4, 16.0, "SEQ_CLS")
    assert settings["use_rslora"] == (method == "rslora")
    assert job.adapter.blocks[0].scale == (8.0 if method == "rslora" else 4.0)
    batch = collate(job.batches.encoded, job.batches.rows(0), job.device)
    with torch.inference_mode():  # layer by layer, as PEFT's are: these random layers magnify what is rounded otherwise
        want = job.adapter.model.eval()(**batch.inputs).logits
    want = want.clone()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(job.run.model.name, num_labels=2)
    fresh = base.eval()(**batch.inputs).logits
    model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    got = model(**batch.inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4 * float(want.abs().max()))
    assert float((got - fresh).abs().max()) > 0.01
    merged = model.merge_and_unload()
    rounding = 1e-2 * float(want.detach().abs().max())  # of W + s B A in fp32, through random layers
    torch.testing.assert_close(merged(**batch.inputs).logits, want, rtol=0, atol=rounding)


@pytest.mark.parametrize("target_modules", ["qv", "attention", ["query", "dense"], r".*layer\.1\..*"])
def test_saved_targets_mean_the_same_layers(make_job, tmp_path, seed, target_modules):
    job = make_job("bert", method="lora", adapter__target_modules=target_modules)
    perturb_all(job, seed)
    folder = tmp_path / "saved"
    folder.mkdir()
    job.adapter.save(folder)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(job.run.model.name, num_labels=2)
    model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    adapted = [name for name, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert adapted == [block.name for block in job.adapter.blocks]


def test_describe(make_job):
    job = make_job("bert", method="lora", adapter__target_modules="qv")
    (line,) = job.adapter.describe()
    assert "LoRA on 4 matrices (query x 2, value x 2)" in line
    assert f"{4 * (4 * 32 + 32 * 4):,} parameters" in line
    assert f"head {32 * 2 + 2:,}" in line


# ---- alpha = 0 -----------------------------------------------------------------------------

STEPS = "10steps"


@pytest.fixture
def lora_weights(make_run, tmp_path):
    """Trains a method on the same model and data; returns the saved adapter's bytes."""

    def run(name: str, **overrides: object) -> bytes:
        settings = make_run("deberta-v2", dropout=True, budget=STEPS, adapter__dropout=0.1, **overrides)
        result = train(settings, results_dir=tmp_path / "results", name=name)
        assert (result.status, result.steps) == ("done", 10)
        return (tmp_path / "results" / name / "adapter" / "adapter_model.safetensors").read_bytes()

    return run


VARIANTS = {
    "exact": {"regulariser__estimator": "exact"},
    "sketch": {"regulariser__estimator": "sketch"},
    "inline": {"regulariser__calibration": "inline", "regulariser__warmup_steps": 8},
    "online": {"regulariser__online": True},
    "max": {"regulariser__normalise": "max", "regulariser__beta": 0.0, "regulariser__penalty": "factors"},
    "decoupled": {"regulariser__decoupled": True, "regulariser__decoupled_alpha": 0.0},
}


@pytest.mark.soak
def test_alpha_zero_is_lora_bit_for_bit(lora_weights):
    """Dropout is on: the calibration must not have moved the RNG either."""
    lora = lora_weights("lora", method="lora")
    assert lora_weights("again", method="lora") == lora
    for name, overrides in VARIANTS.items():
        assert lora_weights(name, regulariser__alpha=0.0, **overrides) == lora, name
    assert lora_weights("penalised", regulariser__alpha=1e-3) != lora
    assert lora_weights("other_seed", method="lora", training__seed=7) != lora
