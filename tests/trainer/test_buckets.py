"""The widths that batches are padded to are the best ones, packings take their batches and waste little, and a bucket's
tensors hold what its batch does."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from fastpeft.data.batches import IGNORE, Batch, Batches, Packing, TokenRows, inputs_of, micro_batches
from fastpeft.kernels.sequences import Sequences
from fastpeft.trainer.buckets import Bucket, StaticBatch, choose_packings, choose_widths, in_few_shapes


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
    few = in_few_shapes(Batches(rows, 2, 0))
    assert few.only_widths
    assert set(few.only_widths) <= set(rows.widths.tolist())
    assert (few.widths >= lengths).all()
    assert few.widths.max() == rows.widths.max() == 24
    assert [few.shape(np.array([i]))[1] for i in range(len(rows))] == few.widths.tolist()
    same = zip(Batches(rows, 2, 0).epoch(0), Batches(few, 2, 0).epoch(0))
    assert all(np.array_equal(a, b) for a, b in same)


def test_places_with_a_label_come_first_and_others_fill_up() -> None:
    bucket = Bucket((2, 4), num_items=None, num_places=6)
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
    bucket = Bucket((2, 4), num_items=2, num_places=64)
    sample = Batch({"input_ids": torch.zeros(2, 4)}, torch.tensor([0, 1]), num_tokens=8)
    static = StaticBatch(bucket, sample)
    static.fill(sample, 2)
    assert static.batch().rows is None
    assert static.num_items == 2
    assert bucket.takes(2)
    assert not bucket.takes(1)


# ---- rows one behind another -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "of one length", "a row each", "several texts a row"])
@pytest.mark.parametrize("multiple", [1, 64])
def test_every_batch_fits_a_packing(kind: str, multiple: int, fresh_seed: int) -> None:
    rng = np.random.default_rng(fresh_seed)
    batches = []
    for _ in range(60):
        if kind == "of one length":
            batches.append(np.full(8, rng.integers(1, 90)))
        else:
            count = {"a row each": 1, "several texts a row": rng.integers(8, 30)}.get(kind, 8)
            batches.append(rng.integers(1, rng.integers(2, 90), count))
    found = choose_packings(batches, 8, multiple)
    assert len(found) <= 30
    assert len({(packing.num_rows, packing.num_texts) for packing in found}) == 1
    assert len({packing.num_tokens for packing in found}) <= 10
    assert len({packing.longest for packing in found}) <= 3
    assert all(packing.num_tokens % multiple == 0 for packing in found)
    for lengths in batches:
        fitting = [packing for packing in found if packing.takes(lengths)]
        assert fitting
        for packing in fitting:
            filled = packing.fill(lengths)
            assert filled[: len(lengths)].tolist() == lengths.tolist()
            assert (len(filled), filled.sum()) == (packing.num_texts, packing.num_tokens)
            assert len(filled) > len(lengths)
            assert filled.min() >= 1
            assert filled.max() <= packing.longest


def test_few_tokens_of_random_batches_fill_them_up(fresh_seed: int) -> None:
    """Of MNLI's lengths, roughly, in batches of 32: within the tenth that padding to one length would be too much."""
    rng = np.random.default_rng(fresh_seed)
    batches = [np.clip(rng.gamma(4, 10, 32), 5, 128).astype(int) for _ in range(400)]
    found = choose_packings(batches, 32, 64)
    filled = sum(next(p.num_tokens for p in found if p.takes(b)) for b in batches)
    assert filled < 1.1 * sum(int(b.sum()) for b in batches)


def test_what_does_not_fit_a_packing() -> None:
    packing = Packing(num_rows=2, num_texts=3, num_tokens=12, longest=5)
    assert packing.takes(np.array([5, 4]))
    assert not packing.takes(np.array([6, 4])), "too long a text"
    assert not packing.takes(np.array([3, 3])), "six tokens to fill up, in a text of five"
    assert not packing.takes(np.array([4, 4, 4])), "no text left"
    assert not packing.takes(np.array([5, 5, 1])[:2] + 1), "no token left"


def packed_rows(lengths: list[int], *packings: Packing) -> TokenRows:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenRows(
        tokens=np.arange(1, offsets[-1] + 1),
        offsets=offsets,
        pad_token=0,
        max_length=64,
        varlen=True,
        packings=packings,
    )


def test_a_batch_is_filled_up_behind_its_rows() -> None:
    rows = packed_rows([3, 2, 6], Packing(2, 4, 10, 4), Packing(2, 4, 14, 6))
    inputs = inputs_of(rows, np.array([1, 0]), torch.device("cpu"), segments=np.ones(11, dtype=np.uint8))
    sequences = inputs["attention_mask"]
    assert inputs["input_ids"].tolist() == [[4, 5, 1, 2, 3, 0, 0, 0, 0, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 0, 1]]
    assert inputs["token_type_ids"].tolist() == [[1] * 5 + [0] * 5]
    assert sequences.cu_seqlens.tolist() == [0, 2, 5, 8, 10]
    assert (sequences.num_tokens, sequences.longest, sequences.num_read) == (10, 4, 2)
    assert sequences.lengths is None, "a step that is captured must not go by them"
    assert rows.num_tokens(np.array([1, 0])) == 10
    assert rows.num_tokens(np.array([0, 2])) == 14
    alone = inputs_of(rows, np.array([2]), torch.device("cpu"))
    assert alone["attention_mask"].lengths == (6,), "it is no batch of two rows"


def test_a_batch_that_is_too_large_filled_up_is_split() -> None:
    rows = packed_rows([3, 3], Packing(2, 3, 10, 4))
    both = np.array([0, 1])
    assert [part.tolist() for part in micro_batches(rows, both, 10)] == [[0, 1]]
    assert [part.tolist() for part in micro_batches(rows, both, 9)] == [[0], [1]]
    assert [part.tolist() for part in micro_batches(packed_rows([3, 3]), both, 6)] == [[0, 1]]


@pytest.mark.parametrize("has_mask", [True, False])
def test_what_was_made_of_other_lengths_is_not_kept(has_mask: bool) -> None:
    def batch(*ends: int) -> Batch:
        sequences = Sequences(torch.tensor(ends, dtype=torch.int32), num_tokens=6, longest=4, num_read=2)
        inputs = {"input_ids": torch.zeros(1, 6)} | ({"attention_mask": sequences} if has_mask else {})
        return Batch(inputs, torch.zeros(2), num_tokens=5, sequences=sequences)

    static = StaticBatch(Bucket(Packing(2, 3, 6, 4), 2, 64), batch(0, 1, 4, 6))
    where = None
    for ends in ((0, 1, 4, 6), (0, 3, 4, 6)):
        static.fill(batch(*ends), 2)
        found = static.batch()
        assert found.sequences is not None
        assert found.inputs.keys() == ({"input_ids", "attention_mask"} if has_mask else {"input_ids"})
        assert found.inputs.get("attention_mask", found.sequences) is found.sequences
        assert found.sequences.starts.tolist() == list(ends[:-1])
        assert where in (None, found.sequences.cu_seqlens.data_ptr())
        where = found.sequences.cu_seqlens.data_ptr()
