"""Several ranks train what one process trains on the same batches, in float64 up to rounding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastpeft.runs.events import number
from tests.support.every_kind import ALL_KINDS, run_of_kind
from tests.support.rank_processes import on_ranks
from tests.support.rank_work import trained
from tests.support.tiny import make_model
from tests.support.tiny_runs import strict_events, weights

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def files_of(folder: Path, kind: str) -> Path:
    """A run's files, the model in float64 and without dropout: which elements are dropped differs from rank to rank."""
    run = run_of_kind(folder, kind)
    if kind not in ("word-problems", "chat"):
        make_model(Path(run.model.name), "bert", **NO_DROPOUT)
    file = Path(run.model.name) / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def both(files: Path, kind: str, ranks: int = 2, **sections: Any) -> None:
    """Train alone and on ranks; everything that is logged and saved has to be the same."""
    sections = {"adapter": {"dropout": 0.0}} | sections
    (alone,) = on_ranks(1, trained, files, kind, "alone", sections, float64=True)
    results = on_ranks(ranks, trained, files, kind, "ranks", sections, float64=True)
    assert all(result == results[0] for result in results)
    assert_same(files, alone, results[0])


def assert_same(files: Path, alone: dict[str, Any], result: dict[str, Any]) -> None:
    for key in ("status", "tokens", "steps"):
        assert result[key] == alone[key]
    for key in ("metric", "best", "test"):
        assert rounded(result[key]) == rounded(alone[key])
    logs = [strict_events(files / name) for name in ("alone", "ranks")]
    steps = [[event for event in log if event["type"] == "step"] for log in logs]
    assert len(steps[0]) == len(steps[1]) == alone["steps"]
    for one, other in zip(*steps):
        for key in ("loss", "grad_norm", "lr", "penalty", "tokens"):
            assert math.isclose(number(one[key]), number(other[key]), rel_tol=1e-12, abs_tol=1e-12), (key, one, other)
    for adapter in ("adapter", "adapter_best"):
        expected, found = (weights(files / name, adapter) for name in ("alone", "ranks"))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
    predictions = [(files / name / "predictions" / "last.jsonl").read_text() for name in ("alone", "ranks")]
    assert predictions[0] == predictions[1]


def rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    return float(f"{values:.11g}") if isinstance(values, float) else values


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_two_ranks_train_what_one_does(kind: str, tmp_path: Path) -> None:
    both(files_of(tmp_path, kind), kind)
