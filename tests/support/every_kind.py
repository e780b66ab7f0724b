"""A tiny run of every kind of task that is registered, and its rows in files, to be changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastpeft.config import RunConfig
from fastpeft.config.tasks import TASKS
from tests.support import chat_runs, kind_runs, problem_runs, tiny_runs

ALL_KINDS = TASKS.names
SETTINGS: dict[str, Any] = {
    "method": "lora",
    "budget": "4steps",
    "schedule": {"warmup_steps": 0},
    "training": {"checkpoint_steps": 1},
    "evaluation": {"every": "2steps"},
}


def run_of_kind(folder: Path, kind: str, **sections: Any) -> RunConfig:
    """Four steps of a random model; settings over it as `training={"seed": 1}`."""
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in SETTINGS.items()}
    for section, value in sections.items():
        settings[section] = settings.get(section, {}) | value if isinstance(value, dict) else value
    if kind == "classification":
        return tiny_runs.tiny_run(folder, **settings)
    if kind == "word-problems":
        settings["evaluation"] |= {"max_new_tokens": 4}
        return problem_runs.problem_run(folder, **settings)
    if kind == "chat":
        settings["evaluation"] |= {"max_new_tokens": 4}
        return chat_runs.chat_run(folder, **settings)
    return kind_runs.kind_run(folder, kind, **settings)


def data_folder(run: RunConfig) -> Path:
    assert run.dataset.path is not None
    return Path(run.dataset.path)


def change_rows(run: RunConfig, kind: str, how: str) -> None:
    """Change the training file: `rows` leaves the last out, `order` turns them round, `labels` changes an answer."""
    path = data_folder(run) / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if how == "rows":
        rows = rows[:-1]
    elif how == "order":
        rows = rows[::-1]
    else:
        key = next(key for key in ("label", "labels", "score", "tags", "answer", "completion") if key in rows[0])
        others = (row for row in rows if row[key] != rows[0][key])
        other = next(row for row in others if key != "tags" or len(row[key]) == len(rows[0][key]))
        rows[0][key], other[key] = other[key], rows[0][key]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
