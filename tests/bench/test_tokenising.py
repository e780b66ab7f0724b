"""The bench of rendering and tokenising has both sides read the same texts."""

from __future__ import annotations

import json

from bench.tokenising import alternatives, conversations
from fastpeft.tasks.chat import chat_rows
from fastpeft.tasks.chat.templates import choose_template
from tests.support.chat_templates import byte_tokenizer


def test_both_sides_read_the_texts_of_all_conversations_which_are_all_different(tmp_path, monkeypatch):
    rows = [{"instruction": f"do {i}", "input": "it" * (i % 2), "output": f"done {i}"} for i in range(3)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    chats = conversations(path, 12)
    assert len({row.key for row in chats.rows}) == len(chats) == 10  # two are held out

    template, read = choose_template("alpaca", byte_tokenizer(), "a model"), []
    sides = alternatives(chats, template)
    call = type(template.tokenizer).__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            type(template.tokenizer),
            "__call__",
            lambda self, texts, **more: read.extend(texts) or call(self, texts, **more),
        )
        sides["tokenizer"](0)
    made = []
    encode = chat_rows.token_rows
    with monkeypatch.context() as patch:
        patch.setattr(chat_rows, "token_rows", lambda rendered, own: made.extend(rendered) or encode(rendered, own))
        sides["fastpeft"](0)
    assert [row.text for row in made] == read
    assert len(read) == len(chats)
