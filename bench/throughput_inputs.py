"""Inputs of the rows of bench/throughput.py: model, data and batches, made once and read by each worker.

    python bench/throughput_inputs.py FOLDER

FOLDER holds the plan. The batches are those of `train_sampling_strategy="group_by_length"`, made by transformers' own
sampler, in random order instead of from long to short, so that each turn has every length; all rows use the same
batches. Warm-up batches are in order of width, the widest first, which sets the peak of memory.

Shapes: S steps, W warm-up steps, B rows of a batch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.throughput_presets import PRESETS, Lengths, Plan, Preset
from fastpeft.config import RunConfig
from fastpeft.data.batches import IGNORE, TokenRows
from fastpeft.models.backbone import quiet_transformers
from fastpeft.models.precision import DTYPES
from fastpeft.tasks import Task, load_task
from fastpeft.tasks.causal_lm.labelled_rows import LabelledRows
from fastpeft.tasks.sequences.examples import Encoded

NUM_BATCHES = 200
"""Batches of generated rows: enough for transformers to group rows in pools of its usual size."""
MOST_WORDS = 20_000
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[EOS]"}
LABELS = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Inputs:
    """Tokens of the training rows, and row indices of each step."""

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    """Class indices; for a language model the prompt lengths."""
    segments: np.ndarray
    """Token types; empty for a model without them."""
    steps_SB: np.ndarray
    warmup_WB: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> Inputs:
        with np.load(folder / "inputs.npz") as stored:
            return cls(**stored)

    def write(self, folder: Path) -> None:
        np.savez(folder / "inputs.npz", **vars(self))

    def batches(self) -> list[np.ndarray]:
        """Row indices of each batch, in the order of the steps."""
        return [*self.warmup_WB, *self.steps_SB]

    def feature(self, row: int, is_causal: bool) -> dict[str, Any]:
        """A row in the form of a tokenised dataset from the hub."""
        place = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        ids, answer = self.tokens[place].tolist(), int(self.labels[row])
        feature: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if len(self.segments):
            feature["token_type_ids"] = self.segments[place].tolist()
        return feature | {"labels": [IGNORE] * answer + ids[answer:] if is_causal else answer}


def prepare(folder: Path) -> None:
    plan = Plan.read(folder)
    preset = PRESETS[plan.preset]
    run = plan.run(folder)
    if plan.makes_up_data:
        _make_up_data(folder / "data", preset, run)
    task = load_task(run.dataset, run.evaluation, run.training.seed)
    if not plan.has_weights:
        tokenizer = _words(_config(plan, preset).vocab_size) if plan.makes_up_data else _pieces(task, plan, preset)
        _save_random_model(folder / "model", plan, preset, tokenizer, DTYPES[run.training.precision])
    cpu = torch.device("cpu")
    backbone = task.load_model(run.model, torch.float32, cpu)
    task.encode(backbone, cpu)
    _inputs(task.train, run.training.batch_size, plan).write(folder)


def _inputs(encoded: TokenRows, batch_size: int, plan: Plan) -> Inputs:
    batches = grouped_batches(encoded.lengths, batch_size)
    by_width = sorted(batches, key=lambda rows: -int(encoded.lengths[rows].max()))
    chosen = np.linspace(0, len(by_width) - 1, plan.warmup_steps).round().astype(int)
    order = np.random.default_rng(0)
    steps: list[np.ndarray] = []
    while len(steps) < plan.num_steps:
        steps += [batches[i] for i in order.permutation(len(batches))]
    if isinstance(encoded, LabelledRows):
        segments, labels = None, encoded.lengths - encoded.num_labelled
        firsts = [int(encoded.places(row)[0]) for row in range(len(encoded))]
        assert labels.tolist() == firsts, "something is read behind what is learned"
    else:
        assert isinstance(encoded, Encoded)
        segments, labels = encoded.segments, encoded.labels
    return Inputs(
        tokens=encoded.tokens,
        offsets=encoded.offsets,
        labels=labels,
        segments=np.zeros(0, dtype=np.uint8) if segments is None else segments,
        steps_SB=np.stack(steps[: plan.num_steps]),
        warmup_WB=np.array([by_width[i] for i in chosen], dtype=np.int64).reshape(-1, batch_size),
    )


def grouped_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Full batches of similar length.

    Raises:
        SystemExit: too few rows.
    """
    from transformers.trainer_pt_utils import LengthGroupedSampler

    generator = torch.Generator().manual_seed(0)
    order = np.array(list(LengthGroupedSampler(batch_size, lengths=lengths.tolist(), generator=generator)))
    count = len(order) // batch_size
    if not count:
        raise SystemExit(f"--data: {len(order)} training rows are no batch of {batch_size}")
    return list(order[: count * batch_size].reshape(count, batch_size))


# ---- made-up data --------------------------------------------------------------------------


def _make_up_data(folder: Path, preset: Preset, run: RunConfig) -> None:
    """Rows of random words, one token each, with the lengths of real ones."""
    random = np.random.default_rng(0)
    num_rows = NUM_BATCHES * run.training.batch_size + run.dataset.held_out
    folder.mkdir()
    for name, count in (("train", num_rows), ("dev", run.dataset.held_out), ("test", run.dataset.held_out)):
        first, second = ([*_texts(random, lengths, count)] for lengths in preset.texts)
        if preset.kind == "word-problems":
            rows = [{"question": q, "answer": f"{a}\n#### 7"} for q, a in zip(first, second)]
        elif preset.kind == "chat":
            rows = [{"prompt": q, "completion": a} for q, a in zip(first, second)]
        else:
            rows = [
                {"premise": p, "hypothesis": h, "label": LABELS[i % 3]} for i, (p, h) in enumerate(zip(first, second))
            ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _texts(random: np.random.Generator, lengths: Lengths, count: int) -> Iterator[str]:
    mu = np.log(lengths.mean) - lengths.sigma**2 / 2
    sizes = np.clip(random.lognormal(mu, lengths.sigma, count).round(), 3, lengths.longest).astype(int)
    for size in sizes:
        yield " ".join(f"w{word}" for word in random.integers(MOST_WORDS, size=size))


# ---- random models -------------------------------------------------------------------------


def _words(vocab_size: int) -> Any:
    """A tokenizer with a token for each generated word that fits in the vocabulary; other words are unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [*SPECIAL.values(), *(f"w{word}" for word in range(MOST_WORDS))]
    vocab = {name: number for number, name in enumerate(names[:vocab_size])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _pieces(task: Task, plan: Plan, preset: Preset) -> Any:
    """A tokenizer trained on the texts."""
    from tokenizers import AddedToken

    from fastpeft.standins.build_qwen3 import build_tokenizer

    texts = [text for row in task.rows_read()["train"] for text in (*row.given, *row.wanted)]
    room = _config(plan, preset).vocab_size
    tokenizer = build_tokenizer(texts, room - len(SPECIAL))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL.values()])
    if (least := tokenizer.get_vocab_size()) > room:
        raise SystemExit(f"--model {plan.model}: any text takes {least} tokens, and its vocabulary has {room}")
    return tokenizer


def _config(plan: Plan, preset: Preset) -> Any:
    import transformers

    if plan.model is not None:
        return transformers.AutoConfig.from_pretrained(plan.model, local_files_only=True)
    shape = dict(preset.shapes[plan.device])
    return transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)


def _save_random_model(folder: Path, plan: Plan, preset: Preset, tokenizer: Any, dtype: torch.dtype) -> None:
    import transformers
    from tokenizers import processors

    config, is_causal = _config(plan, preset), preset.is_causal
    numbers = {name: tokenizer.token_to_id(SPECIAL[name]) for name in SPECIAL}
    config.pad_token_id, config.eos_token_id, config.bos_token_id = numbers["pad_token"], numbers["eos_token"], None
    if not is_causal:
        start, end = ((SPECIAL[name], numbers[name]) for name in ("cls_token", "sep_token"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start[0]} $A {end[0]}",
            pair=f"{start[0]} $A {end[0]} $B:1 {end[0]}:1",
            special_tokens=[start, end],
        )
    names = ["input_ids", "attention_mask"] if is_causal else ["input_ids", "token_type_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="right", model_input_names=names, **SPECIAL
    ).save_pretrained(folder)
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel
    with quiet_transformers(), torch.device(plan.device):  # a GPU draws the weights of a large model faster
        auto.from_config(config).to(dtype).save_pretrained(folder)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
