"""Runs of random causal language models with trained-looking adapters, made without a trainer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from fastpeft.adapters import Adapter, method_class
from fastpeft.config import load_run, save_run
from fastpeft.config.methods import METHODS
from fastpeft.models.backbone import load_causal_lm
from fastpeft.runs.store import RunFolder
from tests.support.tiny import make_causal_lm

CPU = torch.device("cpu")
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
NO_PAD = "iw_lora-mistral"
"""Its tokenizer has no padding token."""


def write_problems(folder: Path, num_train: int = 40) -> Path:
    rng = random.Random(0)
    folder.mkdir(parents=True)
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(num_train):
            a, b = rng.randint(2, 99), rng.randint(2, 99)
            row = {
                "question": f"Ann has {a} apples and buys {b}. How many?",
                "answer": f"{a}+{b}={a + b}\n#### {a + b}",
            }
            file.write(json.dumps(row) + "\n")
    return folder


def make_run(home: Path, case: str, **overrides: object) -> Adapter:
    """A run's folder home/results/CASE with trained-looking weights, made without a trainer; returns the adapter."""
    method, family = case.rsplit("-", 1)
    method = overrides.get("method", method)
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 256}
    values = {
        "model.name": str(make_causal_lm(home / "models" / case, family, pad=case != NO_PAD, **wide)),
        "method": method,
        "adapter.target_modules": "all-linear",
        "adapter.rank": 4,
        "adapter.alpha": 12.0,
        "adalora.initial_rank": 4,
        "adalora.target_rank": 2,
        "dataset.name": "sums",
        "dataset.path": str(home / "problems"),
        "dataset.task": "word-problems",
        "dataset.held_out": 20,
        "dataset.max_length": 128,
        "training.precision": "fp32",
    }
    run = load_run("lora_mnli", values | {k.replace("__", "."): v for k, v in overrides.items()})
    kind = method_class(method)
    torch.manual_seed(1)
    adapter = kind.build(
        run.adapter,
        METHODS.own_section(run),
        load_causal_lm(run.model, torch.float32, CPU, trained=kind.trains_backbone),
    )
    adapter.flat.data.add_(torch.randn_like(adapter.flat.data), alpha=0.05)
    folder = RunFolder.at(home / "results", case)
    folder.weights(adapter.saved_as).mkdir(parents=True)
    adapter.save(folder.weights(adapter.saved_as))
    save_run(run, folder.config)
    return adapter


@torch.inference_mode()
def answers(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits
