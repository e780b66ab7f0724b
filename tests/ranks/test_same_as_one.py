"""Several ranks train what one process trains on the same batches: in float64 up to rounding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastpeft.runs.events import number
from tests.ranks.conftest import Ranks
from tests.support.every_kind import ALL_KINDS, run_of_kind
from tests.support.rank_work import trained
from tests.support.tiny import make_model
from tests.support.tiny_runs import strict_events, weights

NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXACT = {"rel_tol": 1e-12, "abs_tol": 1e-12}


def files_of(folder: Path, kind: str, dropout: bool = False) -> Path:
    """A run's files, the model in float64. Without dropout: which elements are dropped differs from rank to rank."""
    run = run_of_kind(folder, kind)
    if kind not in ("word-problems", "chat") and not dropout:
        make_model(Path(run.model.name), "bert", **NO_DROPOUT)
    file = Path(run.model.name) / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def both(files: Path, kind: str, ranks: Ranks, size: int = 2, **sections: Any) -> None:
    """Train alone and on ranks; everything that is logged and saved has to be the same."""
    sections = {"adapter": {"dropout": 0.0}} | sections
    (alone,) = ranks(1)(trained, files, kind, "alone", sections)
    results = ranks(size)(trained, files, kind, "ranks", sections)
    assert all(result == results[0] for result in results)
    assert_same(files, alone, results[0])


def assert_same(files: Path, alone: dict[str, Any], result: dict[str, Any]) -> None:
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
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
    lines = [(files / name / "predictions" / "last.jsonl").read_text().splitlines() for name in ("alone", "ranks")]
    assert len(lines[0]) > 1
    for one, other in zip(*lines, strict=True):
        assert rounded(json.loads(one)) == rounded(json.loads(other))


def rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return list(map(rounded, values))
    return float(f"{values:.11g}") if isinstance(values, float) else values


QUICK = "classification", "token-classification", "chat", "word-problems"
KINDS = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.soak) for kind in ALL_KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_what_one_does(kind: str, float64_ranks: Ranks, tmp_path: Path) -> None:
    both(files_of(tmp_path, kind), kind, float64_ranks)


@pytest.mark.parametrize(
    "regulariser",
    [
        {"estimator": "exact"},
        pytest.param({"estimator": "sketch"}, marks=pytest.mark.soak),
        pytest.param({"estimator": "lora_a", "warmup_learning_rate": 1e-2}, marks=pytest.mark.soak),
        pytest.param({"calibration": "inline"}, marks=pytest.mark.soak),
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_importances_are_those_of_all_ranks(regulariser: dict, float64_ranks: Ranks, tmp_path: Path) -> None:
    """The norm of a sum of gradients is measured, of which each rank has a part."""
    files = files_of(tmp_path, "classification")
    warmup = {"regulariser": {"warmup_steps": 4, **regulariser}, "schedule": {"warmup_steps": 2}}
    both(files, "classification", float64_ranks, method="iw_lora", budget="12steps", **warmup)


@pytest.mark.soak
def test_what_adalora_prunes_is_ranked_by_the_gradient_of_all_ranks(float64_ranks: Ranks, tmp_path: Path) -> None:
    own = {"initial_rank": 6, "target_rank": 3, "virtual_steps": 100}
    both(
        files_of(tmp_path, "classification"), "classification", float64_ranks,
        method="adalora", adalora=own, budget="8steps",
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["graff", *(pytest.param(n, marks=pytest.mark.soak) for n in ("fot", "bacon", "reactor"))]
)
def test_a_schedule_reads_the_signals_of_all_ranks(name: str, float64_ranks: Ranks, tmp_path: Path) -> None:
    own = {"fot": {"window": 1}, "graff": {"regret": "step"}}
    schedule = {"name": name, "warmup_steps": 1} | ({name: own[name]} if name in own else {})
    both(files_of(tmp_path, "classification"), "classification", float64_ranks, schedule=schedule, budget="14steps")


@pytest.mark.soak
def test_a_batch_with_fewer_rows_than_ranks(float64_ranks: Ranks, tmp_path: Path) -> None:
    """The last one of an epoch: 96 rows are 13 batches of 7 and one of 5, for six ranks."""
    schedule = {"name": "reactor", "warmup_steps": 1}
    files = files_of(tmp_path, "classification")
    both(files, "classification", float64_ranks, 6, training={"batch_size": 7}, budget="15steps", schedule=schedule)
