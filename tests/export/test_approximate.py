"""A token's atoms are its own, so that an export is refused; and the update under mean gates, as a PEFT LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

from fastpeft.adapters.unihyperlora.mixer import conditions
from fastpeft.cli.commands import app
from fastpeft.export.approximate import factors_of, mean_gates
from fastpeft.export.plan import ExportError, make_plan
from fastpeft.trainer import train
from fastpeft.trainer.build import build_job
from tests.support.tiny_runs import tiny_run

OWN = {"max_extra_flops": 100.0, "num_atoms": 24, "width": 8}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    run = tiny_run(tmp_path, method="unihyperlora", unihyperlora=OWN, budget="4steps", training={"learning_rate": 0.05})
    train(run, results_dir=tmp_path, name="r")
    return tmp_path


def test_an_exact_export_is_refused_with_the_reason(results: Path) -> None:
    for more in ({}, {"merge": True}, {"reader": "vllm"}):
        with pytest.raises(ExportError, match="no plain LoRA and no merged model holds the adapter exactly") as error:
            make_plan("r", results_dir=results, **more)
        assert "fastpeft.load_adapter(model, path)" in str(error.value)
        assert "--approximate RANK" in str(error.value)
        assert error.value.exit_code == 2
    with pytest.raises(ExportError, match="leave out --merge"):
        make_plan("r", results_dir=results, merge=True, approximate=True)


def test_the_approximation_loads_in_peft_and_says_what_it_costs(results: Path) -> None:
    done = CliRunner().invoke(app, ["export", "r", "--results-dir", str(results), "--approximate", "8", "--last"])
    assert done.exit_code == 0, done.output
    assert "before," in done.output
    assert "leaves out 0.00% of a matrix's mean update" in done.output
    base = transformers.AutoModelForSequenceClassification.from_pretrained(results / "model", num_labels=2)
    model = peft.PeftModel.from_pretrained(base, str(results / "r" / "export")).eval()
    job = build_job(tiny_run(results, method="unihyperlora", unihyperlora=OWN))
    adapter: Any = job.adapter
    adapter.load(results / "r" / "adapter")
    gates_SM = mean_gates(job)
    assert 0 < float(gates_SM.sum(1).max()) <= 2 + 1e-6
    site = adapter.sites[0]
    phi = adapter.host.fold().phi[site.num_in].double()
    dictionary = adapter.dictionary
    with torch.no_grad():
        u, v = (x.double() for x in dictionary.atoms.fold())
        gain = dictionary.mixer(conditions([site], u.device))[0].double() * dictionary.shape.alpha
        want = phi @ (u * (gain * gates_SM[0].double())[:, None]).t() @ v @ phi.t()
        a_RI, b_OR, lost = factors_of(adapter, 0, gates_SM[0], 8)
        torch.testing.assert_close((b_OR @ a_RI).double(), want, rtol=1e-4, atol=1e-6)
        assert lost < 1e-12
        part_a, part_b, left_out = factors_of(adapter, 0, gates_SM[0], 2)
        error = float(((part_b @ part_a).double() - want).square().sum() / want.square().sum())
        assert error == pytest.approx(left_out, rel=1e-3)
    layer = model.get_base_model().get_submodule(site.name)
    torch.testing.assert_close(layer.get_delta_weight("default").double(), want, rtol=1e-4, atol=1e-6)
    text = (results / "r" / "export" / "README.md").read_text()
    assert "fastpeft.load_adapter(model" in text
    assert str(results / "model") in text


def test_ranks_and_methods_that_it_is_not_for(results: Path) -> None:
    done = CliRunner().invoke(app, ["export", "r", "--results-dir", str(results), "--approximate", "9"])
    assert "the mean update has rank 8 at most; give 1 to 8" in str(done.exception)
    train(tiny_run(results, method="lora", budget="1steps"), results_dir=results, name="lora")
    with pytest.raises(ExportError, match="the update of method lora is exported as it is"):
        make_plan("lora", results_dir=results, approximate=True)
