"""The check before training: what it lets through, what it makes slower, and what it refuses by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from fastpeft.data.batches import TokenRows, micro_batches
from fastpeft.errors import UserError
from fastpeft.tasks.self_check import apart, check_tokens, longest_row, sample_rows
from fastpeft.trainer import train
from fastpeft.trainer.build import Job, build_job
from tests.support.kind_runs import KINDS, kind_run
from tests.support.problem_runs import problem_run
from tests.support.tiny import FAMILIES, make_model, save_tokenizer
from tests.support.tiny_runs import strict_events, tiny_run


def save_classifier(folder: Path, name: str, **settings: Any) -> None:
    """A random model of another family in place of a run's own, with its tokenizer."""
    vocab = save_tokenizer(folder, "bert")
    common = {"vocab_size": len(vocab), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    default = transformers.CONFIG_MAPPING[name]()
    common = {key: value for key, value in common.items() if hasattr(default, key)}
    config = transformers.AutoConfig.for_model(name, **common | settings)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)


def job_on(folder: Path, name: str, settings: dict[str, Any] | None = None, **sections: Any) -> Job:
    run = tiny_run(folder, method="lora", **sections)
    save_classifier(folder / "model", name, **settings or {})
    return build_job(run)


def own_loss(job: Job, rows: np.ndarray) -> float:
    """Each row by itself, unpadded, through the model as it was loaded."""
    task: Any = job.task
    model = job.adapter.model.eval()
    losses = []
    with torch.no_grad():
        for row in rows:
            places = slice(task.train.offsets[row], task.train.offsets[row + 1])
            inputs = {"input_ids": torch.from_numpy(task.train.tokens[places].astype("int64"))[None]}
            if task.train.segments is not None:
                inputs["token_type_ids"] = torch.from_numpy(task.train.segments[places].astype("int64"))[None]
            logits = model(**inputs).logits
            losses.append(float(nn.functional.cross_entropy(logits, torch.tensor([task.train.labels[row]]))))
    return float(np.mean(losses))


def batch_loss(job: Job, rows: np.ndarray) -> float:
    """As a training step has it, without dropout."""
    model, task = job.adapter.model.eval(), job.task
    parts = micro_batches(task.train, rows, job.limits.training)
    with torch.no_grad():
        return sum(float(task.loss(model, task.collate(part, job.device), len(rows)).loss) for part in parts)


# ---- what is right -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_pass_without_a_word(family: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    make_model(tmp_path / "model", family)
    state = torch.get_rng_state()
    job = build_job(run)
    assert job.task.train.padded
    assert not [note for note in job.notes if "exact and slower" in note]
    torch.manual_seed(run.training.seed)
    unchecked = build_job(replace(run, model=replace(run.model, check=False)))
    assert torch.equal(job.adapter.flat.data, unchecked.adapter.flat.data)
    assert len(state) == len(torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_checked(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers by the width of the batch."""
    run = kind_run(tmp_path, kind)
    real = transformers.BertModel.forward

    def by_width(self: Any, *args: Any, **more: Any) -> Any:
        out, width = real(self, *args, **more), args[0].shape[1]
        out.last_hidden_state = out.last_hidden_state * (1 + 0.1 * width)
        if out.pooler_output is not None:
            out.pooler_output = out.pooler_output * (1 + 0.1 * width)
        return out

    monkeypatch.setattr(transformers.BertModel, "forward", by_width)
    job = build_job(run)
    assert not job.task.train.padded
    assert not job.task.validation.padded
    (note,) = [note for note in job.notes if "exact and slower" in note]
    assert "only rows of one length share a batch" in note


def test_the_check_changes_no_bit_of_training(tmp_path: Path) -> None:
    losses = []
    for check in (True, False):
        train(tiny_run(tmp_path, budget="3steps", model={"check": check}), results_dir=tmp_path, name=str(check))
        losses.append([e["loss"] for e in strict_events(tmp_path / str(check)) if e["type"] == "step"])
    assert losses[0] == losses[1]


# ---- slower, and right ---------------------------------------------------------------------


def test_a_model_that_reads_its_padding_gets_rows_of_one_length(tmp_path: Path) -> None:
    """FNet mixes all positions and has no mask."""
    settings = {"intermediate_size": 48, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0}
    job = job_on(tmp_path, "fnet", settings, adapter={"target_modules": "all-linear", "rank": 4, "dropout": 0.0})
    assert not job.task.train.padded
    by_length = np.argsort(job.task.train.lengths)
    rows = np.concatenate([by_length[:4], by_length[-4:]])
    assert batch_loss(job, rows) == pytest.approx(own_loss(job, rows), rel=2e-6)
    job.task.train = replace(job.task.train, padded=True)
    assert batch_loss(job, rows) != pytest.approx(own_loss(job, rows), rel=5e-6)


# ---- refused -------------------------------------------------------------------------------


def test_a_model_whose_rows_change_each_other_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = transformers.BertModel.forward

    def mixed(self: Any, *args: Any, **more: Any) -> Any:
        out = real(self, *args, **more)
        out.pooler_output = out.pooler_output + len(args[0])
        return out

    run = tiny_run(tmp_path)
    monkeypatch.setattr(transformers.BertModel, "forward", mixed)
    with pytest.raises(
        UserError, match="BertForSequenceClassification computes other outputs for a row in a batch"
    ) as error:
        build_job(run)
    assert error.value.exit_code == 2
    assert "beside a row of its own length" in str(error.value)
    assert build_job(replace(run, model=replace(run.model, check=False))).task.train.padded


def test_a_model_that_cannot_read_a_row_is_refused_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, *args: Any, **more: Any) -> Any:
        raise ValueError("rows of 8 tokens only")

    run = tiny_run(tmp_path)
    monkeypatch.setattr(transformers.BertModel, "forward", fails)
    with pytest.raises(UserError, match=r"cannot read a row of \d+ tokens: ValueError: rows of 8 tokens only"):
        build_job(run)


def test_tokens_without_an_embedding_and_rows_without_positions_are_counted(tmp_path: Path) -> None:
    job = build_job(tiny_run(tmp_path))
    backbone = job.task.load_model(job.run.model, torch.float32, job.device)
    train_rows = job.task.train
    tokens = train_rows.tokens.copy()
    tokens[train_rows.offsets[3]] = tokens[train_rows.offsets[5]] = 4_000
    with pytest.raises(UserError, match=r"2 of 96 training rows hold tokens that it has no embedding for"):
        check_tokens(backbone, {"training": replace(train_rows, tokens=tokens)})
    backbone.max_positions = int(train_rows.lengths.max()) - 1
    with pytest.raises(UserError, match=rf"Set dataset\.max_length={backbone.max_positions}"):
        check_tokens(backbone, {"training": train_rows})


# ---- the rows ------------------------------------------------------------------------------


def rows_of(lengths: list[int]) -> TokenRows:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenRows(tokens=np.arange(offsets[-1]), offsets=offsets, pad_token=0, max_length=max(lengths))


@pytest.mark.parametrize("lengths", [[3, 9, 5, 40, 2], [7, 7, 7, 7], [400, 300, 500], [1, 1], [60]])
def test_the_sample_has_rows_of_unequal_lengths_that_end_as_rows_do(lengths: list[int]) -> None:
    model, rows = nn.Linear(2, 2), rows_of(lengths)
    sample = sample_rows(model, rows)
    assert len(sample) == 3
    assert sample.lengths.max() <= longest_row(model) == 64
    assert len(set(sample.lengths.tolist())) == min(3, max(lengths))
    ends = {int(rows.tokens[end - 1]) for end in rows.offsets[1:]}
    assert all(int(sample.tokens[end - 1]) in ends for end in sample.offsets[1:])


def test_a_large_model_gets_shorter_rows() -> None:
    with torch.device("meta"):
        assert longest_row(nn.Linear(30_000, 30_000)) == 8


def test_what_is_not_finite_is_infinitely_far_apart() -> None:
    ones = torch.ones(2, 3)
    assert apart(ones, ones) == 0
    assert apart(1.5 * ones, ones) == pytest.approx(0.5)
    assert apart(ones * float("nan"), ones) == float("inf")
    assert apart(torch.ones(2, 2), ones) == float("inf")


def test_language_models_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = problem_run(tmp_path)
    assert build_job(run).task.train.padded
    real = transformers.Qwen3Model.forward

    def by_padding(self: Any, *args: Any, **more: Any) -> Any:
        out = real(self, *args, **more)
        ids = more.get("input_ids")
        if ids.shape[1] > 12 and (ids == self.config.pad_token_id).any():  # check_causal_lm has short rows of any token
            out.last_hidden_state = out.last_hidden_state.roll(1, -1)
        return out

    monkeypatch.setattr(transformers.Qwen3Model, "forward", by_padding)
    job = build_job(run)
    assert not job.task.train.padded
    assert any("Qwen3ForCausalLM computes other outputs" in note for note in job.notes)
