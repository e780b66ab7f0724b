"""Long conversations are dropped, cut at their beginning, or split; what goes is counted by token and by row."""

from __future__ import annotations

import numpy as np
import pytest

from fastpeft.errors import UserError
from fastpeft.tasks.chat import chat_rows
from fastpeft.tasks.chat.chat_rows import ChatOptions, ChatRows, encode_chats
from fastpeft.tasks.chat.conversations import Conversation, read_turns
from fastpeft.tasks.chat.overflow import TokenRow, fitted
from fastpeft.tasks.chat.reading import Conversations
from fastpeft.tasks.chat.templates import ChatTemplate
from tests.support.chat_templates import TEMPLATES, byte_tokenizer

T, F = True, False


def row(*labelled: bool) -> TokenRow:
    return TokenRow(list(range(len(labelled))), list(labelled))


def test_a_row_that_fits_stays_but_for_a_label_of_its_first_token() -> None:
    assert fitted([row(F, T, T)], 3, "drop") == ([row(F, T, T)], (0, 0, 0))
    assert fitted([row(T, T)], 3, "drop") == ([row(F, T)], (0, 0, 1))


@pytest.mark.parametrize(
    ("overflow", "kept", "lost"),
    [
        ("drop", [], (1, 7, 4)),
        ("truncate_left", [TokenRow([4, 5, 6], [F, T, T])], (1, 4, 2)),
        ("split", [TokenRow([0, 1, 2], [F, T, T]), TokenRow([3, 4, 5], [F, F, T])], (1, 1, 1)),
    ],
)
def test_a_long_row(overflow: str, kept: list[TokenRow], lost: tuple[int, int, int]) -> None:
    assert fitted([row(F, T, T, F, F, T, T)], 3, overflow) == (kept, lost)


def test_a_piece_without_a_label_goes() -> None:
    kept, lost = fitted([row(F, F, F, F, T)], 2, "split")
    assert kept == []
    assert lost == (1, 5, 1)


# ---- conversations ---------------------------------------------------------------------------


def chats(*lengths: int) -> Conversations:
    """Of one question and an answer of so many letters."""
    turns = (
        read_turns([{"role": "user", "content": "q"}, {"role": "assistant", "content": "z" * n}], "m") for n in lengths
    )
    return Conversations([Conversation(tuple(own), i + 1) for i, own in enumerate(turns)], "set")


def encode(some: Conversations, **options: object) -> ChatRows:
    template = ChatTemplate(TEMPLATES["zephyr"], byte_tokenizer(), "test")
    return encode_chats(some, template, ChatOptions(**options), "training")  # pyright: ignore[reportArgumentType]


def whole_length(letters: int) -> int:
    return int(encode(chats(letters), max_length=1000).lengths[0])


def test_what_goes_is_counted() -> None:
    short, long = whole_length(3), whole_length(40)
    assert long - short == 37
    some = chats(3, 40, 3)
    rows = encode(some, max_length=short + 5)
    assert rows.sources.tolist() == [0, 2]
    assert rows.num_labelled.tolist() == [4, 4]
    assert rows.notes == (
        f"1 of 3 training conversations are longer than {short + 5} tokens and are left out: {long:,} tokens "
        f"({long / (2 * short + long):.1%}), 41 of 49 labelled, are not read",
    )
    rows = encode(some, max_length=short + 5, overflow="truncate_left")
    assert rows.lengths.tolist() == [short, short + 5, short]
    assert rows.num_labelled.tolist() == [4, short + 4, 4]
    rows = encode(some, max_length=short + 5, overflow="split")
    assert rows.sources.tolist() == [0, *[1] * (len(rows) - 2), 2]
    assert max(rows.lengths) == short + 5
    assert "are split" in rows.notes[0]


def test_none_that_fits_is_refused() -> None:
    with pytest.raises(UserError, match="none of 2 training conversations has a token to learn within 9 tokens"):
        encode(chats(40, 50), max_length=9)


def test_long_conversations_are_encoded_in_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    some = chats(3, 900, 900, 3, 3, 3)
    whole = encode(some, max_length=1000)
    monkeypatch.setattr(chat_rows, "_PART", 2)
    monkeypatch.setattr(chat_rows, "_PART_CHARACTERS", 1000)
    assert [*chat_rows._parts(some.rows)] == [(0, 2), (2, 4), (4, 6)]
    monkeypatch.setattr(chat_rows, "_PART", 10)
    assert [*chat_rows._parts(some.rows)] == [(0, 2), (2, 6)]
    monkeypatch.setattr(chat_rows, "_PART_CHARACTERS", 100)
    assert [*chat_rows._parts(some.rows)] == [(0, 1), (1, 2), (2, 3), (3, 6)]
    parted = encode(some, max_length=1001)
    assert parted.tokens.tolist() == whole.tokens.tolist()
    assert parted.sources.tolist() == whole.sources.tolist()


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_template_that_takes_no_row_is_said_to_be_the_fault(on_bad_row: str) -> None:
    template = ChatTemplate("{{ raise_exception('never.') }}", byte_tokenizer(), "own.jinja")
    options = ChatOptions(max_length=100, on_bad_row=on_bad_row)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError) as caught:
        encode_chats(chats(3, 4), template, options, "training")
    assert str(caught.value) == (
        "set:1: turn 2: the chat template of own.jinja refuses it: never. The template takes none of the 2 training "
        "conversations: set another dataset.template, or mend the rows"
    )


def test_rows_that_lose_all_their_labels_are_counted_and_not_trained() -> None:
    """Split at 8 tokens, the only label that is left of the first may be its own first token's."""
    length = whole_length(0)
    rows = encode(chats(0, 3), max_length=length - 1, overflow="split")
    assert (np.array(rows.num_labelled) > 0).all()
    assert rows.sources.tolist() == [1]
    assert "1 of them are gone with all their labels" in rows.notes[0]
