"""The scripts in examples/ run, each as a user runs it, in this process because torch is loaded here."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpeft.runs.store import RunFolder
from tests.support.doc_pages import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., str]:
    """Run one, in an empty folder; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_run_from_python_is_exported_and_loaded_without_fastpeft(example, tmp_path: Path, fewer_rows) -> None:
    said = example("train_from_python.py", "--budget", "2steps")
    assert "done after 2 steps" in said
    assert "stand-in" in said
    assert (tmp_path / "results" / "from-python" / "adapter_best" / "adapter_config.json").is_file()
    said = example("load_an_export.py", "--run", "from-python")
    assert float(said.split()[-1]) < 1e-4


def test_hugging_faces_trainer_trains_with_layers_of_fastpeft(example, tmp_path: Path) -> None:
    said = example("accelerate_hf_trainer.py", "--steps", "3")
    assert "LoRA layers swapped" in said
    assert (tmp_path / "results" / "hf-trainer" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_rate_over_a_budget_goes_on_where_it_was(example) -> None:
    whole = example("budget_lr.py", "--steps", "20")
    assert "after the last step the rate is 0.00e+00" in whole
    rates = [float(line.split()[4]) for line in whole.splitlines() if line.startswith("step")]
    assert rates[:5] == [1e-2] * 5
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < rates[5]


def test_rows_of_ones_own_are_learned(example, tmp_path: Path) -> None:
    said = example("own_data.py", "--budget", "2steps")
    assert "on bad, good" in said
    result = RunFolder.at(tmp_path / "results", "reviews").read_result()
    assert result is not None
    assert (result.status, result.labels) == ("done", ["bad", "good"])
