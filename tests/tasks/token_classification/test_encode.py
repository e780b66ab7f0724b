"""Sentences as word pieces: where the labels stand, windows, and predictions back on the words."""

import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.data.batches import IGNORE, evaluation_batches
from fastpeft.data.rows import DataError
from fastpeft.errors import UserError
from fastpeft.tasks.token_classification.conll import read_conll
from fastpeft.tasks.token_classification.encode import EncodedSentences, collate_tokens, encode_sentences, windows
from fastpeft.tasks.token_classification.schemes import label_names, to_iob2
from fastpeft.tasks.token_classification.sentences import Sentences
from tests.support.tagged_sentences import TOKENIZERS, WNUT17, sentences, tokenizer
from tests.support.tiny import FAMILIES, save_tokenizer

LABELS = label_names(("LOC", "PER"))
SOME = sentences(
    "Anna/B-PER Lundqvist/I-PER lives/O in/O Oslo/B-LOC ./O",
    "Trondheim/B-LOC ,/O says/O Berg/B-PER ./O",
    "nobody/O",
)


def labels_of(encoded: EncodedSentences) -> list[list[int]]:
    """Of each row."""
    return [row.tolist() for row in np.split(encoded.labels, encoded.offsets[1:-1])]


def put_back(encoded: EncodedSentences) -> list[list[int]]:
    """The gold labels, back on the words; -1 where there is none."""
    return [words.tolist() for words in encoded.on_words(encoded.labels[encoded.labels != IGNORE], missing=-1)]


def numbers(read: Sentences, names: tuple[str, ...] = LABELS) -> list[list[int]]:
    return [[names.index(tag) for tag in tags] for tags in read.tags]


@pytest.mark.parametrize("kind", TOKENIZERS[:3])
def test_pieces_and_labels_are_those_of_words_that_are_split_already(kind):
    pieces = tokenizer(kind)
    encoded = encode_sentences(SOME, LABELS, pieces, 64)
    wanted = pieces(SOME.words, is_split_into_words=True)
    assert np.split(encoded.tokens, encoded.offsets[1:-1])[0].tolist() == wanted["input_ids"][0]
    assert encoded.tokens.tolist() == [token for row in wanted["input_ids"] for token in row]
    for row, (labels, gold) in enumerate(zip(labels_of(encoded), numbers(SOME))):
        words = wanted.word_ids(row)
        first = [word is not None and word not in words[:i] for i, word in enumerate(words)]
        assert labels == [gold[word] if is_first else IGNORE for word, is_first in zip(words, first)]
    assert len(encoded.tokens) > len(encoded.word) + 2 * len(SOME)  # some words have several pieces


def test_bytes_without_a_leading_space_get_the_one_that_running_text_has():
    pieces, spaced = tokenizer("bytes"), tokenizer("bytes with a space")
    assert pieces.get_vocab() == spaced.get_vocab()
    encoded = encode_sentences(SOME, LABELS, pieces, 64)
    assert encoded.tokens.tolist() == encode_sentences(SOME, LABELS, spaced, 64).tokens.tolist()
    assert put_back(encoded) == numbers(SOME)


@pytest.mark.parametrize("name", ["ByT5Tokenizer", "CanineTokenizer"])
def test_slow_tokenizers_take_the_same_way(name):
    import transformers

    slow = getattr(transformers, name)()
    assert not slow.is_fast
    encoded = encode_sentences(SOME, LABELS, slow, 64)
    assert put_back(encoded) == numbers(SOME)
    assert encoded.num_windowed == 0
    assert encoded.tokens[: encoded.offsets[1]].tolist() == slow("".join(SOME.words[0]))["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_encoder_familys_special_tokens_stand_at_the_ends_without_labels(tmp_path, family):
    import transformers

    save_tokenizer(tmp_path, family)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    read = sentences("the/O dog/B-PER ran/O", "a/O cat/B-LOC")
    encoded = encode_sentences(read, LABELS, words, 16, segments=True)
    assert labels_of(encoded) == [[IGNORE, 0, 3, 0, IGNORE], [IGNORE, 0, 1, IGNORE]]
    assert [encoded.tokens[i] for i in (0, 4)] == [words.cls_token_id, words.sep_token_id]
    assert encoded.segments is not None
    assert encoded.segments.tolist() == [0] * 9
    assert encoded.pad_token == words.pad_token_id


@pytest.mark.parametrize("kind", ["word pieces", "bytes"])
def test_the_name_of_a_special_token_is_a_word_like_others(kind):
    pieces = tokenizer(kind)
    encoded = encode_sentences(sentences("</s>/O Oslo/B-LOC"), LABELS, pieces, 64)
    assert encoded.tokens[1:-1].tolist().count(pieces.eos_token_id) == 0
    assert put_back(encoded) == [[0, 1]]


def test_words_without_a_piece_have_no_label_and_come_back_as_what_is_missing():
    read = sentences("\ufe0f/O Anna/B-PER \ufe0f/I-PER ./O", "\ufe0f/B-LOC")
    encoded = encode_sentences(read, LABELS, tokenizer("word pieces"), 64)
    assert (len(encoded), encoded.num_words_without_piece) == (1, 3)
    assert put_back(encoded) == [[-1, 3, -1, 0], [-1]]
    assert [row.tolist() for row in encoded.on_words(np.zeros(2, np.int64))] == [[0] * 4, [0]]


def test_a_split_without_any_word_piece_is_refused():
    with pytest.raises(DataError, match="has no word piece for any of its words"):
        encode_sentences(sentences("\ufe0f/O"), LABELS, tokenizer("word pieces"), 64)


def test_a_tag_that_training_lacks_is_named_with_its_place():
    with pytest.raises(DataError, match=r"here:2: the sentence has the unknown tag 'B-ORG'; known: O, B-LOC"):
        encode_sentences(sentences("a/O", "b/B-ORG"), LABELS, tokenizer("word pieces"), 64)


def test_a_length_without_room_for_a_word_is_refused():
    with pytest.raises(UserError, match=r"dataset\.max_length 2: leaves no room for a word beside 2 special tokens"):
        encode_sentences(SOME, LABELS, tokenizer("word pieces"), 2)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("max_length", [3, 4, 7, 16, 40])
def test_windows_drop_no_gold_and_label_no_word_twice(kind, max_length, seed):
    rng = random.Random(seed)
    words = sorted({word for sentence in SOME.words for word in sentence})
    lines = [
        " ".join(f"{rng.choice(words)}/{rng.choice(LABELS)}" for _ in range(rng.randint(1, 60))) for _ in range(12)
    ]
    read = sentences(*lines)
    encoded = encode_sentences(read, LABELS, tokenizer(kind), max_length)
    assert encoded.lengths.max() <= max_length
    assert put_back(encoded) == numbers(read)
    assert len(encoded.word) == read.num_words
    whole = encode_sentences(read, LABELS, tokenizer(kind), 10_000)
    assert (len(whole), whole.num_windowed) == (len(read), 0)
    assert encoded.num_windowed == (whole.lengths > max_length).sum() > 0
    assert all(any(label != IGNORE for label in row) for row in labels_of(encoded))


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    room=st.integers(1, 24),
)
@settings(max_examples=300, deadline=None)
def test_each_words_first_piece_has_its_label_in_one_window_that_holds_it(lengths, room):
    ends = np.cumsum(lengths)
    first, num_pieces = ends - lengths, int(ends[-1])
    seen = []
    for start, end, labelled_from, labelled_to in windows(first, num_pieces, room):
        assert 0 < end - start <= room
        assert start in first
        own = first[(first >= labelled_from) & (first < labelled_to)]
        assert ((own >= start) & (own < end)).all()
        seen += own.tolist()
    assert seen == first.tolist()


def test_windows_give_context_on_both_sides_of_what_they_label():
    cut = list(windows(np.arange(100), 100, 40))
    assert cut == [(0, 40, 0, 35), (30, 70, 35, 65), (60, 100, 65, 100)]


def test_a_batch_pads_tokens_and_labels_and_lists_where_labels_stand():
    encoded = encode_sentences(SOME, LABELS, tokenizer("word pieces"), 64, segments=True)
    rows = np.array([2, 0])
    batch = collate_tokens(encoded, rows, torch.device("cpu"))
    width = batch.labels.shape[1]
    assert width % 8 == 0
    assert set(batch.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(tensor.shape == (2, width) for tensor in batch.inputs.values())
    for i, row in enumerate(rows):
        start, end = encoded.offsets[row], encoded.offsets[row + 1]
        length = end - start
        assert batch.inputs["input_ids"][i, :length].tolist() == encoded.tokens[start:end].tolist()
        assert batch.labels[i, :length].tolist() == encoded.labels[start:end].tolist()
        assert batch.inputs["attention_mask"][i].tolist() == [1] * length + [0] * (width - length)
        assert (batch.inputs["input_ids"][i, length:] == encoded.pad_token).all()
        assert (batch.labels[i, length:] == IGNORE).all()
    assert batch.num_tokens == encoded.lengths[rows].sum()
    assert batch.rows is not None
    assert (batch.labels.flatten()[batch.rows] != IGNORE).all()
    assert len(batch.rows) == (batch.labels != IGNORE).sum()


def test_labels_read_from_batches_in_any_order_come_back_to_their_words():
    encoded = encode_sentences(SOME, LABELS, tokenizer("word pieces"), 12)
    assert encoded.num_windowed
    predicted = np.full(len(encoded.word), -1)
    for rows in evaluation_batches(encoded, 16):
        batch = collate_tokens(encoded, rows, torch.device("cpu"))
        assert batch.rows is not None
        predicted[encoded.labelled(rows)] = batch.labels.flatten()[batch.rows].numpy()
    assert [row.tolist() for row in encoded.on_words(predicted)] == numbers(SOME)


@pytest.mark.skipif(not WNUT17.is_dir(), reason="the shared WNUT-17 files are not there")
def test_wnut17_comes_back_whole_from_short_windows_and_fast():
    read = to_iob2(read_conll(WNUT17 / "emerging.dev.conll"))
    names = label_names(read.types)
    pieces = tokenizer("word pieces")
    started = time.perf_counter()
    encoded = encode_sentences(read.sentences, names, pieces, 24)
    assert time.perf_counter() - started < 10
    assert encoded.num_words_without_piece == 4
    assert encoded.num_windowed > 100
    lost = [
        word for words, back in zip(read.sentences.words, put_back(encoded)) for word, n in zip(words, back) if n == -1
    ]
    assert lost == ["\ufe0f"] * 4
    back = [[0 if n == -1 else n for n in row] for row in put_back(encoded)]
    assert back == numbers(read.sentences, names)
