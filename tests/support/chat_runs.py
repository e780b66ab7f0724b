"""Runs of a random causal language model on conversations of a few characters, which it learns by heart in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from fastpeft.config import RunConfig
from tests.support.run_files import load_with
from tests.support.tiny import make_causal_lm

NUM_TRAIN, NUM_DEV = 24, 8


def write_chats(folder: Path, num_train: int = NUM_TRAIN, num_dev: int = NUM_DEV, seed: int = 0) -> Path:
    """train.jsonl and dev.jsonl: one to three questions a conversation, some behind a system turn. The answer is `yes`
    to a question that ends in `?`, `no way` to one that ends in `!`."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", num_train), ("dev", num_dev)):
        rows = []
        for i in range(count):
            turns = [{"role": "system", "content": "be brief"}] if i % 3 == 0 else []
            for k in range(1 + i % 3):
                question = "".join(rng.choices("abcdefg", k=rng.randint(2, 6))) + "?!"[(i + k) % 2]
                turns += [{"role": "user", "content": question}]
                turns += [{"role": "assistant", "content": ("yes", "no way")[(i + k) % 2]}]
            rows.append({"messages": turns})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_pairs(folder: Path) -> Path:
    """The same in prompts and completions, one a row."""
    rows = {"train": NUM_TRAIN, "dev": NUM_DEV}
    rng = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in rows.items():
        made = [
            {
                "prompt": "".join(rng.choices("abcdefg", k=3 + i % 4)) + "?!"[i % 2],
                "completion": ("yes", "no way")[i % 2],
            }
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def chat_run(folder: Path, **sections: Any) -> RunConfig:
    """A run with settings over it: `training={"seed": 1}` or `budget="9steps"`."""
    path = folder / "run.yaml"
    if not path.is_file():
        make_causal_lm(folder / "model", "qwen3", max_position_embeddings=128)
        values = {
            "run_id": "tiny",
            "method": "lora",
            "model": {"name": str(folder / "model")},
            "adapter": {"target_modules": "all-linear", "rank": 8, "alpha": 16, "dropout": 0.1},
            "schedule": {"warmup_steps": 4},
            "dataset": {"path": str(write_pairs(folder / "chats")), "max_length": 96, "template": "plain"},
            "training": {
                "learning_rate": 1e-2,
                "batch_size": 6,
                "checkpoint_steps": 3,
                "precision": "fp32",
                "threads": 1,
            },
            "evaluation": {"every": "10steps", "max_new_tokens": 12},
            "budget": "20steps",
        }
        path.write_text(yaml.safe_dump(values))
    return load_with(path, sections)
