"""Tokenised in parts, rows are the same, and how far it is is told."""

from __future__ import annotations

import pytest
import transformers

from fastpeft import phases
from fastpeft.data import tokenise
from fastpeft.data.tokenise import tokenised
from tests.support.tiny import WORDS, make_model

CALL = {"return_attention_mask": False, "return_token_type_ids": True, "truncation": True, "max_length": 7}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return transformers.AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("model"), "bert"))


@pytest.fixture
def texts() -> list[str]:
    return [" ".join(WORDS[: 1 + i % 9]) for i in range(10)]


@pytest.mark.parametrize("num", [1, 3, 4, 10])
@pytest.mark.parametrize("is_pair", [False, True])
def test_parts_make_the_rows_of_one_call(num, is_pair, tokenizer, texts, monkeypatch):
    monkeypatch.setattr(tokenise, "PART_ROWS", 3)
    texts, pairs = texts[:num], texts[::-1][:num] if is_pair else None
    found = tokenised(tokenizer, texts, pairs, **CALL)
    assert {name: [row.tolist() for row in map(rows.__getitem__, range(num))] for name, rows in found.items()} == dict(
        tokenizer(texts, pairs, **CALL)
    )


def test_progress_is_told_for_every_part(tokenizer, texts, monkeypatch):
    monkeypatch.setattr(tokenise, "PART_ROWS", 4)
    monkeypatch.setattr(phases, "EVERY_S", 0.0)
    told = []
    with phases.told_to(lambda **fields: told.append(fields)):
        phases.begin("tokenise", "tokenising")
        tokenised(tokenizer, texts)
    begun = {"name": "tokenise", "text": "tokenising"}
    assert told == [begun, *(begun | {"done": done, "total": 10, "unit": "rows"} for done in (4, 8, 10))]
