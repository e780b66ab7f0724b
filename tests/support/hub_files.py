"""What the fake hub serves: repositories with the files of the real ones, a few kB each."""

from __future__ import annotations

import io
import json
import random
from typing import Any

from tests.support import tiny

MODEL = "microsoft/deberta-v3-base"
GLUE = "nyu-mll/glue"
CLASSES = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "sst2": ("negative", "positive"),
    "rte": ("entailment", "not_entailment"),
}


def deberta_files(seed: int = 0) -> dict[str, bytes]:
    """As microsoft/deberta-v3-base: spm.model and pytorch_model.bin, no tokenizer.json and no safetensors."""
    import torch
    import transformers

    vocabulary = sentencepiece_model()
    size = 128  # the real embedding is longer than its vocabulary, too
    settings = tiny._settings("deberta-v2", size) | {"model_type": "deberta-v2"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(**settings)
        weights = transformers.AutoModel.from_config(config).state_dict()
    named = {f"deberta.{name}": tensor for name, tensor in weights.items()}
    named["lm_predictions.lm_head.bias"] = torch.zeros(size)  # of the pretraining, and in the way
    saved = io.BytesIO()
    torch.save(named, saved)
    return {
        ".gitattributes": b"*.bin filter=lfs\n",
        "README.md": b"---\nlicense: mit\n---\n",
        "config.json": json.dumps(settings).encode(),
        "generator_config.json": json.dumps(settings | {"num_hidden_layers": 1}).encode(),
        "pytorch_model.bin": saved.getvalue(),
        "pytorch_model.generator.bin": b"\0" * 64,
        "rust_model.ot": b"\0" * 64,
        "spm.model": vocabulary,
        "tf_model.h5": b"\0" * 64,
        "tokenizer_config.json": json.dumps({"do_lower_case": False, "vocab_type": "spm"}).encode(),
    }


def sentencepiece_model() -> bytes:
    """With DeBERTa-v3's special pieces and their numbers."""
    import sentencepiece

    rng, model = random.Random(0), io.BytesIO()
    texts = [" ".join(rng.choices(tiny.WORDS, k=8)) for _ in range(300)]
    special = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    pieces = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **special,
        **pieces,
    )
    return model.getvalue()


def glue_files(num_train: int = 48, num_validation: int = 24) -> dict[str, bytes]:
    """As nyu-mll/glue: one configuration a task, `ax` first, whose rows have no gold label."""
    configs: dict[str, dict[str, int]] = {"ax": {"test": 6}}
    configs |= {task: {"train": num_train, "validation": num_validation, "test": 6} for task in CLASSES}
    configs["mnli"] = {"train": num_train, "validation_matched": num_validation, "validation_mismatched": 8}
    files = {}
    for task, splits in configs.items():
        for split, count in splits.items():
            rows = glue_rows(task, split, count)
            files[f"{task}/{split}-00000-of-00001.parquet"] = parquet(rows, CLASSES.get(task, CLASSES["mnli"]))
    return {
        "README.md": card({task: {s: f"{task}/{s}-*" for s in splits} for task, splits in configs.items()}),
        **files,
    }


def glue_rows(task: str, split: str, count: int) -> list[dict[str, Any]]:
    """The label can be read off the last word."""
    rng = random.Random(f"{task} {split}")
    columns = {"sst2": ("sentence",), "rte": ("sentence1", "sentence2")}.get(task, ("premise", "hypothesis"))
    num_labels = len(CLASSES.get(task, CLASSES["mnli"]))
    rows = []
    for i in range(count):
        label = i % num_labels
        texts = [" ".join(rng.choices(tiny.WORDS, k=rng.randint(2, 6))) for _ in columns]
        texts[-1] += f" {['good', 'bad', 'plot'][label]}"
        rows.append(dict(zip(columns, texts)) | {"label": -1 if split == "test" else label, "idx": i})
    return rows


def parquet(rows: list[dict[str, Any]], classes: tuple[str, ...] | None = None) -> bytes:
    """As `push_to_hub` writes it: the file itself names the classes of its label column."""
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(rows)
    if classes is not None:
        data = data.cast_column("label", datasets.ClassLabel(names=list(classes)))
    file = io.BytesIO()
    data.to_parquet(file)
    datasets.enable_progress_bars()
    return file.getvalue()


def card(configs: dict[str, dict[str, str]], default: str | None = None) -> bytes:
    """README.md with the `configs:` of a dataset: configuration -> split -> pattern of its files."""
    import yaml

    listed = []
    for name, splits in configs.items():
        files = [{"split": split, "path": path} for split, path in splits.items()]
        listed.append({"config_name": name, "data_files": files} | ({"default": True} if name == default else {}))
    return f"---\n{yaml.safe_dump({'configs': listed}, sort_keys=False)}---\n# A dataset\n".encode()
