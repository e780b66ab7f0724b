"""Runs of ranks that are compared with other runs of the same files, in float64 up to rounding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastpeft.runs.events import number
from tests.support.every_kind import run_of_kind
from tests.support.tiny import make_model
from tests.support.tiny_runs import steps_logged, strict_events, weights

NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXACT = {"rel_tol": 1e-12, "abs_tol": 1e-12}


def files_of(folder: Path, kind: str, dropout: bool = False, family: str = "bert", **settings: Any) -> Path:
    """A run's files, the model in float64. Without dropout: which elements are dropped differs from rank to rank."""
    run = run_of_kind(folder, kind)
    if kind not in ("word-problems", "chat") and not dropout:
        make_model(Path(run.model.name), family, **NO_DROPOUT | settings)
    file = Path(run.model.name) / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def assert_same(files: Path, alone: dict[str, Any], result: dict[str, Any]) -> None:
    """Of the runs `alone` and `ranks` in `files`: everything that is logged and saved."""
    for key in ("status", "tokens", "steps"):
        assert result[key] == alone[key]
    for key in ("metric", "best", "test"):
        assert rounded(result[key]) == rounded(alone[key])
    logs = [strict_events(files / name) for name in ("alone", "ranks")]
    steps = [[event for event in log if event["type"] == "step"] for log in logs]
    assert [len(each) for each in steps] == [alone["steps"]] * 2
    for one, other in zip(*steps):
        for key in ("loss", "grad_norm", "lr", "penalty", "tokens"):
            assert math.isclose(number(one[key]), number(other[key]), **EXACT), (key, one, other)
    importances = [[event["sensitivity"] for event in log if event["type"] == "importance"] for log in logs]
    torch.testing.assert_close(torch.tensor(importances[1]), torch.tensor(importances[0]), rtol=1e-12, atol=1e-12)
    for adapter in ("adapter", "adapter_best"):
        expected, found = (weights(files / name, adapter) for name in ("alone", "ranks"))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert tensor.dtype == torch.float64 or result["method"] == "sat_lora"  # which writes fewer bits
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
    lines = [(files / name / "predictions" / "last.jsonl").read_text().splitlines() for name in ("alone", "ranks")]
    assert len(lines[0]) > 1
    for one, other in zip(*lines, strict=True):
        assert rounded(json.loads(one)) == rounded(json.loads(other))


def assert_went_on(folder: Path, unbroken: dict[str, Any], result: dict[str, Any]) -> None:
    """Of the runs `unbroken` and `r` in `folder`, of eight steps: the second, which was stopped, is the first."""
    assert (result["status"], result["steps"], result["tokens"]) == ("done", 8, unbroken["tokens"])
    assert steps_logged(folder / "r") == list(range(8))
    torch.testing.assert_close(weights(folder / "r"), weights(folder / "unbroken"), rtol=1e-12, atol=1e-12)


def rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return list(map(rounded, values))
    return float(f"{values:.11g}") if isinstance(values, float) else values
