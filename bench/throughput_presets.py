"""Presets, rows and levers of bench/throughput.py, and the run that a row trains.

A lever is an optimization of fastpeft's step that can be switched off. It is one entry of LEVERS, a setting of the run
or a switch in fastpeft; its row, `fastpeft_NAME`, has this lever alone.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.models import LENGTH_SIGMA, LONGEST, MEAN_LENGTH, SHAPES
from fastpeft.config import RunConfig
from fastpeft.config.methods import AdapterConfig
from fastpeft.config.optimizers import OptimizerConfig
from fastpeft.config.schedules import ScheduleConfig
from fastpeft.config.schema import DatasetConfig, EvaluationConfig, ModelConfig, TrainingConfig
from fastpeft.kernels.ops.lora_linear import compute
from fastpeft.models import fast

Shape = Mapping[str, Any]
"""Shape of a model with random weights: model_type, and fields of its config."""

QWEN3_384: Shape = {
    "model_type": "qwen3",
    "vocab_size": 32000,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1152,
    "tie_word_embeddings": True,
}
QWEN3_600M: Shape = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths of generated texts, in tokens."""

    mean: float
    sigma: float
    longest: int


@dataclass(frozen=True, kw_only=True)
class Preset:
    dataset: str
    kind: str
    """Kind of task, as in dataset.task."""
    embedded: str
    """Generated dataset for a pretrained model without --data."""
    shapes: Mapping[str, Shape]
    """Device -> shape trained without --model. A device without a shape requires --model."""
    texts: tuple[Lengths, Lengths]
    """Lengths of the two texts of generated rows: premise and hypothesis, or question and answer."""
    run: Mapping[str, Any]
    """Settings by dotted key, shared by all rows."""
    threads: int
    steps: int
    """Steps per turn on a CPU."""
    peer_rows: int | None = None
    """Micro-batch of the peers, where their whole batch exceeds a machine's memory."""
    trims: bool = False
    """Waiting workers return freed memory to the system, and start each turn with an untimed step."""

    @property
    def is_causal(self) -> bool:
        return self.kind in ("word-problems", "chat")


_PAIR = tuple(Lengths(share * (MEAN_LENGTH - 3), LENGTH_SIGMA, int(share * LONGEST)) for share in (0.65, 0.35))
_PROBLEM = (Lengths(65, 0.31, 200), Lengths(124, 0.42, 300))
"""GSM8K's lengths by Gemma 3's tokenizer."""
_GSM8K: Mapping[str, Any] = {
    "adapter.rank": 64,
    "adapter.alpha": 16.0,
    "optimizer.beta2": 0.95,
    "dataset.max_length": 512,
    "training.batch_size": 16,
    "training.learning_rate": 2e-4,
}
_LANGUAGE = {"dataset": "gsm8k", "kind": "word-problems", "embedded": "embedded-word-problems", "texts": _PROBLEM}

_MNLI: Mapping[str, Any] = {
    "dataset": "mnli",
    "kind": "classification",
    "embedded": "embedded-nli",
    "texts": _PAIR,
    "run": {
        "adapter.rank": 8,
        "dataset.max_length": 256,
        "training.batch_size": 32,
        "training.learning_rate": 5e-4,
    },
}
_DEBERTA = SHAPES["deberta-v3-base"]

PRESETS = {
    "mnli": Preset(**_MNLI, shapes={"cpu": SHAPES["minilm"], "cuda": _DEBERTA}, threads=1, steps=4),
    "deberta": Preset(**_MNLI, shapes={"cpu": _DEBERTA, "cuda": _DEBERTA}, threads=2, steps=1, trims=True),
    "gsm8k": Preset(**_LANGUAGE, shapes={"cpu": QWEN3_384, "cuda": QWEN3_600M}, run=_GSM8K, threads=1, steps=2),
    "gemma": Preset(**_LANGUAGE, shapes={}, run=_GSM8K, threads=2, steps=1, peer_rows=4, trims=True),
    "alpaca": Preset(
        dataset="alpaca",
        kind="chat",
        embedded="embedded-conversations",
        texts=_PROBLEM,
        shapes={},
        run=_GSM8K | {"adapter.rank": 16, "dataset.template": "alpaca"},
        threads=2,
        steps=1,
        peer_rows=4,
        trims=True,
    ),
}
CUDA_STEPS = 20
WARMUP_STEPS = 3


# ---- rows ----------------------------------------------------------------------------------

BASE = "hf_grouped"
"""Row in the denominator of the ratios."""
PRODUCT = "fastpeft"

Missing = Callable[[Preset, str], str | None]
"""(preset, device) -> the reason why a row cannot run there; None if it can."""


def _always(preset: Preset, device: str) -> None: ...


def _compiler(preset: Preset, device: str) -> str | None:
    found = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return None if found or device == "cuda" else "torch.compile needs a C++ compiler, and there is none"


def _package(name: str, only_causal: bool = False, only_cuda: bool = False) -> Missing:
    def missing(preset: Preset, device: str) -> str | None:
        if only_causal and not preset.is_causal:
            return f"{name} trains language models only"
        if only_cuda and device != "cuda":
            return f"{name} computes on a GPU only"
        return None if importlib.util.find_spec(name) else f"{name} is not installed"

    return missing


@dataclass(frozen=True)
class Peer:
    """A row of transformers' Trainer."""

    padding: str = "longest"
    """longest or max_length."""
    trainer: str = "transformers"
    """transformers, trl or unsloth."""
    packing: bool = False
    """Packing, for trl only."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further TrainingArguments."""
    missing: Missing = _always
    warmup_steps: int = WARMUP_STEPS
    own_batches: bool = False
    """It makes its own batches, which differ from those of the other table rows."""


PEERS = {
    "hf_padded": Peer(padding="max_length"),
    BASE: Peer(),
    "hf_compiled": Peer(arguments={"torch_compile": True}, missing=_compiler, warmup_steps=8),
    "trl": Peer(trainer="trl", missing=_package("trl", only_causal=True)),
    "trl_packed": Peer(trainer="trl", packing=True, missing=_package("trl", only_causal=True), own_batches=True),
    "unsloth": Peer(trainer="unsloth", missing=_package("unsloth", only_causal=True, only_cuda=True)),
    "liger": Peer(arguments={"use_liger_kernel": True}, missing=_package("liger_kernel", only_cuda=True)),
}


@dataclass(frozen=True)
class Lever:
    off: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run that switch the lever off, by dotted key."""
    on: Mapping[str, Any] = field(default_factory=dict)
    """Settings that switch it on, where the run's defaults do not."""
    switch: Callable[[bool], AbstractContextManager[object]] | None = None
    """Switch in fastpeft: a context entered before a run is set up, left when it has ended."""


def _fast(name: str) -> Lever:
    return Lever(switch=lambda is_on: nullcontext() if is_on else fast.without(name))


@contextmanager
def _merging(is_on: bool) -> Iterator[None]:
    before, compute.MERGE_FROM = compute.MERGE_FROM, compute.MERGE_FROM if is_on else math.inf
    try:
        yield
    finally:
        compute.MERGE_FROM = before


GRAPHS = "graphs"
LEVERS: dict[str, Lever] = {
    "micro_batches": Lever(off={"training.micro_batch_tokens": 2**40}),
    "merged": Lever(switch=_merging),
    GRAPHS: Lever(off={"training.cuda_graphs": "off"}, on={"training.cuda_graphs": "auto"}),
} | {name: _fast(name) for name in fast.LEVERS}

PLAIN = f"{PRODUCT}_plain"
"""fastpeft without any lever."""
LEVER_ROWS = [PLAIN, *(f"{PRODUCT}_{name}" for name in LEVERS)]
PREFIX = f"{PRODUCT}_prefix"
"""fastpeft with all levers and training.cache_prefix, after its first epoch. Its losses differ, since there is no
dropout below the first adapter."""
LAUNCHED = f"{PRODUCT}_launched"
"""fastpeft with all levers except captured steps, which do not exist on a CPU."""
PACKED = f"{PRODUCT}_packed"
"""fastpeft with all levers and training.padding=none: rows concatenated without padding."""
ROWS = [*PEERS, *LEVER_ROWS, PRODUCT, LAUNCHED, PACKED, PREFIX]
"""Rows in the order of their turns."""
ONLY_BY_NAME = LAUNCHED, PACKED, PREFIX


def levers_of(row: str) -> dict[str, bool]:
    """Lever -> whether the row has it."""
    return {
        name: row in (PRODUCT, PACKED, PREFIX, f"{PRODUCT}_{name}") or (row == LAUNCHED and name != GRAPHS)
        for name in LEVERS
    }


# ---- the run -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of every worker, read from the shared folder."""

    preset: str
    model: str | None
    """A folder. Weights in it are trained; a config.json alone gives the shape of a random model."""
    data: str | None
    device: str
    threads: int
    warmup_steps: int
    num_steps: int
    """Steps after the warm-up."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The user's settings, by dotted key."""

    @classmethod
    def read(cls, folder: Path) -> Plan:
        return cls(**json.loads((folder / "plan.json").read_text()))

    def write(self, folder: Path) -> None:
        (folder / "plan.json").write_text(json.dumps(asdict(self)))

    @property
    def has_weights(self) -> bool:
        return self.model is not None and any(Path(self.model).glob("*.safetensors"))

    @property
    def makes_up_data(self) -> bool:
        return self.data is None and not self.has_weights

    def run(self, folder: Path, seed: int = 0, levers: Mapping[str, bool] | None = None) -> RunConfig:
        """Run of a fastpeft row; a peer trains the same without the levers' settings."""
        preset = PRESETS[self.preset]
        data = str(folder / "data") if self.makes_up_data else self.data
        run = RunConfig(
            run_id="throughput",
            method="lora",
            model=ModelConfig(name=str(self.model if self.has_weights else folder / "model")),
            adapter=AdapterConfig(target_modules="all-linear"),
            schedule=ScheduleConfig(name="constant", warmup_steps=0),
            optimizer=OptimizerConfig(),
            dataset=DatasetConfig(
                name=preset.embedded if data is None else preset.dataset, task=preset.kind, path=data, held_out=16
            ),
            training=TrainingConfig(
                precision="bf16" if self.device == "cuda" else "fp32",
                threads=self.threads,
                checkpoint_steps=1_000_000_000,
                seed=seed,
            ),
            budget=f"{self.warmup_steps + self.num_steps}steps",
            evaluation=EvaluationConfig(every="end", max_examples=16, max_test_examples=16),
        )
        settings = {**preset.run, **self.settings}
        for name, is_on in (levers or {}).items():
            settings |= LEVERS[name].on if is_on else LEVERS[name].off
        return with_settings(run, settings)


def with_settings(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The run with other values by dotted key; strings are converted to the key's type.

    Raises:
        ValueError: an unknown key, or a value that its type does not allow.
    """
    for key, value in settings.items():
        section, _, name = key.partition(".")
        old = getattr(run, section, None)
        if not name or not hasattr(old, name):
            raise ValueError(f"{key}: a run has no such setting")
        kind = type(getattr(old, name))
        if isinstance(value, str) and kind in (int, float):
            try:
                value = kind(value)
            except ValueError:
                raise ValueError(f"{key}={value}: expected a number") from None
        run = replace(run, **{section: replace(old, **{name: value})})
    return run
