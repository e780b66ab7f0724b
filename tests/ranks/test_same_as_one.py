"""Several ranks train what one process trains on the same batches: in float64 up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.conftest import Ranks
from tests.support.every_kind import ALL_KINDS
from tests.support.rank_runs import assert_same, files_of
from tests.support.rank_work import trained


def both(files: Path, kind: str, ranks: Ranks, size: int = 2, **sections: Any) -> None:
    """Train alone and on ranks; everything that is logged and saved has to be the same."""
    sections = {"adapter": {"dropout": 0.0}} | sections
    (alone,) = ranks(1)(trained, files, kind, "alone", sections)
    results = ranks(size)(trained, files, kind, "ranks", sections)
    assert all(result == results[0] for result in results)
    assert_same(files, alone, results[0])


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
