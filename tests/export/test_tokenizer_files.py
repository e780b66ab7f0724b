"""A tokenizer's files for transformers 4 and 5."""

from __future__ import annotations

import pytest
import transformers

from fastpeft.export.tokenizer_files import save_tokenizer
from fastpeft.runs.store import read_json
from tests.support.tiny import save_character_tokenizer


@pytest.mark.parametrize("extra", [[], ["<turn>", "<end>"]])
def test_the_words_of_transformers_4_are_read_by_5_as_before(extra, tmp_path):
    save_character_tokenizer(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"extra_special_tokens": extra})
    save_tokenizer(tokenizer, tmp_path / "out")
    config = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert config is not None
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(config.get("extra_special_tokens"), list)
    assert config.get("additional_special_tokens", []) == extra
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Ann <turn> has 3 apples.<end>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.extra_special_tokens == extra
    assert again.all_special_tokens == tokenizer.all_special_tokens
