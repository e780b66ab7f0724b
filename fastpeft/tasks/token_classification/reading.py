"""From a dataset to sentences whose tags are IOB2: files in columns of words, or rows that hold lists."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fastpeft.config.schema import DatasetConfig
from fastpeft.data.rows import DataError, configured_columns
from fastpeft.data.source import TEST, TRAIN, VALIDATION, Source
from fastpeft.data.split_files import SUFFIXES
from fastpeft.data.splitting import held_out_note, hold_out, shared_note
from fastpeft.data.text_files import format_of
from fastpeft.tasks.token_classification.conll import (
    CONLL_SUFFIXES,
    TAG_COLUMN,
    WORD_COLUMN,
    looks_like_conll,
    read_conll,
)
from fastpeft.tasks.token_classification.schemes import OUTSIDE, label_names, to_iob2
from fastpeft.tasks.token_classification.sentences import Sentences, choose_columns, sentences_from_rows


@dataclass(frozen=True)
class TaggedSplits:
    name: str
    label_names: tuple[str, ...]
    """O, then B- and I- of each entity type."""
    train: Sentences
    validation: Sentences
    test: Sentences | None
    """Scored once, when all else is done."""
    notes: tuple[str, ...] = ()


def holds_tagged_words(config: DatasetConfig, source: Source) -> str | None:
    """Why the training rows are words with tags; None where they are not."""
    path = source.path(TRAIN)
    if path is not None and _in_columns(config, path):
        return f"{path.name} has a word and its tag on each line"
    split = source.read(TRAIN)
    try:
        words, tags = choose_columns(split, *_configured(config, source))
    except DataError:
        return None
    pairs = [(row.values.get(words), row.values.get(tags)) for row in split.rows]
    lists = [(w, t) for w, t in pairs if isinstance(w, (list, tuple)) and isinstance(t, (list, tuple))]
    alike = all(len(w) == len(t) and all(isinstance(word, str) for word in w) for w, t in lists)
    if not lists or not alike:
        return None
    return f"column {words!r} holds lists of words, and {tags!r} a tag for each"


def read_tagged_splits(config: DatasetConfig, source: Source) -> TaggedSplits:
    """The scheme is told from the training split and holds for the others.

    Raises:
        DataError: a missing split, a malformed line or row, tags of another scheme.
    """
    train = to_iob2(_read(config, source, TRAIN), config.scheme)
    wanted = [VALIDATION] * (not source.needs_held_out) + [TEST] * source.has(TEST)
    others = {split: to_iob2(_read(config, source, split), train.scheme) for split in wanted}
    every = {TRAIN: train} | others
    notes = [note for split in every.values() for note in (*split.sentences.notes, split.note)]
    notes += [
        f"{split.sentences.num_skipped:,} malformed sentences of the {name} split were skipped"
        for name, split in every.items()
        if split.sentences.num_skipped
    ]
    kept, validation = train.sentences, others[VALIDATION].sentences if VALIDATION in others else None
    if validation is None:
        kept, validation = _hold_out(kept, config.validation_fraction)
        count = len(validation)
        notes.append(held_out_note(source.name, count, len(train.sentences), "sentences", source.others))
    test = others[TEST].sentences if TEST in others else None
    for name, sentences in (("validation", validation), ("test", test)):
        notes += shared_note(kept.texts, sentences.texts, f"{name} sentences") if sentences is not None else []
    names = _label_names(config, *(split.types for split in every.values()))
    unseen = sorted({name for split in others.values() for name in split.types} - set(train.types))
    if unseen:
        notes.append(f"no training sentence has an entity of {', '.join(unseen)}: they count, and cannot be learnt")
    return TaggedSplits(source.name, names, kept, validation, test, tuple(notes))


def _label_names(config: DatasetConfig, *types: tuple[str, ...]) -> tuple[str, ...]:
    """Of dataset.labels, which may be entity types or tags, in their order; else sorted."""
    if not config.labels:
        return label_names(*types)
    given = list(config.labels)
    names = given if OUTSIDE in given else [OUTSIDE, *(f"{prefix}-{name}" for name in given for prefix in "BI")]
    lacking = sorted(set(label_names(*types)) - set(names))
    if lacking:
        raise DataError(
            f"dataset.labels: the data have the tags {', '.join(lacking)}, which are none of {', '.join(given)}. Name "
            "every entity type, or every tag"
        )
    return tuple(names)


def _read(config: DatasetConfig, source: Source, split: str) -> Sentences:
    path = source.path(split)
    if path is not None and _in_columns(config, path):
        word, tag = _numbers(config)
        return read_conll(path, word, tag, config.on_bad_row)
    words, tags = _configured(config, source)
    rows = source.read(split)
    column = choose_columns(rows, words, tags)[1]
    return sentences_from_rows(rows, words, tags, source.class_names(split, column), config.on_bad_row)


def _in_columns(config: DatasetConfig, path: Path) -> bool:
    """Whether a file has a word on each line: by its suffix, or by its lines, or because it is no other format."""
    suffix = format_of(path)
    nothing_else = suffix in CONLL_SUFFIXES or (config.task != "auto" and suffix not in SUFFIXES)
    return nothing_else or looks_like_conll(path)


def _configured(config: DatasetConfig, source: Source) -> tuple[str | None, str | None]:
    """(words column, tags column) as dataset.columns or what is known of the dataset names them."""
    known = dict(source.known.columns) if source.known else {}
    have = source.columns(TRAIN)
    given = {key: column for key, column in known.items() if column in have}
    given |= configured_columns(source.describe_split(TRAIN), have, config.columns)
    return given.get("text"), given.get("label")


def _numbers(config: DatasetConfig) -> tuple[int, int]:
    found = []
    for key, usual in (("text", WORD_COLUMN), ("label", TAG_COLUMN)):
        column = getattr(config.columns, key)
        if column is not None and not isinstance(column, int):
            raise DataError(
                f"dataset.columns.{key} is {column!r}, but a file with a word on each line has no column names: give "
                "the column's number, from 0"
            )
        found.append(usual if column is None else column)
    return found[0], found[1]


def _hold_out(sentences: Sentences, fraction: float) -> tuple[Sentences, Sentences]:
    types = [{tag[2:] for tag in tags if tag != OUTSIDE} for tags in sentences.tags]
    kept, held_out = hold_out(sentences.texts, types, fraction)
    if not kept:
        raise DataError(f"{sentences.source}: one sentence cannot be split into a training and a validation part")
    return replace(sentences.pick(kept), notes=()), replace(sentences.pick(held_out), notes=())
