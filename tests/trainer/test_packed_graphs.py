"""Captured steps of rows that lie one behind another: they can be replayed with other lengths, and what fills a bucket
up teaches nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastpeft
from fastpeft.config import RunConfig
from fastpeft.data.batches import Packing
from fastpeft.kernels.sequences import Sequences
from fastpeft.trainer import buckets
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.graphs import capture_steps
from fastpeft.trainer.micro_batches import MicroBatches
from fastpeft.trainer.step import forward_backward
from tests.support import chat_runs, problem_runs
from tests.support.closeness import relative_error
from tests.support.every_kind import run_of_kind
from tests.support.graphed_jobs import after_steps_on_a_gpu, batches_of, collated, graphed_job, train_with, want_graphs
from tests.support.kind_runs import kind_run
from tests.support.step_recorder import NotReplayable, Rerun, check_replayable
from tests.support.tiny import FAMILIES, make_causal_lm
from tests.support.tiny_runs import assert_same_weights, strict_events, tiny_run, weights

KINDS = ("classification", "token-classification", "regression", "multi-label", "word-problems", "chat")
PACKED = {"padding": "none", "sampling": "random"}
CAUSAL = {
    "qwen3": {},
    "llama": {},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}
ENCODERS = [family for family in FAMILIES if not family.startswith("deberta")]
"""DeBERTa's kernel asks nothing of the host, but its form on a CPU does (tests/kernels/test_disentangled_triton.py)."""
WITH_FAMILIES = [
    *(("classification", family) for family in (*ENCODERS, *CAUSAL)),
    *(("token-classification", family) for family in (*ENCODERS, "qwen3")),
    *(("word-problems", family) for family in CAUSAL),
    ("chat", "qwen3"),
]


def packed_run(folder: Path, kind: str, family: str | None = None, dropout: float = 0.1, **sections: Any) -> RunConfig:
    sections["training"] = PACKED | sections.get("training", {})
    if family is None:
        return run_of_kind(folder, kind, **sections)
    if kind not in ("word-problems", "chat"):
        return kind_run(folder, kind, family, dropout, **sections)
    if not (folder / family).is_dir():
        make_causal_lm(folder / family, family, max_position_embeddings=128, **CAUSAL[family])
    sections = {"adapter": {"dropout": dropout}, "model": {"name": str(folder / family)}, **sections}
    return (problem_runs.problem_run if kind == "word-problems" else chat_runs.chat_run)(folder, **sections)


# ---- replayable ------------------------------------------------------------------------------


def check_bucket(config: RunConfig, patch: pytest.MonkeyPatch) -> list[Any]:
    """The operations of a bucket's step, of rows of other lengths each time; raises NotReplayable."""
    patch.setattr("fastpeft.trainer.buckets.MOST_WIDTHS", 2)  # so that a bucket has many batches
    patch.setattr("fastpeft.trainer.buckets.MOST_LONGEST", 1)
    job, graphs, _ = graphed_job(config, patch)
    assert job.task.train.varlen
    bucket, found = next(iter(graphs.steps.items()))
    rows_of_fills = of_one_count(job, batches_of(job, bucket, 50))

    def fill(number: int, rows: Any) -> None:
        graphs.fill(found.inputs, *collated(job, rows), 1e-3 / number)

    fills = [lambda n=n, rows=rows: fill(n, rows) for n, rows in enumerate(rows_of_fills, 1)]
    return check_replayable(found.step, fills)


def of_one_count(job: Job, batches: list[np.ndarray]) -> list[np.ndarray]:
    """Four, each unlike the one before it, with as many labels: on a CPU, where it is free, the cross entropy of a
    language model looks how many there are."""
    by_count: dict[int, dict[tuple[int, ...], np.ndarray]] = {}
    for rows in batches:
        by_count.setdefault(job.task.num_items(rows), {})[tuple(job.task.train.text_lengths(rows))] = rows
    different = list(max(by_count.values(), key=len).values())
    assert len(different) > 1
    return [different[i % len(different)] for i in range(4)]


@pytest.mark.parametrize(("kind", "family"), WITH_FAMILIES)
def test_the_step_of_every_family_is_replayable(
    kind: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout is on, in attention too."""
    operations = check_bucket(packed_run(tmp_path, kind, family, training={"batch_size": 6}), monkeypatch)
    assert len(operations) > 200
    assert "aten._fused_adamw_.tensor_lr" in {operation.name for operation in operations}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["iw_lora", "full"])
def test_the_step_of_a_method_is_replayable(
    method: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"regulariser": {"online": False}} if method == "iw_lora" else {}
    assert check_bucket(packed_run(tmp_path, kind, method=method, **settings), monkeypatch)


def test_several_texts_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = packed_run(tmp_path, "chat", "qwen3", dataset={"packing": True}, training={"batch_size": 2})
    assert check_bucket(config, monkeypatch)


def test_rows_of_known_lengths_are_not_replayable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launched step on a CPU goes by."""

    def known(ends: torch.Tensor, num_tokens: int, longest: int, num_read: int) -> Sequences:
        return replace(Sequences.of(ends.diff().tolist()), num_read=num_read)

    monkeypatch.setattr(buckets, "Sequences", known)
    with pytest.raises(NotReplayable, match="batch waits for the device: tolist"):
        check_bucket(packed_run(tmp_path, "classification"), monkeypatch)


# ---- the same step ---------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "family"), WITH_FAMILIES)
def test_filling_a_bucket_up_changes_neither_loss_nor_gradient(
    kind: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the model's fp32, where attention is computed by a mask beside rows of one length at a time."""
    monkeypatch.setattr("fastpeft.trainer.buckets.MOST_WIDTHS", 1)
    config = packed_run(tmp_path, kind, family, dropout=0.0, training={"batch_size": 6})
    job, graphs, _ = graphed_job(config, monkeypatch)
    job.adapter.flat.data.add_(0.05 * torch.randn(job.adapter.flat.data.shape))
    bucket, found = next(iter(graphs.steps.items()))
    assert isinstance(bucket.shape, Packing)
    own = copy.copy(job.task)
    own.train = replace(job.task.train, packings=())

    def learned(batch: Any, num_items: Any) -> tuple[torch.Tensor, torch.Tensor]:
        signals = forward_backward(job.adapter, job.task.loss, [batch], num_items)
        return signals.loss.clone(), job.adapter.flat.grad.clone()

    filled = 0
    for rows in batches_of(job, bucket, 3):
        batch, num_items = collated(job, rows)
        graphs.fill(found.inputs, batch, num_items, 1e-3)
        plain = own.collate(rows, job.device)
        assert plain.sequences is not None
        assert plain.num_tokens == batch.num_tokens == plain.sequences.num_tokens
        filled += bucket.num_tokens - plain.num_tokens
        loss, gradient = learned(plain, num_items)
        own_loss, own_gradient = learned(found.inputs.batch(), found.inputs.num_items)
        torch.testing.assert_close(own_loss, loss, rtol=1e-6, atol=0)
        assert relative_error(own_gradient, gradient) <= 1e-5
    assert filled > 3


@pytest.mark.parametrize("kind", ["classification", "token-classification", "word-problems", "chat"])
def test_what_fills_a_bucket_up_is_read_by_nobody(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens there change no bit."""
    monkeypatch.setattr("fastpeft.trainer.buckets.MOST_WIDTHS", 1)
    job, graphs, _ = graphed_job(packed_run(tmp_path, kind, adapter={"dropout": 0.0}), monkeypatch)
    job.adapter.flat.data.add_(0.05 * torch.randn(job.adapter.flat.data.shape))
    job.adapter.model.eval()
    (rows,) = batches_of(job, next(iter(graphs.steps)), 1)
    found = []
    for filler in (0, 3):
        batch, num_items = collated(job, rows)
        batch.inputs["input_ids"][:, batch.num_tokens :] = filler
        signals = forward_backward(job.adapter, job.task.loss, [batch], num_items)
        found.append((signals.loss.clone(), job.adapter.flat.grad.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].norm() > 0


@pytest.mark.parametrize("kind", ["classification", "token-classification", "word-problems"])
def test_a_run_with_captured_steps_is_one_without(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a classifier to the bit. Where labels are counted, sums over other numbers of rows round otherwise."""
    config = packed_run(tmp_path, kind, method="iw_lora", budget="24steps", regulariser={"online": False})
    rerun, events = Rerun(), {}
    for name, capture in (("captured", rerun), ("launched", None)):
        with monkeypatch.context() as patch:
            train_with(patch, capture)
            assert fastpeft.train(config, results_dir=tmp_path, name=name).status == "done"
        events[name] = [event["loss"] for event in strict_events(tmp_path / name) if event["type"] == "step"]
    assert rerun.num_replays > 12
    if kind == "classification":
        assert events["captured"] == events["launched"]
        assert_same_weights(weights(tmp_path / "captured"), weights(tmp_path / "launched"))
    else:
        assert events["captured"] == pytest.approx(events["launched"], rel=1e-3)


# ---- which steps are replayed ----------------------------------------------------------------


def test_whole_batches_that_fit_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, graphs, _ = graphed_job(tiny_run(tmp_path, method="lora", training=PACKED | {"batch_size": 9}), monkeypatch)
    taken = {}
    for position in range(len(job.batches)):
        batches = MicroBatches(job, position, "here", pytest.fail)
        (batch,) = batches
        bucket = graphs.bucket_of(batches)
        taken.setdefault(bucket is not None, []).append(len(batches.batch))
        assert batch.sequences is not None
        assert (batch.sequences.lengths is None) == (bucket is not None)
        if bucket is not None:
            assert batch.inputs["input_ids"].shape == (1, bucket.num_tokens)
    assert taken == {True: [9] * 10, False: [96 % 9]}
    (note,) = [note for note in job.notes if "CUDA graph" in note]
    assert note.startswith("a step is one CUDA graph, for batches of 9 rows one behind another, filled up to ")
    job.limits.training = 20
    assert graphs.bucket_of(MicroBatches(job, 0, "here", pytest.fail)) is None


def test_a_refused_capture_leaves_batches_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(step: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    want_graphs(monkeypatch)
    job = build_job(packed_run(tmp_path, "classification"))
    assert job.task.train.packings
    assert capture_steps(job, lambda device: fails) is None
    assert job.task.train.packings == job.batches.encoded.packings == ()
    assert job.notes[-1] == "no CUDA graphs: capturing it failed: operation not permitted when stream is capturing"
    assert job.task.collate(job.batches.rows(0), job.device).sequences.lengths is not None


def test_fewer_rows_than_a_batch_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want_graphs(monkeypatch)
    job = build_job(packed_run(tmp_path, "classification", training={"batch_size": 512}))
    assert "no CUDA graphs: no batch has training.batch_size rows" in job.notes


# ---- on a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("kind", "family"), [("classification", "bert"), ("classification", "deberta-v2"), ("word-problems", "qwen3")]
)
def test_on_a_gpu_twenty_replayed_steps_are_twenty_launched_ones(
    kind: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want_graphs(monkeypatch)
    config = packed_run(tmp_path, kind, family, method="lora", budget="20steps")
    replayed, launched = (after_steps_on_a_gpu(config, captured) for captured in (True, False))
    torch.testing.assert_close(replayed, launched, rtol=1e-3, atol=1e-6)
