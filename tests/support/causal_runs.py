"""Runs of random causal language models with trained-looking adapters, made without a trainer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastpeft.adapters import Adapter, method_class
from fastpeft.config import load_run, save_run
from fastpeft.config.methods import METHODS
from fastpeft.models.backbone import load_causal_lm
from fastpeft.runs.store import RunFolder, read_json
from tests.support.tiny import make_causal_lm

CPU = torch.device("cpu")
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
NO_PAD = "iw_lora-mistral"
"""Its tokenizer has no padding token."""

PATTERNS = "lora-granite"
"""A run whose adapter has patterns and the rank-stabilised scale at once, as PEFT allows."""
READER_CASES: dict[str, dict[str, object]] = {
    "lora-qwen3": {},
    "rslora-llama": {},
    "iw_lora-mistral": {},
    "adalora-llama": {},
    "lora-llama": {"adapter__target_modules": ["k_proj", "up_proj"]},
    "lora-mistral": {
        "adapter__target_modules": r"model\.layers\.1\.self_attn\.q_proj|model\.layers\.0\.mlp\.gate_proj"
    },
    PATTERNS: {},
}
"""Runs for tests of readers: what differs from LoRA of rank 4 and alpha 12 on all linears."""


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


def make_reader_runs(home: Path) -> dict[str, Adapter]:
    """All of READER_CASES, in home/results."""
    runs = {case: make_run(home, case, **overrides) for case, overrides in READER_CASES.items()}
    give_patterns(RunFolder.at(home / "results", PATTERNS).weights("adapter"))
    return runs


def give_patterns(folder: Path) -> None:
    config, tensors = read_json(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    assert config is not None
    changes = {"rank_pattern": {"layers.1.mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 20, "layers.0.mlp.*": 7}}
    for name in [n for n in tensors if "layers.1.mlp.up_proj" in n]:
        tensors[name] = (tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | changes | {"use_rslora": True}))


def base_of(case: str, home: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(str(home / "models" / case))


def wanted_of(case: str, home: Path, trained: dict[str, Adapter]) -> torch.Tensor:
    if case == PATTERNS:
        folder = RunFolder.at(home / "results", case).weights("adapter")
        return answers(peft.PeftModel.from_pretrained(base_of(case, home), str(folder)))
    return answers(trained[case].model)
