"""A checkpoint knows nothing of how many ranks wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.conftest import Ranks
from tests.support.every_kind import run_of_kind
from tests.support.rank_runs import assert_went_on, files_of
from tests.support.rank_work import trained
from tests.support.tiny_runs import assert_same_weights, weights

IW_LORA: dict[str, Any] = {
    "method": "iw_lora",
    "regulariser": {"warmup_steps": 3, "online": True},
    "budget": "8steps",
    "evaluation": {"every": "4steps"},
    "training": {"checkpoint_steps": 2},
}


@pytest.mark.parametrize("others", [1, pytest.param(4, marks=pytest.mark.soak)])
def test_a_run_of_two_ranks_goes_on_with_others(others: int, float64_ranks: Ranks, tmp_path: Path) -> None:
    """To what one process has at the end of an unbroken run, up to rounding."""
    files = files_of(tmp_path, "classification")
    sections = IW_LORA | {"adapter": {"dropout": 0.0}}
    (unbroken,) = float64_ranks(1)(trained, files, "classification", "unbroken", sections)
    stopped = float64_ranks(2)(trained, files, "classification", "r", sections, False, 4)
    assert [each["status"] for each in stopped] == ["stopped"] * 2
    assert 4 < stopped[0]["steps"] < 8
    result = float64_ranks(others)(trained, files, "classification", "r", sections, True)[0]
    assert_went_on(tmp_path, unbroken, result)


def test_as_many_ranks_go_on_to_the_same_bits(float64_ranks: Ranks, tmp_path: Path) -> None:
    """With dropout, whose masks are each rank's own."""
    files = files_of(tmp_path, "classification", dropout=True)
    unbroken = float64_ranks(2)(trained, files, "classification", "unbroken", IW_LORA)[0]
    float64_ranks(2)(trained, files, "classification", "r", IW_LORA, False, 4)
    result = float64_ranks(2)(trained, files, "classification", "r", IW_LORA, True)[0]
    assert (result["metric"], result["best"]) == (unbroken["metric"], unbroken["best"])
    for adapter in ("adapter", "adapter_best"):
        assert_same_weights(weights(tmp_path / "r", adapter), weights(tmp_path / "unbroken", adapter))


def test_dropout_is_drawn_by_each_rank_for_itself(float64_ranks: Ranks, tmp_path: Path) -> None:
    """Else the rows of one place in the ranks' batches would lose the same elements."""
    files = files_of(tmp_path, "classification", dropout=True)
    masks = float64_ranks(2)(drawn_in_a_step, files)
    assert not torch.equal(masks[0], masks[1])
    again = float64_ranks(2)(drawn_in_a_step, files)
    assert all(map(torch.equal, masks, again))


def drawn_in_a_step(files: Path) -> torch.Tensor:
    """Random numbers of a rank inside the passes of batch 3."""
    from fastpeft.ranks import join
    from fastpeft.trainer.build import build_job
    from fastpeft.trainer.interrupt import StopRequest
    from fastpeft.trainer.micro_batches import MicroBatches
    from fastpeft.trainer.rank_orders import Orders

    job = build_job(run_of_kind(files, "classification"), orders=Orders(join(), StopRequest()))
    before = torch.get_rng_state()
    drawn = MicroBatches(job, 3, "", print).until_it_fits(lambda: torch.rand(8))
    assert torch.equal(torch.get_rng_state(), before)
    return drawn
