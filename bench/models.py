"""Sequence classifiers of real shapes with random weights, and batches of random tokens. No network, no tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastpeft.data.batches import Batch, Batches
from fastpeft.models.backbone import Backbone, freeze, quiet_transformers
from fastpeft.models.fast import speed_up
from fastpeft.signals import Need
from fastpeft.tasks.base import BatchLoss
from fastpeft.tasks.sequences.examples import Encoded, collate

SHAPES: dict[str, dict[str, Any]] = {
    "minilm": {  # MiniLM-L6: 22M
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "deberta-v3-base": {  # 184M
        "model_type": "deberta-v2",
        "vocab_size": 128100,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "relative_attention": True,
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "position_buckets": 256,
        "position_biased_input": False,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "max_position_embeddings": 512,
    },
}
NUM_LABELS = 3
MEAN_LENGTH, LENGTH_SIGMA = 39.0, 0.42
"""Log-normal lengths: MNLI's mean of 39 tokens and its 99th percentile of 95."""
LONGEST, SHORTEST = 128, 8
POOL_BATCHES = 64


@dataclass
class Host:
    """A frozen model. All copies share its weights."""

    backbone: Backbone
    name: str

    @classmethod
    def build(cls, name: str, dtype: torch.dtype, device: torch.device) -> Host:
        """`name`: one of SHAPES, or a folder with a config.json. Weights in the folder are not read."""
        import transformers

        if name in SHAPES:
            settings = dict(SHAPES[name])
            config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        elif (Path(name) / "config.json").is_file():
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        else:
            raise SystemExit(f"--model {name}: neither {', '.join(SHAPES)} nor a folder with a config.json")
        config.num_labels = NUM_LABELS
        torch.manual_seed(0)
        with quiet_transformers():
            model = transformers.AutoModelForSequenceClassification.from_config(config)
        inner = model.base_model_prefix
        head = [
            child
            for child, module in model.named_children()
            if child != inner and next(module.parameters(), None) is not None
        ]
        freeze(model, head, dtype, device)
        segments = getattr(config, "type_vocab_size", 0) > 1
        return cls(Backbone(model.train(), None, head, segments, None, dtype, "SEQ_CLS", [model]), name)

    def copy(self, fast: bool = False) -> Backbone:
        """New modules and a new head on the same frozen weights. `fast`: with fastpeft's fast layers."""
        backbone = self.backbone
        inner = getattr(backbone.model, backbone.model.base_model_prefix)
        shared = {id(tensor): tensor for tensor in [*inner.parameters(), *inner.buffers()]}
        model = copy.deepcopy(backbone.model, shared)
        if fast:
            speed_up(model)
        return Backbone(**vars(backbone) | {"model": model, "entry_points": [model]})

    @property
    def frozen_mb(self) -> float:
        inner = getattr(self.backbone.model, self.backbone.model.base_model_prefix)
        return sum(p.numel() * p.element_size() for p in inner.parameters()) / 2**20

    def shape(self) -> dict[str, Any]:
        config = self.backbone.model.config
        names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        return {name: getattr(config, name, None) for name in (*names, "vocab_size")}


def classification_loss(model: nn.Module, batch: Batch, num_items: int, needs: Collection[Need] = ()) -> BatchLoss:
    """Like Task.loss of a classifier, for models and batches without a task."""
    logits = model(**batch.inputs).logits.float()
    return BatchLoss(nn.functional.cross_entropy(logits, batch.labels, reduction="sum") / num_items)


def random_batches(host: Host, batch_size: int, num_batches: int, device: torch.device) -> list[Batch]:
    """Training batches grouped by length, at even quantiles of the width."""
    config = host.backbone.model.config
    generator = np.random.default_rng(0)
    num_rows = POOL_BATCHES * batch_size
    longest = min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST)
    mu = np.log(MEAN_LENGTH) - LENGTH_SIGMA**2 / 2
    lengths = np.clip(generator.lognormal(mu, LENGTH_SIGMA, num_rows).round(), SHORTEST, longest).astype(np.int64)
    total = int(lengths.sum())
    encoded = Encoded(
        tokens=generator.integers(5, config.vocab_size, total, dtype=np.int32),
        segments=np.zeros(total, dtype=np.uint8) if host.backbone.reads_segments else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=generator.integers(0, NUM_LABELS, num_rows),
        num_truncated=0,
        pad_token=0,
        max_length=longest,
    )
    ordered = sorted(
        Batches(encoded, batch_size, 0, grouped=True).epoch(0), key=lambda rows: int(encoded.widths[rows].max())
    )
    chosen = [ordered[int((i + 0.5) * len(ordered) / num_batches)] for i in range(num_batches)]
    return [collate(encoded, rows, device) for rows in chosen]
