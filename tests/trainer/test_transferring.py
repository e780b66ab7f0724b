"""An adapter that was trained on one host, put onto another of another width and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fastpeft
from fastpeft.cli.commands import app
from fastpeft.config import RunConfig
from fastpeft.errors import UserError
from fastpeft.trainer import train
from fastpeft.trainer.build import build_job
from fastpeft.trainer.transferring import transfer
from tests.support.tiny import make_model
from tests.support.tiny_runs import tiny_run

OWN = {"max_extra_flops": 100.0, "num_atoms": 24, "width": 8}
FILE = Path("r/adapter/unihyperlora.safetensors")


def run_of(folder: Path, own: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    return tiny_run(folder, method="unihyperlora", unihyperlora=OWN | (own or {}), **sections)


def wider(folder: Path) -> str:
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 96}
    return str(make_model(folder / "wider", "bert", seed=1, **sizes))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source run, and a host that is wider and deeper."""
    home = tmp_path_factory.mktemp("transfer")
    train(run_of(home, budget="4steps", training={"learning_rate": 0.3}), results_dir=home, name="r")
    wider(home)
    return home


@pytest.fixture
def source(home: Path) -> Path:
    return home / FILE


def test_zero_shot_then_the_bias_then_what_it_is_compared_with(source: Path, home: Path, tmp_path: Path) -> None:
    target = run_of(home, {"num_atoms": 99}, model={"name": str(home / "wider")})
    before = source.read_bytes()
    found = transfer(target, source, steps=3, results_dir=tmp_path, name="t")
    what = [row.what for row in found.rows]
    assert what == [
        "no adapter, zero-shot", "adapter, zero-shot", "adapter, delta trained", "no adapter, head trained", what[-1],
    ]  # fmt: skip
    assert what[-1].startswith("LoRA r 8, as many ")  # seconds, or steps where an evaluation takes most of them
    assert [row.steps for row in found.rows[:4]] == [0, 0, 3, 3]
    assert all(row.score is not None and 0 <= row.score <= 1 for row in found.rows)
    assert all(row.loss is not None and row.loss > 0 for row in found.rows)
    assert found.fitted_to == 96
    assert found.source["name"] == str(home / "model")
    assert found.model == str(home / "wider")
    stored = json.loads((tmp_path / "t-transfer.json").read_text())
    assert [row["score"] for row in stored["rows"]] == [row.score for row in found.rows]
    assert source.read_bytes() == before
    with pytest.raises(UserError, match="has this name: choose another --name"):
        transfer(target, source, steps=3, results_dir=tmp_path, name="t")


def test_without_the_adapter_the_host_is_itself(source: Path, home: Path, tmp_path: Path) -> None:
    """The row beside it is of the very model that was loaded, and not of an adapter of gains 0."""
    job = build_job(run_of(home, {"adapter": str(source), "train": "delta"}, model={"name": str(home / "wider")}))
    adapter: Any = job.adapter
    batch = job.task.collate(job.batches.rows(0), job.device)
    with torch.no_grad():
        adapter.model.eval()
        adapted = adapter.model(**batch.inputs).logits
        with adapter.host.absent():
            plain = adapter.model(**batch.inputs).logits
            assert not any("Routed" in type(module).__name__ for module in adapter.model.modules())
        assert torch.equal(adapter.model(**batch.inputs).logits, adapted)
    assert not torch.allclose(plain, adapted, atol=1e-4)


def test_the_command_says_what_it_measured(source: Path, home: Path, tmp_path: Path) -> None:
    args = ["transfer", "--adapter", str(source), "--run", str(home / "run.yaml"), "--steps", "2", "--name", "t"]
    lifted = ["unihyperlora.max_extra_flops=100", f"model.name={home / 'wider'!s}"]
    done = CliRunner().invoke(app, [*args, "--results-dir", str(tmp_path), *lifted])
    assert done.exit_code == 0, done.output
    assert "zero-shot: no step is taken; the head's output layer is fitted by ridge regression to 96" in done.output
    for what in ("no adapter, zero-shot", "adapter, delta trained", "LoRA r 8, as many"):
        assert what in done.output
    missing = CliRunner().invoke(app, ["transfer", "--run", "lora_mnli"])
    assert isinstance(missing.exception, UserError)
    assert "transfer needs --adapter FILE" in str(missing.exception)


# ---- on a model of the user's own --------------------------------------------------------------


def load_host(folder: Path) -> nn.Module:
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()


def test_load_adapter_gives_what_the_run_had(source: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = build_job(run_of(home, model={"name": str(home / "model")}))
    job.adapter.load(source.parent)
    batch = job.task.collate(job.batches.rows(0), job.device)
    model = load_host(home / "model")
    with torch.no_grad():
        want = job.adapter.model.eval()(**batch.inputs).logits
        loaded = fastpeft.load_adapter(model, source.parent, task="source")
        torch.testing.assert_close(model(**batch.inputs).logits, want, rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    assert f"adapter of {source.stat().st_size / 2**20:.3f} MB on 12 matrices" in printed
    assert "the head is that of" in printed
    loaded.detach()
    assert type(model.bert.encoder.layer[0].output.dense) is nn.Linear


def test_load_adapter_onto_another_host(source: Path, home: Path, tmp_path: Path) -> None:
    model = load_host(home / "wider")
    loaded = fastpeft.load_adapter(model, source, quiet=True)
    assert len(loaded.host.sites) == 18
    assert any("is of another host: the model's own head is used" in note for note in loaded.notes)
    (tmp_path / "bad").write_bytes(source.read_bytes()[:-4])
    with pytest.raises(UserError, match="is damaged"):
        fastpeft.load_adapter(model, tmp_path / "bad")
