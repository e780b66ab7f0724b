"""Sentences as word pieces with labels, and the mapping of predictions back to words.

A word's label stands on its first piece. Its other pieces, special tokens and padding have none. A word that has no
piece has no label either; whoever scores counts it as O.

Shapes: N rows, L tokens of the longest row of a batch, P pieces of a sentence, W words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastpeft import phases
from fastpeft.data.batches import IGNORE, Batch, TokenRows, concatenate, fill_up, flat_places, inputs_of, move
from fastpeft.data.rows import DataError
from fastpeft.data.token_cache import cached
from fastpeft.errors import UserError
from fastpeft.tasks.token_classification.sentences import Sentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERLAP = 0.25
"""Share of a window that the next one repeats. Half of it is context before the next window's labels, half behind the
labels of this one."""

_NUM_PROBES = 32


@dataclass(frozen=True, kw_only=True)
class EncodedSentences(TokenRows):
    """Row i is a sentence, or a window of one that is longer than the model takes."""

    segments: np.ndarray | None
    """Token type ids, for models that read them."""
    labels: np.ndarray
    """int32, one a token; IGNORE but at the first piece of each word."""
    sentence: np.ndarray
    """int32, one a labelled token in the order of `tokens`: the sentence that it is of."""
    word: np.ndarray
    """int32, likewise: its word in that sentence."""
    num_words: np.ndarray
    """int32, one a sentence."""
    num_windowed: int
    """Sentences that were longer than the model takes."""
    num_words_without_piece: int

    def labelled(self, rows: np.ndarray) -> np.ndarray:
        """Which of all labelled tokens those of `rows` are, row after row: collate_tokens lists them in this order."""
        starts = self._labelled_before
        parts = [np.arange(int(starts[row]), int(starts[row + 1])) for row in rows]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    @cached_property
    def _labelled_before(self) -> np.ndarray:
        """Labelled tokens before each row, and all of them."""
        return np.concatenate([[0], np.cumsum(self.labels != IGNORE)])[self.offsets]

    def on_words(self, predicted: np.ndarray, missing: int = 0) -> list[np.ndarray]:
        """Predicted labels, one a labelled token, as one array a sentence; `missing` for words that have no token."""
        starts = np.concatenate([[0], np.cumsum(self.num_words)])
        flat = np.full(starts[-1], missing, dtype=predicted.dtype)
        flat[starts[self.sentence] + self.word] = predicted
        return np.split(flat, starts[1:-1])


def encode_sentences(
    sentences: Sentences,
    label_names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    segments: bool = False,
) -> EncodedSentences:
    """Tokenise once, before training, or take the tokens from the cache; fast and slow tokenizers alike.

    Each distinct word is tokenised once, by itself: the pieces are those of is_split_into_words=True. A tokenizer that
    tells words apart by the space before them (RoBERTa's, GPT-2's) gets that space, as add_prefix_space=True would do.

    Sentences of more than `max_length` tokens become several rows, windows that overlap. Each word has its label in one
    of them, away from the edge.

    Raises:
        DataError: a tag that label_names lacks; sentences without any word piece.
        UserError: a max_length that leaves no room for a word.
    """
    found = cached(
        lambda: _arrays(sentences, label_names, tokenizer, max_length, segments),
        tokenizer,
        (column for both in zip(sentences.words, sentences.tags) for column in both),
        {"labels": list(label_names), "max_length": max_length, "segments": segments},
    )
    num_windowed, num_words_without_piece = found["counts"].tolist()
    return EncodedSentences(
        tokens=found["tokens"],
        offsets=found["offsets"],
        pad_token=_pad_token(tokenizer),
        max_length=max_length,
        segments=found["segments"] if segments else None,
        labels=found["labels"],
        sentence=found["sentence"],
        word=found["word"],
        num_words=found["num_words"],
        num_windowed=num_windowed,
        num_words_without_piece=num_words_without_piece,
    )


def _arrays(
    sentences: Sentences,
    label_names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    segments: bool,
) -> dict[str, np.ndarray]:
    """What EncodedSentences holds."""
    pieces = _WordPieces(sentences, tokenizer)
    frame = _Frame.of(tokenizer, pieces, segments)
    room = max_length - len(frame.before) - len(frame.after)
    if room < 1:
        raise UserError(
            f"dataset.max_length {max_length}: leaves no room for a word beside {max_length - room} special tokens; "
            "set it higher"
        )
    rows = _Rows(frame)
    for i, (words, ids) in enumerate(zip(sentences.words, _label_ids(sentences, label_names))):
        rows.add(i, [pieces.of_word[word] for word in words], ids, room)
        phases.progress(i + 1, len(sentences), "sentences")
    if not rows.tokens:
        raise DataError(f"{sentences.source}: model {tokenizer.name_or_path} has no word piece for any of its words")
    lengths = [len(row) for row in rows.tokens]
    arrays = {
        "tokens": concatenate(rows.tokens, np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "labels": concatenate(rows.labels, np.int32),
        "sentence": np.array(rows.sentence, dtype=np.int32),
        "word": np.array(rows.word, dtype=np.int32),
        "num_words": np.array([len(words) for words in sentences.words], dtype=np.int32),
        "counts": np.array([rows.num_windowed, rows.num_words_without_piece]),
    }
    return arrays | ({"segments": concatenate(rows.segments, np.uint8)} if segments else {})


def collate_tokens(encoded: EncodedSentences, rows: np.ndarray, device: torch.device) -> Batch:
    """Pad `rows` on the right to the longest of them, or put one behind another, and move them to `device`, without
    waiting for it.

    The labels are N x L, or 1 x T. `rows` of the batch are the positions that have one, of all of them flattened.
    """
    lengths, flat = encoded.lengths[rows], flat_places(encoded, rows)
    if encoded.varlen:
        inputs = inputs_of(encoded, rows, device, encoded.segments)
        labels = fill_up(encoded.labels[flat].astype(np.int64), encoded, rows, IGNORE)
        labelled = move(np.flatnonzero(labels != IGNORE), device)
        return Batch(inputs, move(labels[None], device), len(flat), labelled, inputs["attention_mask"])
    inside = np.arange(int(encoded.widths[rows].max())) < lengths[:, None]
    labels = _padded(encoded.labels[flat], inside, IGNORE)
    arrays = {
        "input_ids": _padded(encoded.tokens[flat], inside, encoded.pad_token),
        "attention_mask": inside.astype(np.int64),
    }
    if encoded.segments is not None:
        arrays["token_type_ids"] = _padded(encoded.segments[flat], inside, 0)
    inputs = {name: move(array, device) for name, array in arrays.items()}
    labelled = np.flatnonzero(labels != IGNORE)
    return Batch(inputs, move(labels, device), int(lengths.sum()), move(labelled, device))


def windows(first: np.ndarray, num_pieces: int, room: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a sentence that is longer than `room`: (start, end, from, to) of each window, in pieces.

    A window holds pieces start to end, and has the labels of the words whose first piece is in from to `to`. It starts
    with a word. Only the pieces of a word that is longer than a window by itself may be in none.

    Args:
        first: of each word, its first piece, rising.
        room: most pieces of a window.
    """
    start, labelled_from = 0, 0
    while True:
        end = min(start + room, num_pieces)
        later = first[first > start]
        if end == num_pieces or not len(later):
            yield start, end, labelled_from, num_pieces
            return
        overlapping = later[later <= end - round(OVERLAP * room)]
        next_start = int(overlapping[-1] if len(overlapping) else later[0])
        labelled_to = max(next_start, (next_start + end) // 2)
        yield start, end, labelled_from, labelled_to
        start, labelled_from = next_start, labelled_to


class _WordPieces:
    """`of_word` maps each word of the sentences to its pieces."""

    def __init__(self, sentences: Sentences, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.prefix = self._choose_prefix(sentences.words)
        words = list(dict.fromkeys(chain.from_iterable(sentences.words)))
        self.of_word: dict[str, list[int]] = dict(zip(words, self._pieces([self.prefix + word for word in words])))

    def _pieces(self, texts: list[str]) -> list[list[int]]:
        """Without special tokens. The name of one, written as a word, is text if the pieces allow it."""
        plain: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, split_special_tokens=True, **plain)["input_ids"] if texts else []

    def _choose_prefix(self, words: list[list[str]]) -> str:
        """What makes a word by itself the pieces that it is in running text: nothing, or a space before it."""
        pairs = [pair for sentence in words for pair in pairwise(sentence) if pair[0].isalpha() and pair[1].isalpha()]
        pairs = list(islice(dict.fromkeys(pairs), _NUM_PROBES)) or [("the", "of")]
        running = self._pieces([f"{first} {second}" for first, second in pairs])

        def num_equal(prefix: str) -> int:
            alone = self._pieces([prefix + second for _, second in pairs])
            return sum(bool(own) and text[-len(own) :] == own for text, own in zip(running, alone))

        return max(("", " "), key=num_equal)


@dataclass(frozen=True)
class _Frame:
    """The special tokens around a sentence, and the segments of all three."""

    before: list[int]
    after: list[int]
    segments: tuple[list[int], int, list[int]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, pieces: _WordPieces, segments: bool) -> _Frame:
        found = next(((word, own) for word, own in pieces.of_word.items() if own), None)
        if found is None:
            return cls([], [], ([], 0, []))
        word, own = found
        options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": segments}
        row = tokenizer(pieces.prefix + word, split_special_tokens=True, **options)
        ids = row["input_ids"]
        start = next(i for i in range(len(ids) + 1) if ids[i : i + len(own)] == own)
        end = start + len(own)
        types = row["token_type_ids"] if segments else [0] * len(ids)
        return cls(ids[:start], ids[end:], (types[:start], types[start], types[end:]))


class _Rows:
    """Collects the rows, and what is said of them."""

    def __init__(self, frame: _Frame) -> None:
        self.frame = frame
        self.tokens: list[list[int]] = []
        self.segments: list[list[int]] = []
        self.labels: list[list[int]] = []
        self.sentence: list[int] = []
        self.word: list[int] = []
        self.num_windowed = 0
        self.num_words_without_piece = 0

    def add(self, sentence: int, pieces: list[list[int]], ids: list[int], room: int) -> None:
        """A sentence, given the pieces and the label of each word."""
        flat, labels, words = [], [], []
        for word, (own, label) in enumerate(zip(pieces, ids)):
            if own:
                flat += own
                labels += [label] + [IGNORE] * (len(own) - 1)
                words.append(word)
        self.num_words_without_piece += len(pieces) - len(words)
        if not words:
            return
        self.sentence += [sentence] * len(words)
        self.word += words
        if len(flat) <= room:
            self._append(flat, labels)
            return
        self.num_windowed += 1
        first = np.flatnonzero(np.array(labels) != IGNORE)
        for start, end, labelled_from, labelled_to in windows(first, len(flat), room):
            own = [
                label if labelled_from <= position < labelled_to else IGNORE
                for position, label in enumerate(labels[start:end], start)
            ]
            if any(label != IGNORE for label in own):
                self._append(flat[start:end], own)

    def _append(self, pieces: list[int], labels: list[int]) -> None:
        before, after = self.frame.before, self.frame.after
        self.tokens.append([*before, *pieces, *after])
        self.labels.append([*[IGNORE] * len(before), *labels, *[IGNORE] * len(after)])
        first, middle, last = self.frame.segments
        self.segments.append([*first, *[middle] * len(pieces), *last])


def _label_ids(sentences: Sentences, label_names: Sequence[str]) -> Iterator[list[int]]:
    numbers = {name: i for i, name in enumerate(label_names)}
    for tags, where in zip(sentences.tags, sentences.where):
        try:
            yield [numbers[tag] for tag in tags]
        except KeyError as error:
            known = ", ".join(label_names)
            raise DataError(f"{where}: the sentence has the unknown tag {error.args[0]!r}; known: {known}") from None


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0  # masked wherever it stands


def _padded(values: np.ndarray, inside: np.ndarray, fill: int) -> np.ndarray:
    """The values of the rows, one after another, at the positions that are `inside`; int64."""
    padded = np.full(inside.shape, fill, dtype=np.int64)
    padded[inside] = values
    return padded
