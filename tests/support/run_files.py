"""Writing run files, and looking at what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastpeft.config import ConfigError, RunConfig, load_run

SMALL = "run_id: small\nmethod: lora\nmodel: {name: some/model}\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problems(name_or_path: str | Path, overrides=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(name_or_path, overrides)
    assert all(line in str(caught.value) for line in caught.value.problems)
    return caught.value.problems


def one_problem(name_or_path: str | Path, overrides=()) -> str:
    found = problems(name_or_path, overrides)
    assert len(found) == 1, found
    return found[0]


def load_with(path: Path, sections: Mapping[str, Any]) -> RunConfig:
    """A run with settings over it: `{"training": {"seed": 1}, "budget": "9steps"}`."""
    flat = {}
    for section, value in sections.items():
        flat |= {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
    return load_run(path, flat)
