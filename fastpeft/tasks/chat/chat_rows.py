"""Conversations as tokens: which tokens have labels, and what is cut or omitted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastpeft import phases
from fastpeft.data.rows import NUM_NAMED, left_out_note
from fastpeft.data.token_cache import Arrays, cached
from fastpeft.data.tokenise import Ragged
from fastpeft.errors import UserError
from fastpeft.tasks.causal_lm.labelled_rows import LabelledRows
from fastpeft.tasks.chat.answer_spans import Rendered, Renderer, TrainOn
from fastpeft.tasks.chat.answer_tokens import token_rows
from fastpeft.tasks.chat.conversations import Conversation, RowFault
from fastpeft.tasks.chat.overflow import TokenRow, fitted
from fastpeft.tasks.chat.reading import Conversations, check_faults
from fastpeft.tasks.chat.templates import ChatTemplate

Overflow = Literal["drop", "truncate_left", "split"]
_PART, _PART_CHARACTERS = 1024, 2**23
"""Most conversations that are rendered and tokenised at a time, and most characters of all their prompts."""


@dataclass(frozen=True, kw_only=True)
class ChatRows(LabelledRows):
    is_labelled: np.ndarray
    """Of each token, bool. The first of a row is not."""
    sources: np.ndarray
    """Of each row, the index of its conversation."""

    @cached_property
    def num_labelled(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        counts = np.concatenate([[0], np.cumsum(self.is_labelled, dtype=np.int64)])
        return counts[self.offsets[1:]] - counts[self.offsets[:-1]]

    def places(self, row: int) -> np.ndarray:
        return np.flatnonzero(self.is_labelled[self.offsets[row] : self.offsets[row + 1]])


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What decides which tokens a conversation becomes."""

    max_length: int
    train_on: TrainOn = "assistant"
    overflow: Overflow = "drop"
    on_bad_row: Literal["error", "skip"] = "error"


def encode_chats(chats: Conversations, template: ChatTemplate, options: ChatOptions, what: str) -> ChatRows:
    """Render and tokenise, and bring what is too long into `options.max_length`.

    Args:
        what: the rows are called in notes: "training" or "validation".

    Raises:
        DataError: a conversation that the template does not write as it stands.
        UserError: no row that fits.
    """
    settings = {"template": template.text, "options": vars(options), "what": what, "code": _code()}
    found = cached(
        lambda: _arrays(chats, template, options), template.tokenizer, ([row.key for row in chats.rows],), settings
    )
    faults = [f"{chats.name_row(int(row))}: {text}" for row, text in zip(found["bad"], _texts(found["faults"]))]
    if len(faults) == len(chats) and (len(chats) > 1 or options.on_bad_row == "skip"):
        raise UserError(
            f"{faults[0]}. The template takes none of the {len(chats):,} {what} conversations: set another "
            "dataset.template, or mend the rows"
        )
    check_faults(faults, options.on_bad_row)
    if not len(found["sources"]):
        raise UserError(
            f"dataset.max_length: none of {len(chats):,} {what} conversations has a token to learn within "
            f"{options.max_length:,} tokens. Set it higher, or dataset.overflow=truncate_left"
        )
    notes = [left_out_note(len(faults), f"{what} rows that the template does not take", faults[:NUM_NAMED])]
    notes = [*(notes if faults else []), *_notes(found, template, options, what)]
    pad = template.tokenizer.pad_token_id
    return ChatRows(
        tokens=found["tokens"],
        offsets=found["offsets"],
        pad_token=template.tokenizer.eos_token_id if pad is None else pad,
        max_length=options.max_length,
        is_labelled=found["labelled"].view(bool),
        sources=found["sources"],
        notes=tuple(notes),
    )


def _arrays(chats: Conversations, template: ChatTemplate, options: ChatOptions) -> Arrays:
    renderer = Renderer(template, options.train_on)
    rows: list[TokenRow] = []
    sources, bad, faults, counts = [], [], [], np.zeros(len(_COUNTS), dtype=np.int64)
    lead = ""
    for i, made, found in _rendered(chats, renderer):
        if isinstance(made, RowFault):
            bad.append(i)
            faults.append(str(made))
            continue
        kept, lost = fitted(made, options.max_length, options.overflow)
        counts += [
            found.trimmed,
            found.stripped,
            len(found.rows) > 1,
            len(made) > len(found.rows),
            lost.num_rows > 0,
            sum(len(row.tokens) for row in made),
            lost.num_tokens,
            sum(row.labelled.count(True) for row in made),
            lost.num_labelled,
            not kept,
        ]
        lead = lead or found.lead
        rows += kept
        sources += [i] * len(kept)
    tokens = Ragged.of([row.tokens for row in rows])
    labelled = Ragged.of([row.labelled for row in rows])
    return {
        "tokens": tokens.flat,
        "offsets": tokens.offsets,
        "labelled": labelled.flat.astype(np.uint8),
        "sources": np.array(sources, dtype=np.int64),
        "bad": np.array(bad, dtype=np.int64),
        "faults": np.frombuffer("\0".join(faults).encode(), dtype=np.uint8),
        "counts": counts,
        "lead": np.frombuffer(lead.encode(), dtype=np.uint8),
    }


def _rendered(chats: Conversations, renderer: Renderer) -> Iterator[tuple[int, Any, Any]]:
    """(index, its token rows or what is wrong with it, what it was rendered to).

    A tokenizer works without Python's lock: while one part is tokenised, the next one is rendered.
    """
    with ThreadPoolExecutor(1) as thread:
        before: tuple[int, list[Any], Future[list[Any]]] | None = None
        for start, end in _parts(chats.rows):
            found = renderer.render_all(chats.rows[start:end])
            good = [row for one in found if not isinstance(one, RowFault) for row in one.rows]
            made = thread.submit(_tokenised, good, renderer.template)
            if before is not None:
                yield from _matched(*before)
            before = start, found, made
            phases.progress(end, len(chats), "conversations")
        if before is not None:
            yield from _matched(*before)


def _parts(rows: Sequence[Conversation]) -> Iterator[tuple[int, int]]:
    """From and to. Each answer has a prompt of its own: of long conversations a few fill the memory of many short."""
    start = size = 0
    for i, row in enumerate(rows):
        own = len(row.answers) * sum(len(turn.text) for turn in row.turns)
        if i > start and (i - start == _PART or size + own > _PART_CHARACTERS):
            yield start, i
            start, size = i, 0
        size += own
    if rows:
        yield start, len(rows)


def _matched(start: int, found: list[Any], future: Future[list[Any]]) -> Iterator[tuple[int, Any, Any]]:
    made = iter(future.result())
    for i, one in enumerate(found, start):
        if isinstance(one, RowFault):
            yield i, one, None
            continue
        own = [next(made) for _ in one.rows]
        fault = next((row for row in own if isinstance(row, RowFault)), None)
        yield i, fault or [row for rows in own if not isinstance(rows, RowFault) for row in rows], one


def _tokenised(rows: list[Rendered], template: ChatTemplate) -> list[list[TokenRow] | RowFault]:
    try:
        return [*token_rows(rows, template)]
    except RowFault:
        return [_or_fault(row, template) for row in rows]


def _or_fault(row: Rendered, template: ChatTemplate) -> list[TokenRow] | RowFault:
    try:
        return token_rows([row], template)[0]
    except RowFault as fault:
        return fault


_COUNTS = (
    "trimmed", "stripped", "rewritten", "parted", "long", "tokens", "lost_tokens", "labelled", "lost_labelled", "gone",
)  # fmt: skip
"""Conversations, but for those that say what they count."""
_FATE = {
    "drop": "are left out",
    "truncate_left": "are cut at their beginning",
    "split": "are split",
}


def _notes(found: Arrays, template: ChatTemplate, options: ChatOptions, what: str) -> Iterator[str]:
    count = dict(zip(_COUNTS, found["counts"].tolist(), strict=True))
    lead = found["lead"].tobytes().decode()
    if lead:
        yield f"{template} has the assistant begin an answer with {lead!r}, which is learned too"
    if count["trimmed"]:
        yield f"{template} takes white space from the ends of answers, in {count['trimmed']:,} {what} conversations"
    if count["stripped"]:
        yield (
            f"special tokens of the tokenizer take in white space at the ends of answers, in {count['stripped']:,} "
            f"{what} conversations"
        )
    if count["rewritten"]:
        yield (
            f"{template} writes earlier turns otherwise once others follow: each answer of {count['rewritten']:,} "
            f"{what} conversations is a row of its own, behind what the model reads before it"
        )
    if count["parted"]:
        yield (
            f"a token would reach from the prompt into the answer in {count['parted']:,} {what} conversations: their "
            "answers are rows of their own, tokenised behind their prompts"
        )
    if count["long"]:
        share = count["lost_tokens"] / max(1, count["tokens"])
        told = (
            f"{count['long']:,} of {len(set(found['sources'].tolist())) + count['gone']:,} {what} conversations are "
            f"longer than {options.max_length:,} tokens and {_FATE[options.overflow]}: {count['lost_tokens']:,} tokens "
            f"({share:.1%}), {count['lost_labelled']:,} of {count['labelled']:,} labelled, are not read"
        )
        gone = f"; {count['gone']:,} of them are gone with all their labels" if count["gone"] else ""
        yield told + (gone if options.overflow != "drop" else "")


def _texts(flat: np.ndarray) -> list[str]:
    text = flat.tobytes().decode()
    return text.split("\0") if text else []


def _code() -> str:
    """Of the files that decide what a conversation becomes."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
