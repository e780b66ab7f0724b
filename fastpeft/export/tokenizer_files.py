"""A tokenizer's files, in the words that transformers 4 knows as well as 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpeft.runs.store import read_json, write_json

_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes that transformers 4 does not have, and their names there, which transformers 5 takes too."""


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """As `save_pretrained` does, but without the class name and the list of special tokens at which transformers 4
    raises an error."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if config is None:
        return
    name = config.get("tokenizer_class")
    if name in _CLASSES:
        config["tokenizer_class"] = _CLASSES[name]
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path, config)
