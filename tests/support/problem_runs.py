"""Runs of a random causal language model on word problems of a few characters, which it learns by heart in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from fastpeft.config import RunConfig
from tests.support.run_files import load_with
from tests.support.tiny import make_causal_lm

NUM_TRAIN, NUM_HELD_OUT, NUM_TEST = 24, 6, 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_problems(folder: Path, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST, seed: int = 0) -> Path:
    """GSM8K-shaped train.jsonl and test.jsonl; the test problems are the first of the training problems. The answer is
    2 to a question that ends in `?`, 13 to one that ends in `!`."""
    rng = random.Random(seed)
    rows = []
    for i in range(num_train):
        question = "".join(rng.choices(LETTERS, k=rng.randint(2, 9))) + "?!"[i % 2]
        rows.append({"question": question, "answer": ["a<<1+1=2>>\n#### 2", "b\n#### 13"][i % 2]})
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("train", rows), ("test", rows[:num_test])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def write_run(folder: Path, family: str = "qwen3", **model: Any) -> Path:
    """Model, data and run.yaml in `folder`; returns the last. Dropout is on in the adapter."""
    make_causal_lm(folder / "model", family, **{"max_position_embeddings": 128} | model)
    write_problems(folder / "problems")
    values = {
        "run_id": "tiny",
        "method": "lora",
        "model": {"name": str(folder / "model")},
        "adapter": {"target_modules": "all-linear", "rank": 8, "alpha": 16, "dropout": 0.1},
        "adalora": {"initial_rank": 6, "target_rank": 3},
        "regulariser": {"warmup_steps": 4},
        "schedule": {"warmup_steps": 4},
        "dataset": {
            "path": str(folder / "problems"),
            "task": "word-problems",
            "held_out": NUM_HELD_OUT,
            "max_length": 64,
            "prompt": "{question}",
        },
        "training": {
            "learning_rate": 1e-2,
            "batch_size": 6,
            "checkpoint_steps": 3,
            "precision": "fp32",
            "threads": 1,
        },
        "evaluation": {"every": "10steps", "max_new_tokens": 32},
        "budget": "20steps",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def problem_run(folder: Path, **sections: Any) -> RunConfig:
    """A run as `write_run` writes it, with settings over it: `training={"seed": 1}` or `budget="9steps"`."""
    path = folder / "run.yaml"
    if not path.is_file():
        write_run(folder)
    return load_with(path, sections)
