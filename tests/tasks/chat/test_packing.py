"""Packed rows are the same rows: none sees its neighbour, and where a model would let it, they are not packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpeft.config import ConfigError
from fastpeft.tasks.chat.chat_rows import ChatRows
from fastpeft.tasks.chat.packing import packed
from fastpeft.trainer import train
from fastpeft.trainer.build import Job, build_job
from tests.support.chat_runs import chat_run, write_chats
from tests.support.tiny import make_causal_lm

CPU = torch.device("cpu")


def rows_of(*lengths: int, max_length: int = 10) -> ChatRows:
    """Row i is of the tokens i, of which the last is labelled."""
    labelled = np.concatenate([[False] * (length - 1) + [True] for length in lengths])
    return ChatRows(
        tokens=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_token=0,
        max_length=max_length,
        is_labelled=labelled,
        sources=np.arange(len(lengths)),
    )


def test_rows_share_one_where_they_fit_and_are_whole() -> None:
    rows = rows_of(6, 4, 9, 3, 1, 7)
    found = packed(rows)
    assert len(found) == 3
    assert found.lengths.tolist() == [10, 10, 10]
    assert sorted(found.tokens.tolist()) == sorted(rows.tokens.tolist())
    assert found.num_labelled.sum() == len(rows)
    assert found.positions is not None
    starts = np.flatnonzero(found.positions == 0)
    assert len(starts) == len(rows)
    for start in starts:
        token = found.tokens[start]
        length = int(rows.lengths[token])
        assert found.tokens[start : start + length].tolist() == [token] * length
        assert found.positions[start : start + length].tolist() == list(range(length))
        assert found.is_labelled[start : start + length].tolist() == [False] * (length - 1) + [True]


def job_of(folder: Path, family: str, packing: bool, **model: Any) -> Job:
    """Without dropout."""
    make_causal_lm(folder / "model", family, max_position_embeddings=128, **model)
    dataset = {"path": str(write_chats(folder / "multi")), "packing": packing}
    chat_run(folder)  # writes a model of its own kind
    make_causal_lm(folder / "model", family, max_position_embeddings=128, **model)
    method = "full" if family == "gpt2" else "lora"  # GPT-2 has no nn.Linear to adapt
    return build_job(chat_run(folder, method=method, dataset=dataset, adapter={"dropout": 0.0}))


def gradient(job: Job) -> tuple[float, torch.Tensor]:
    """Of all training rows."""
    generator = torch.Generator().manual_seed(1)
    job.adapter.flat.data.copy_(0.1 * torch.randn(job.adapter.flat.data.shape, generator=generator))
    job.adapter.flat.grad.zero_()
    rows = np.arange(len(job.task.train))
    loss = job.task.loss(job.adapter.model, job.task.collate(rows, CPU), job.task.num_items(rows)).loss
    loss.backward()
    return loss.item(), job.adapter.flat.grad.double().clone()


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gpt2"])
def test_packed_training_is_unpacked_training(family: str, tmp_path: Path) -> None:
    plain, together = (job_of(tmp_path / str(packing), family, packing) for packing in (False, True))
    assert len(together.task.train) < len(plain.task.train) / 2
    assert any(note.startswith("packed: 24 rows into") for note in together.notes)
    (loss, wanted), (packed_loss, found) = gradient(plain), gradient(together)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_a_model_that_lets_rows_leak_is_trained_unpacked(family: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "bloom": {"n_layer": 2, "n_head": 4}}
    job = job_of(tmp_path, family, True, **sizes[family])
    assert len(job.task.train) == 24
    (note,) = [note for note in job.notes if note.startswith("dataset.packing: ")]
    assert "does not keep packed rows apart" in note
    assert note.endswith("they are trained unpacked")


def test_a_packed_run_learns(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training": {"learning_rate": 3e-3, "batch_size": 2}, "evaluation": {"every": "end"}}
    run = chat_run(tmp_path, method="full", dataset={"packing": True}, budget="120steps", **settings)
    assert train(run, results_dir=tmp_path, name="r").metric["value"] > 0.95


def test_packing_does_not_go_with_a_cache_of_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.packing: does not go with training\.cache_prefix"):
        chat_run(tmp_path, dataset={"packing": True}, training={"cache_prefix": True})
