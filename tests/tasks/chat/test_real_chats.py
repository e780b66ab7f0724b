"""Conversations as they are published: every answer comes out as it stands, in every template that takes them."""

from __future__ import annotations

from itertools import chain, groupby
from pathlib import Path

import pytest

from fastpeft.config.schema import DatasetConfig
from fastpeft.tasks import load_task
from fastpeft.tasks.chat.answer_spans import Renderer
from fastpeft.tasks.chat.answer_tokens import token_rows
from fastpeft.tasks.chat.conversations import Conversation, RowFault
from fastpeft.tasks.chat.task import Chat
from fastpeft.tasks.chat.templates import NAMED, ChatTemplate
from tests.support.chat_templates import DOES, TEMPLATES, Does, byte_tokenizer
from tests.support.real_data import DATA

pytestmark = pytest.mark.skipif(not (DATA / "alpaca").is_dir(), reason=f"no data at {DATA}")

NUM_ROWS = 60


def rows(path: str, **dataset: object) -> list[Conversation]:
    config = DatasetConfig(path=str(DATA / path), **dataset)  # pyright: ignore[reportArgumentType]
    task = load_task(config)
    assert isinstance(task, Chat)
    return [*task.splits.validation.rows, *task.splits.train.rows]


def answers(row: Conversation, template: ChatTemplate) -> list[str]:
    found = []
    rendered = Renderer(template, "assistant").render(row)
    for tokens, labelled in chain.from_iterable(token_rows(rendered.rows, template)):
        runs = groupby(zip(tokens, labelled), key=lambda pair: pair[1])
        found += [template.tokenizer.decode([token for token, _ in run]) for is_learned, run in runs if is_learned]
    return found


def expected(row: Conversation, does: Does) -> list[str]:
    texts = (row.turns[i].text for i in row.answers)
    return [does.lead + (text.strip() if does.trims else text) + does.end for text in texts]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("path", "task"), [("alpaca/alpaca_en_demo.json", "auto"), ("math/math500.jsonl", "chat")])
def test_answers_come_out_as_they_stand(path: str, task: str, name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], byte_tokenizer(), name)
    for row in rows(path, task=task)[:NUM_ROWS]:
        assert answers(row, template) == expected(row, DOES[name])


def test_calls_of_tools_are_context() -> None:
    template = ChatTemplate(NAMED["chatml"], byte_tokenizer(), "chatml")
    found = rows("glaive/glaive_toolcall_en_demo.json")
    assert len(found) == 300
    with_calls = [row for row in found if any(turn.calls for turn in row.turns)]
    assert len(with_calls) > 100
    for row in [*with_calls[:NUM_ROWS], *found[:NUM_ROWS]]:
        assert answers(row, template) == expected(row, Does("<|im_end|>"))
    with pytest.raises(RowFault, match="leaves the"):
        Renderer(ChatTemplate(TEMPLATES["chatml"], byte_tokenizer(), "no tools"), "assistant").render(with_calls[0])


def test_the_whole_of_each_is_read() -> None:
    """As many rows as the files have, and none is left out."""
    assert len(rows("alpaca/alpaca_en_demo.json")) == 999
    assert len(rows("math/math500.jsonl", task="chat")) == 500
    assert Path(DATA / "glaive").is_dir()
