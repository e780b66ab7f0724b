"""From a dataset to conversations: which columns, which rows are bad, what is held out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastpeft.config.schema import DatasetConfig
from fastpeft.data.fingerprint import ReadRow
from fastpeft.data.rows import NUM_NAMED, DataError, Split, left_out_note
from fastpeft.data.source import TEST, TRAIN, VALIDATION, Source
from fastpeft.data.splitting import held_out_note, hold_out, sample, shared_note
from fastpeft.tasks.chat.conversations import Conversation, Role, RowFault, read_turns
from fastpeft.tasks.chat.row_forms import Form, choose_form, find_form


@dataclass(frozen=True)
class Conversations:
    rows: list[Conversation]
    source: str
    """Names it in messages."""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[tuple[str]]:
        """What the first answer of each is an answer to."""
        return [("\n".join(turn.text for turn in row.turns[: row.answers[0]]),) for row in self.rows]

    def sample(self, limit: int) -> Conversations:
        """As many, drawn at random, the same ones whatever the seed; 0 means all."""
        return self.pick(sample(len(self), limit)) if limit else self

    def pick(self, rows: Sequence[int]) -> Conversations:
        return dataclasses.replace(self, rows=[self.rows[row] for row in rows])

    def name_row(self, row: int) -> str:
        return f"{self.source}:{self.rows[row].line}"


@dataclass(frozen=True)
class ChatSplits:
    name: str
    form: Form
    train: Conversations
    validation: Conversations
    test: Conversations | None
    """Scored once, when all else is done."""
    notes: tuple[str, ...] = ()


def conversation_rows(conversations: Conversations, more: Sequence[str] = ()) -> Iterator[ReadRow]:
    """What each says, and what of it is to be learned.

    Args:
        more: decides too what a model reads of each, such as the text of a template.
    """
    for row in conversations.rows:
        answers = set(row.answers)
        roles, told = " ".join(turn.role for turn in row.turns), [json.dumps(tool) for tool in row.tools]
        for turn in (turn for i, turn in enumerate(row.turns) if i not in answers):
            told += [turn.text, *(json.dumps(call) for call in turn.calls)]
        wanted = (row.turns[i].reasoning + row.turns[i].text for i in row.answers)
        yield ReadRow((*more, roles, *told), tuple(wanted))


def holds_conversations(config: DatasetConfig, source: Source) -> str | None:
    """Why the training rows are conversations or instructions; None where they are not."""
    form = find_form(source.columns(TRAIN), asked=False)
    if form is None or "label" in source.columns(TRAIN):
        return None
    if form.answer is None:
        first = next((row.values.get(form.text) for row in source.read(TRAIN, [form.text]).rows if not row.fault), None)
        try:
            if not first or not read_turns(first, form.text):
                return None
        except RowFault as fault:
            if "role" not in str(fault):
                return None
    return f"its columns are those of {form.name}"


def read_chat_splits(config: DatasetConfig, source: Source) -> ChatSplits:
    """Without a validation split a part of the training rows is held out, and nothing that is asked there is trained.

    Raises:
        DataError: a missing split or column, a malformed row.
    """
    if config.labels is not None:
        raise DataError("dataset.labels: conversations have no labels; remove it")
    form = choose_form(
        source.describe_split(TRAIN),
        source.columns(TRAIN),
        config.columns,
        source.known.columns if source.known else {},
    )
    train, notes = _read(source.read(TRAIN), form, config.on_bad_row), []
    others = {
        split: _read(source.read(split), form, config.on_bad_row)
        for split in (VALIDATION, TEST)
        if source.has(split) and not (split == VALIDATION and source.needs_held_out)
    }
    for split in (train, *others.values()):
        notes += split.notes
    validation = others.get(VALIDATION)
    if validation is None:
        if len(train) < 2:
            raise DataError(f"{train.source}: one conversation cannot be split into a training and a validation part")
        kept, rows = hold_out(train.texts, [()] * len(train), config.validation_fraction)
        notes.append(held_out_note(source.name, len(rows), len(train), "conversations", source.others))
        train, validation = train.pick(kept), train.pick(rows)
    test = others.get(TEST)
    for name, split in (("validation", validation), ("test", test)):
        notes += shared_note(train.texts, split.texts, f"{name} conversations") if split is not None else []
    empty = sum(not row.turns[i].text.strip() for row in train.rows for i in row.answers)
    if empty:
        notes.append(f"{empty:,} answers of the training rows are empty: of them the end alone is learned")
    return ChatSplits(source.name, form, train, validation, test, tuple(notes))


def _read(split: Split, form: Form, on_bad_row: str) -> Conversations:
    """Bad rows are all looked for, so that the message, or the note, tells how many there are."""
    split.require_columns()
    rows, faults = [], []
    for row in split.rows:
        try:
            rows.append(form.read(row))
        except RowFault as fault:
            faults.append(f"{split.source}:{row.line}: {fault}")
    check_faults(faults, on_bad_row)
    if not rows:
        raise DataError(f"{split.source}: all {len(faults):,} rows are malformed; the first: {faults[0]}")
    note = (left_out_note(len(faults), "bad rows", faults[:NUM_NAMED]),) if faults else ()
    return Conversations(rows, split.source, (*split.notes, *note))


def check_faults(faults: Sequence[str], on_bad_row: str) -> None:
    """Raises DataError where there is one that is not to be passed over."""
    if faults and on_bad_row != "skip":
        others = f" (and {len(faults) - 1:,} more bad rows)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{others}. Mend the row, or set dataset.on_bad_row=skip")


def last_asked(row: Conversation) -> str:
    """By the user, before the last answer."""
    turns = row.turns[: row.answers[-1]]
    return next((turn.text for turn in reversed(turns) if turn.role == Role.USER), turns[-1].text if turns else "")
