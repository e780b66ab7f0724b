"""The widths that batches are padded to are the best ones, and a bucket's tensors hold what its batch does."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from fastpeft.data.batches import IGNORE, Batch, Batches, TokenRows
from fastpeft.trainer.buckets import Bucket, StaticBatch, choose_widths, in_few_widths


def padding(widths: np.ndarray, chosen: tuple[int, ...]) -> int:
    return int((np.array(chosen)[np.searchsorted(chosen, widths)] - widths).sum())


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_no_other_widths_pad_less(most: int) -> None:
    rng = np.random.default_rng(most)
    for _ in range(40):
        widths = 8 * rng.integers(1, rng.integers(3, 14), rng.integers(1, 40))
        found, distinct = choose_widths(widths, most), np.unique(widths)
        assert list(found) == sorted(set(found))
        assert len(found) <= most
        assert found[-1] == distinct[-1]
        others = ((*chosen, distinct[-1]) for count in range(most) for chosen in combinations(distinct[:-1], count))
        assert padding(widths, found) == min(padding(widths, other) for other in others)


def test_rows_are_padded_to_the_next_of_few_widths() -> None:
    lengths = np.array([3, 5, 8, 8, 9, 13, 13, 20, 21, 21])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = TokenRows(tokens=np.arange(offsets[-1]), offsets=offsets, pad_token=0, max_length=64, width_multiple=4)
    few = in_few_widths(Batches(rows, 2, 0))
    assert few.only_widths
    assert set(few.only_widths) <= set(rows.widths.tolist())
    assert (few.widths >= lengths).all()
    assert few.widths.max() == rows.widths.max() == 24
    assert [few.shape(np.array([i]))[1] for i in range(len(rows))] == few.widths.tolist()
    same = zip(Batches(rows, 2, 0).epoch(0), Batches(few, 2, 0).epoch(0))
    assert all(np.array_equal(a, b) for a, b in same)


def test_places_with_a_label_come_first_and_others_fill_up() -> None:
    bucket = Bucket(num_rows=2, width=4, num_items=None, num_places=6)
    first = torch.tensor([[IGNORE, 7, IGNORE, 5], [IGNORE, IGNORE, 4, IGNORE]])
    sample = Batch({"input_ids": torch.arange(8).view(2, 4)}, first, num_tokens=8, rows=torch.tensor([1, 3, 6]))
    static = StaticBatch(bucket, sample)
    where = None
    for labels in (first, first.flip(0), torch.full((2, 4), IGNORE).index_fill_(1, torch.tensor([2]), 9)):
        ids = torch.randint(100, (2, 4))
        static.fill(Batch({"input_ids": ids}, labels, 8, rows=torch.tensor([0])), num_items=3)
        batch = static.batch()
        assert batch.rows is not None
        wanted = (labels.flatten() != IGNORE).nonzero()[:, 0].tolist()
        places = batch.rows.tolist()
        assert places[: len(wanted)] == wanted
        assert len(set(places)) == bucket.num_places
        assert torch.equal(batch.inputs["input_ids"], ids)
        assert torch.equal(batch.labels, labels)
        assert int(static.num_items) == 3
        assert where in (None, batch.labels.data_ptr())
        where = batch.labels.data_ptr()
    assert bucket.takes(6)
    assert not bucket.takes(7)


def test_a_bucket_of_rows_takes_its_own_count_alone() -> None:
    bucket = Bucket(num_rows=2, width=4, num_items=2, num_places=64)
    sample = Batch({"input_ids": torch.zeros(2, 4)}, torch.tensor([0, 1]), num_tokens=8)
    static = StaticBatch(bucket, sample)
    static.fill(sample, 2)
    assert static.batch().rows is None
    assert static.num_items == 2
    assert bucket.takes(2)
    assert not bucket.takes(1)
