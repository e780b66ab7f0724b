"""Writing run files, and looking at what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpeft.config import ConfigError, load_run

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
