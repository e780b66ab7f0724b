"""Jobs on tiny models and a tiny pair task, ready to step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastpeft.config import load_run
from fastpeft.trainer.build import Job, build_job
from tests.support.tiny import make_model

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT = {
    "deberta-v2": {**_NO_DROPOUT, "cls_dropout": 0.0},
    "bert": _NO_DROPOUT,
    "roberta": _NO_DROPOUT,
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
}


@pytest.fixture
def make_run(tmp_path: Path, pairs_folder: Path) -> Callable:
    """make_run(family, dropout=False, masked_lm=False, **overrides with __ for the dots)."""

    def make(family: str = "bert", dropout: bool = False, masked_lm: bool = False, **overrides: object):
        folder = tmp_path / f"{family}-{dropout}-{masked_lm}"
        if not folder.exists():
            make_model(folder, family, masked_lm=masked_lm, **({} if dropout else NO_DROPOUT[family]))
        values = {
            "model.name": str(folder),
            "dataset.name": "local",
            "dataset.path": str(pairs_folder),
            "training.precision": "fp32",
            "training.batch_size": 8,
            "evaluation.every": "end",
            "wandb.mode": "disabled",
            "method": "iw_lora",
            "regulariser.warmup_steps": 3,
            "adapter.target_modules": "all-linear",
            "adapter.rank": 4,
            "schedule.warmup_steps": 2,
        }
        given = {key.replace("__", "."): value for key, value in overrides.items()}
        return load_run("iwlora_mnli", values | given)

    return make


@pytest.fixture
def make_job(make_run: Callable) -> Callable[..., Job]:
    return lambda *args, **overrides: build_job(make_run(*args, **overrides))
