"""Tiny runs of the kinds whose answers are no single class: a random BERT learns them in a few dozen steps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from fastpeft.config import RunConfig, load_run
from tests.support.tiny import FAMILIES, WORDS, make_model

KINDS = ("token-classification", "regression", "multi-label")
METRICS = {"token-classification": "f1", "regression": "spearman", "multi-label": "micro_f1"}

SCORES = {"bad": 0.5, "small": 1.75, "big": 3.25, "good": 4.5}
LABELS = ("bird", "cat", "dog")
CLASSES = ("negative", "neutral", "positive")
"""Of `classification`, which is none of KINDS: that it has one class a row is what most other tests are about."""
TAGS = ("O", "B-ANIMAL", "I-ANIMAL", "B-WORK", "I-WORK")
_FILLERS = "the a every some no ran slept saw very not and is it".split()  # noqa: SIM905


def row_of(kind: str, rng: random.Random) -> dict[str, Any]:
    words = rng.choices(_FILLERS, k=rng.randint(2, 9))
    if kind == "regression":
        said = rng.choice(list(SCORES))
        words[rng.randrange(len(words))] = said
        return {"text": " ".join(words), "score": SCORES[said]}
    if kind == "classification":
        label = rng.choice(CLASSES)
        words[rng.randrange(len(words))] = {"negative": "bad", "neutral": "small", "positive": "good"}[label]
        return {"text": " ".join(words), "label": label}
    if kind == "multi-label":
        labels = [label for label in LABELS if rng.random() < 0.4]
        words += labels
        rng.shuffle(words)
        return {"text": " ".join(words), "labels": labels}
    tags = ["O"] * len(words)
    for _ in range(rng.randint(0, 2)):
        name, nouns = rng.choice((("ANIMAL", LABELS), ("WORK", ("film", "plot"))))
        words += [rng.choice(nouns)] if rng.random() < 0.5 else [rng.choice(nouns), "good"]
        tags += [f"B-{name}", f"I-{name}"][: len(words) - len(tags)]
        words, tags = [*words, "and"], [*tags, "O"]
    return {"tokens": words, "tags": tags}


def write_rows(folder: Path, kind: str, num_train: int = 96, num_dev: int = 64, seed: int = 0) -> Path:
    """train.jsonl and dev.jsonl, each kind's as `dataset.task: auto` tells it."""
    assert set(_FILLERS) <= set(WORDS)
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", num_train), ("dev", num_dev)):
        rows = [row_of(kind, rng) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_pieces(folder: Path) -> None:
    """A tokenizer that cuts every word of three letters or more in two."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    pieces = sorted({piece for word in WORDS for piece in (word[:2], f"##{word[2:]}") if piece != "##"})
    vocab = {piece: i for i, piece in enumerate([*special, "a", *pieces])}
    raw = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token", "mask_token"), special))
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **names).save_pretrained(folder)


def kind_run(
    folder: Path, kind: str, family: str = "bert", dropout: float = 0.1, pieces: bool = False, **sections: Any
) -> RunConfig:
    """A run of `kind` in `folder`, with settings over it: `training={"seed": 1}` or `budget="9steps"`.

    Args:
        pieces: words of several pieces.
    """
    path = folder / "run.yaml"
    if not path.is_file():
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        if family == "distilbert":
            names = ("dropout", "attention_dropout", "seq_classif_dropout")
        elif family not in FAMILIES:
            names = ("classifier_dropout", "attention_dropout")
        make_model(folder / "model", family, **dict.fromkeys(names, dropout), **({"vocab_size": 64} if pieces else {}))
        if pieces:
            save_pieces(folder / "model")
        values = {
            "run_id": "tiny",
            "method": "lora",
            "model": {"name": str(folder / "model")},
            "adapter": {"target_modules": "all-linear", "rank": 4, "dropout": dropout},
            "schedule": {"warmup_steps": 4},
            "dataset": {"path": str(write_rows(folder / "rows", kind)), "max_length": 64},
            "training": {
                "learning_rate": 1e-2,
                "batch_size": 8,
                "checkpoint_steps": 5,
                "precision": "fp32",
                "threads": 1,
            },
            "evaluation": {"every": "10steps"},
            "budget": "20steps",
        }
        path.write_text(yaml.safe_dump(values))
    flat = {}
    for section, value in sections.items():
        flat |= {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
    return load_run(path, flat)
