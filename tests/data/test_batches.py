"""Order, sizes and contents of batches: every row once an epoch, nothing padded further than it must be."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.data.batches import (
    POOL_BATCHES,
    WIDTH_MULTIPLE,
    Batches,
    evaluation_batches,
    inputs_of,
    largest_evaluation_batch,
    micro_batches,
    split_by_width,
)
from fastpeft.tasks.sequences.examples import Encoded, Examples, collate, encode
from tests.support.tiny import FAMILIES, save_tokenizer

CPU = torch.device("cpu")
PAD = 99


def make_encoded(rng: np.random.Generator, num_rows: int, longest: int = 60, segments: bool = True) -> Encoded:
    """Rows of 1 to `longest` tokens; every token tells its row."""
    lengths = rng.integers(1, longest + 1, num_rows)
    return Encoded(
        tokens=np.repeat(np.arange(num_rows, dtype=np.int32) + 1000, lengths),
        segments=rng.integers(0, 2, lengths.sum()).astype(np.uint8) if segments else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=rng.integers(0, 3, num_rows),
        num_truncated=0,
        pad_token=PAD,
        max_length=longest,
    )


def make_rows(seed: int, num_rows: int, **settings) -> Encoded:
    return make_encoded(np.random.default_rng(seed), num_rows, **settings)


@given(
    num_rows=st.integers(1, 700),
    batch_size=st.sampled_from([1, 3, 8, 32]),
    draw=st.integers(0, 2**31),
    grouped=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_row_once_an_epoch(num_rows, batch_size, draw, grouped):
    batches = Batches(make_rows(draw, num_rows), batch_size, draw, grouped)
    for epoch in (0, 1):
        order = batches.epoch(epoch)
        assert len(order) == len(batches) == -(-num_rows // batch_size)
        assert sorted(np.concatenate(order)) == list(range(num_rows))
        sizes = sorted((len(rows) for rows in order), reverse=True)
        assert all(size == batch_size for size in sizes[:-1])
        assert sizes[-1] == num_rows - batch_size * (len(order) - 1)


@pytest.mark.parametrize("grouped", [False, True])
def test_order_is_a_function_of_seed_and_epoch(seed, grouped):
    encoded = make_rows(seed, 300)

    def order(seed, epoch, before=()):
        batches = Batches(encoded, 8, seed, grouped)
        for other in before:
            batches.epoch(other)
        return [rows.tolist() for rows in batches.epoch(epoch)]

    first = order(seed, 1)
    assert order(seed, 1, before=(0, 5, 1, 2)) == first
    assert order(seed, 0) != first
    assert order(seed + 1, 1) != first


def test_order_takes_no_global_randomness(seed):
    encoded = make_rows(seed, 100)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = Batches(encoded, 8, 1).epoch(0)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    np.random.seed(0)
    assert all((one == two).all() for one, two in zip(first, Batches(encoded, 8, 1).epoch(0)))


def test_position_counts_over_epochs(seed):
    batches = Batches(make_rows(seed, 50), 8, seed)
    expected = [rows for epoch in range(3) for rows in batches.epoch(epoch)]
    assert len(expected) == 3 * len(batches) == 21
    for position in np.random.default_rng(seed).permutation(21):
        assert (batches.rows(int(position)) == expected[position]).all()


def test_rows_of_a_grouped_batch_are_of_similar_length(seed):
    encoded = make_rows(seed, 8 * POOL_BATCHES)
    order = Batches(encoded, 8, seed, grouped=True).epoch(0)
    assert np.mean([np.ptp(encoded.lengths[rows]) for rows in order]) < 3  # 60 lengths over 64 batches
    assert [len(rows) for rows in order] == [8] * POOL_BATCHES


def test_rows_of_other_batches_are_drawn_whatever_their_length(seed):
    encoded = make_rows(seed, 8 * POOL_BATCHES)
    order = Batches(encoded, 8, seed).epoch(0)
    assert np.mean([np.ptp(encoded.lengths[rows]) for rows in order]) > 30
    means = np.array([encoded.lengths[rows].mean() for rows in order])
    expected = encoded.lengths.std() / np.sqrt(8)
    assert 0.7 * expected < means.std() < 1.3 * expected  # the mean of eight that have nothing to do with each other


def test_batches_of_all_lengths_come_early_and_late(seed):
    """Sorting by length must not turn an epoch into short texts first."""
    encoded = make_rows(seed, 8 * POOL_BATCHES)
    order = Batches(encoded, 8, seed, grouped=True).epoch(0)
    half = len(order) // 2
    early, late = (np.mean([encoded.lengths[rows].mean() for rows in part]) for part in (order[:half], order[half:]))
    assert abs(early - late) < 25


@given(
    num_rows=st.integers(1, 80),
    longest=st.sampled_from([1, 10, 100]),
    max_tokens=st.sampled_from([1, 16, 100, 10_000]),
    draw=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_micro_batches_keep_to_the_limit(num_rows, longest, max_tokens, draw):
    rng = np.random.default_rng(draw)
    encoded = make_encoded(rng, num_rows, longest)
    rows = rng.permutation(num_rows)[: rng.integers(1, num_rows + 1)]
    parts, full = micro_batches(encoded, rows, max_tokens), full_parts(encoded, rows, max_tokens)
    assert sorted(np.concatenate(parts)) == sorted(np.concatenate(full)) == sorted(rows)
    for part in [*parts, *full]:
        assert len(part) == 1 or area(encoded, part) <= max_tokens
    for part, following in pairwise(full):  # no part could have taken the next row as well
        assert (len(part) + 1) * encoded.widths[following].min() > max_tokens
    assert len(parts) == len(full)
    largest = max(area(encoded, part) for part in parts)
    assert largest <= max(area(encoded, part) for part in full)
    if len(parts) > 1 and largest > encoded.widths[rows].max():
        assert len(full_parts(encoded, rows, largest - 1)) > len(parts)


def full_parts(encoded, rows, max_tokens):
    return list(split_by_width(rows, encoded.lengths, encoded.widths, max_tokens))


def area(encoded, rows) -> int:
    return len(rows) * int(encoded.widths[rows].max())


def test_no_part_is_left_with_a_row_or_two():
    """Of 33 rows of 32 tokens 32 fill a micro-batch; two of 17 and 16 rows are as many."""
    encoded = dataclasses.replace(make_rows(0, 33), offsets=np.arange(34) * 32)
    assert [len(part) for part in micro_batches(encoded, np.arange(33), 1024)] == [17, 16]


@given(max_tokens=st.sampled_from([1, 40, 300]), draw=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_rows_that_are_not_padded_share_a_part_with_their_like(max_tokens, draw):
    encoded = dataclasses.replace(make_rows(draw, 40, longest=6), padded=False)
    parts = micro_batches(encoded, np.arange(40), max_tokens)
    assert sorted(np.concatenate(parts)) == list(range(40))
    for part in parts:
        assert len(set(encoded.lengths[part])) == 1
        assert len(part) == 1 or encoded.lengths[part].sum() <= max_tokens


@given(
    num_rows=st.integers(1, 80),
    longest=st.sampled_from([1, 10, 100]),
    max_tokens=st.sampled_from([1, 16, 100, 10_000]),
    draw=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_rows_without_padding_fill_a_part_by_their_own_tokens(num_rows, longest, max_tokens, draw):
    encoded = dataclasses.replace(make_encoded(np.random.default_rng(draw), num_rows, longest), varlen=True)
    parts = micro_batches(encoded, np.arange(num_rows), max_tokens)
    assert sorted(np.concatenate(parts)) == list(range(num_rows))
    for part in parts:
        assert len(part) == 1 or encoded.lengths[part].sum() <= max_tokens
        rows, width = encoded.shape(part)
        tokens = int(encoded.lengths[part].sum())
        assert rows == len(part)
        assert tokens <= rows * width < tokens + rows
        assert rows == 1 or rows * width // 2 < tokens, "half of a part that did not fit is less than it"


def test_rows_one_behind_another(seed):
    """Tokens and segments as they are, positions from 0 in each row, and where each begins."""
    encoded = dataclasses.replace(make_rows(seed, 6), varlen=True)
    rows = np.array([4, 1, 3])
    segments = np.arange(len(encoded.tokens)) % 2
    inputs = inputs_of(encoded, rows, CPU, segments)
    each = [slice(encoded.offsets[row], encoded.offsets[row + 1]) for row in rows]
    lengths = encoded.lengths[rows]
    sequences = inputs["attention_mask"]
    assert sequences.lengths == tuple(lengths)
    assert sequences.cu_seqlens.tolist() == [0, *np.cumsum(lengths)]
    assert sequences.cu_seqlens.dtype == torch.int32
    for name, values in (("input_ids", encoded.tokens), ("token_type_ids", segments)):
        assert inputs[name].tolist() == [np.concatenate([values[place] for place in each]).tolist()]
    assert inputs["position_ids"].tolist() == [[i for length in lengths for i in range(length)]]
    assert all(inputs[name].dtype == torch.int64 for name in ("input_ids", "token_type_ids", "position_ids"))


def test_evaluation_batches_cover_all_rows_once(seed):
    encoded = make_rows(seed, 500)
    groups = evaluation_batches(encoded, 512)
    assert sorted(np.concatenate(groups)) == list(range(500))
    assert all(len(rows) * encoded.lengths[rows].max() <= 512 for rows in groups)
    assert (np.diff(encoded.lengths[np.concatenate(groups)]) >= 0).all()


def test_the_largest_evaluation_batch_is_of_all_splits_and_not_the_last(seed):
    few, many = make_rows(seed, 20), make_rows(seed + 1, 500)
    split, rows = largest_evaluation_batch((few, None, many), 512)

    def area(rows_of, batch):
        return len(batch) * int(rows_of.widths[batch].max())

    areas = [area(each, batch) for each in (few, many) for batch in evaluation_batches(each, 512)]
    assert area(split, rows) == max(areas)
    assert max(areas) > area(many, evaluation_batches(many, 512)[-1])
    assert largest_evaluation_batch((few, None), 10**6)[0] is few


@pytest.mark.parametrize("segments", [True, False])
def test_collate(seed, segments):
    encoded = make_rows(seed, 40, longest=8 * WIDTH_MULTIPLE, segments=segments)
    rows = np.random.default_rng(seed).permutation(40)[:7]
    batch = collate(encoded, rows, CPU)
    names = ["input_ids", "attention_mask", "token_type_ids"] if segments else ["input_ids", "attention_mask"]
    assert list(batch.inputs) == names
    longest = encoded.lengths[rows].max()
    width = batch.inputs["input_ids"].shape[1]
    assert longest <= width < longest + WIDTH_MULTIPLE
    assert width % WIDTH_MULTIPLE == 0
    assert all(tensor.shape == (7, width) and tensor.dtype == torch.int64 for tensor in batch.inputs.values())
    assert batch.labels.tolist() == encoded.labels[rows].tolist()
    assert batch.num_tokens == encoded.lengths[rows].sum() == int(batch.inputs["attention_mask"].sum())
    for i, row in enumerate(rows):
        start, end = encoded.offsets[row], encoded.offsets[row + 1]
        length = end - start
        assert batch.inputs["input_ids"][i].tolist() == [1000 + row] * length + [PAD] * (width - length)
        assert batch.inputs["attention_mask"][i].tolist() == [1] * length + [0] * (width - length)
        if segments:
            expected = encoded.segments[start:end].tolist() + [0] * (width - length)
            assert batch.inputs["token_type_ids"][i].tolist() == expected


# ---- encode --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bert", "roberta"])
def tokenizer(request, tmp_path_factory):
    import transformers

    assert request.param in FAMILIES
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, request.param)
    return transformers.AutoTokenizer.from_pretrained(folder)


def pairs(*texts: tuple[str, str]) -> Examples:
    first, second = zip(*texts)
    return Examples(list(first), list(second), [i % 2 for i in range(len(texts))])


def test_encode_equals_the_tokenizer(tokenizer):
    examples = pairs(("the dog ran", "a cat slept"), ("dog", "no dog saw the cat"), ("zebra", "big"))
    encoded = encode(examples, tokenizer, 64, segments=True)
    assert len(encoded) == 3
    assert encoded.labels.tolist() == [0, 1, 0]
    assert encoded.pad_token == tokenizer.pad_token_id
    assert encoded.num_truncated == 0
    for i, (text, pair) in enumerate(zip(examples.text, examples.text_pair)):
        want = tokenizer(text, pair, return_token_type_ids=True)
        start, end = encoded.offsets[i], encoded.offsets[i + 1]
        assert encoded.tokens[start:end].tolist() == want["input_ids"]
        assert encoded.segments[start:end].tolist() == want["token_type_ids"]
    assert encode(examples, tokenizer, 64, segments=False).segments is None


def test_encode_single_texts(tokenizer):
    examples = Examples(["the dog ran", "a"], None, [0, 1])
    encoded = encode(examples, tokenizer, 64, segments=False)
    assert encoded.lengths.tolist() == [5, 3]


def test_nothing_is_padded_to_max_length(tokenizer):
    examples = Examples(["the dog ran", "a"], None, [0, 1])
    encoded = encode(examples, tokenizer, 64, segments=False)
    assert collate(encoded, np.array([0, 1]), CPU).inputs["input_ids"].shape == (2, WIDTH_MULTIPLE)


def test_truncated_rows_are_counted(tokenizer):
    """Of texts one under, at and one over the limit only the last is cut, for single texts and pairs."""
    special = tokenizer.num_special_tokens_to_add(pair=False)
    texts = [" ".join(["dog"] * (12 - special + extra)) for extra in (-1, 0, 1, 9)]
    encoded = encode(Examples(texts, None, [0, 0, 0, 0]), tokenizer, 12, segments=False)
    assert encoded.lengths.tolist() == [11, 12, 12, 12]
    assert encoded.num_truncated == 2
    special = tokenizer.num_special_tokens_to_add(pair=True)
    examples = pairs(*(("dog cat", " ".join(["ran"] * (10 - special + extra))) for extra in (-1, 0, 1, 9)))
    encoded = encode(examples, tokenizer, 12, segments=True)
    assert encoded.lengths.tolist() == [11, 12, 12, 12]
    assert encoded.num_truncated == 2
    end = tokenizer.sep_token_id
    assert all(encoded.tokens[last - 1] == end for last in encoded.offsets[1:])


def test_the_longer_text_of_a_pair_is_cut_first(tokenizer):
    special = tokenizer.num_special_tokens_to_add(pair=True)
    examples = pairs(("dog cat", " ".join(["ran"] * 30)), (" ".join(["ran"] * 30), "dog cat"))
    encoded = encode(examples, tokenizer, special + 8, segments=False)
    vocab = tokenizer.get_vocab()
    for i in range(2):
        tokens = encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]].tolist()
        assert vocab["dog"] in tokens
        assert vocab["cat"] in tokens
        assert tokens.count(vocab["ran"]) == 6


def test_on_a_cpu_nothing_is_rounded_up(seed):
    encoded = make_rows(seed, 200)
    for rows in Batches(encoded, 4, seed).epoch(0):
        inputs = collate(encoded.on(CPU), rows, CPU).inputs
        assert inputs["input_ids"].shape == (len(rows), encoded.lengths[rows].max())
    assert (encoded.on(torch.device("cuda")).widths == encoded.widths).all()
    assert (encoded.on(CPU).widths == encoded.lengths).all()


def test_rounding_up_never_pads_past_what_the_model_takes(seed):
    encoded = make_rows(seed, 200, longest=21)
    for rows in Batches(encoded, 4, seed).epoch(0):
        width = collate(encoded, rows, CPU).inputs["input_ids"].shape[1]
        longest = encoded.lengths[rows].max()
        assert longest <= width <= min(21, longest + WIDTH_MULTIPLE - 1)
        assert width == 21 or width % WIDTH_MULTIPLE == 0
