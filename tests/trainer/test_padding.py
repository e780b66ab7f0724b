"""Runs without padding learn what padded rows of transformers' own layers teach, and go on to the bit."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from fastpeft.config import ConfigError, RunConfig
from fastpeft.kernels.ops.varlen_attention.op import Way
from fastpeft.signals import Need
from fastpeft.trainer import StopRequest, padding, train
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.padding import padding_share
from fastpeft.trainer.probes.answer_gradient import AnswerGradient
from fastpeft.trainer.step import forward_backward
from tests.support import chat_runs, kind_runs, problem_runs
from tests.support.closeness import relative_error
from tests.support.kind_runs import kind_run
from tests.support.probe_runs import ReadsAll, Steps, figures, needs_with, put_in
from tests.support.tiny import FAMILIES, make_causal_lm, make_model
from tests.support.tiny_runs import Listener, assert_same_outcome, assert_same_weights, weights

CLOSE = 1e-4
CAUSAL = {
    "qwen3": {},
    "llama": {},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}
ENCODER_KINDS = ("classification", *kind_runs.KINDS)


def run_of(folder: Path, kind: str, family: str, dropout: float = 0.0, **sections) -> RunConfig:
    """`model.name` has what the family's models have of their own; dropout is nowhere unless asked for."""
    if kind in ENCODER_KINDS:
        return kind_run(folder, kind, family, dropout, **sections)
    model = folder / family
    if not model.is_dir():
        make_causal_lm(model, family, max_position_embeddings=128, **CAUSAL[family])
    sections = {"adapter": {"dropout": dropout}, **sections}
    sections["model"] = {"name": str(model)} | sections.get("model", {})
    return (problem_runs.problem_run if kind == "word-problems" else chat_runs.chat_run)(folder, **sections)


def jobs(folder: Path, kind: str, family: str, **sections) -> tuple[Job, Job]:
    """One with transformers' own layers and padded batches, one without padding; the same adapter, none of it 0."""
    made = []
    for choice, is_fast in (("padded", False), ("none", True)):
        ours = {"training": {"padding": choice, "sampling": "random"}, "model": {"fast_layers": is_fast}}
        for section, values in sections.items():
            ours[section] = ours.get(section, {}) | values if isinstance(values, dict) else values
        job = build_job(run_of(folder, kind, family, **ours))
        assert job.task.train.varlen is (choice == "none"), job.notes
        generator = torch.Generator().manual_seed(3)
        flat = job.adapter.flat.data
        flat.add_(0.05 * torch.randn(flat.shape, generator=generator))
        made.append(job)
    padded, varlen = made
    return padded, varlen


def draw_rows(job: Job, drawn: str, rng: random.Random) -> np.ndarray:
    lengths = job.task.train.lengths
    order = np.argsort(lengths, kind="stable")
    if drawn == "one row":
        return order[[rng.randrange(len(order))]]
    if drawn == "all equal":
        same = np.flatnonzero(lengths == lengths[order[len(order) // 2]])
        return same[:5]
    if drawn == "one long among short":
        return order[[*range(5), -1]]
    return np.array(rng.sample(range(len(lengths)), 7))


def learned(job: Job, rows: np.ndarray) -> tuple[float, torch.Tensor, int]:
    """Loss, gradient of the adapter and the head, tokens."""
    batch, num_items = job.task.collate(rows, job.device), job.task.num_items(rows)
    signals = forward_backward(job.adapter, job.task.loss, [batch], num_items)
    return float(signals.loss), job.adapter.flat.grad.clone(), signals.num_tokens


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("classification", family) for family in FAMILIES),
        *(("token-classification", family) for family in FAMILIES),
        *(("classification", family) for family in CAUSAL),
        ("token-classification", "qwen3"),
        *(("word-problems", family) for family in CAUSAL),
        ("regression", "bert"),
        ("multi-label", "deberta-v2"),
        ("chat", "qwen3"),
    ],
)
def test_loss_and_gradient(kind, family, tmp_path, fresh_seed):
    padded, varlen = jobs(tmp_path, kind, family)
    rng = random.Random(fresh_seed)
    for drawn in ("mixed", "one row", "all equal", "one long among short"):
        rows = draw_rows(padded, drawn, rng)
        loss, gradient, num_tokens = learned(padded, rows)
        found_loss, found, found_tokens = learned(varlen, rows)
        assert found_tokens == num_tokens
        assert found_loss == pytest.approx(loss, rel=CLOSE)
        assert relative_error(found, gradient) <= CLOSE, drawn


def test_conversations_that_share_a_row(tmp_path, fresh_seed):
    """Each is a sequence by itself."""
    padded, varlen = jobs(tmp_path, "chat", "qwen3", dataset={"packing": True})
    assert len(padded.task.train) == len(varlen.task.train) < 24
    rows = np.arange(len(padded.task.train))
    batch = varlen.task.collate(rows, varlen.device)
    assert batch.sequences is not None
    assert len(batch.sequences.lengths) == 24
    loss, gradient, _ = learned(padded, rows)
    found_loss, found, _ = learned(varlen, rows)
    assert found_loss == pytest.approx(loss, rel=CLOSE)
    assert relative_error(found, gradient) <= CLOSE


# ---- what methods and schedules read -----------------------------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_the_calibration_of_iw_lora(family, estimator, tmp_path):
    """DeBERTa's projections also read the table of positions: both uses are summed before the norm is taken."""
    found = []
    settings = {"method": "iw_lora", "regulariser": {"estimator": estimator}}
    for job in jobs(tmp_path, "classification", family, **settings):
        torch.manual_seed(5)
        with job.adapter.calibrating():
            for position in range(3):
                job.adapter.before_calibration_batch()
                rows = job.batches.rows(position)
                learned(job, rows)
                job.adapter.after_calibration_batch(1.0)
        job.adapter.finish_calibration()
        importance = job.adapter.importance()
        assert importance is not None
        found.append(importance.sensitivity)
    assert found[1] == pytest.approx(found[0], rel=CLOSE)


@pytest.mark.parametrize("kind", ["classification", "token-classification", "word-problems"])
def test_the_signals_of_a_schedule(kind, tmp_path, monkeypatch):
    """All that GRAFF, FoT and the others read."""
    put_in(monkeypatch, ReadsAll, needs_with(Need.SECANT))
    family = "qwen3" if kind == "word-problems" else "deberta-v2"
    sections = {"schedule": {"name": "rex", "warmup_steps": 0}, "training": {"learning_rate": 1e-4}}
    seen = []
    for job in jobs(tmp_path, kind, family, **sections):
        steps = Steps(job)
        steps.take(2)
        seen.append([figures(measured) for measured in steps.job.schedule.seen[1:]])
    for padded, varlen in zip(*seen, strict=True):
        assert padded.keys() == varlen.keys()
        assert {"loss", "lens_entropy"} <= padded.keys()
        for name in padded:
            np.testing.assert_allclose(varlen[name], padded[name], rtol=1e-3, atol=1e-7, err_msg=name)


def test_a_table_of_positions_counts_as_no_tokens(tmp_path):
    """It has 2 L - 1 rows, as many as two rows of L and L - 1 have tokens."""
    run_of(tmp_path, "token-classification", "deberta-v2")
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    make_model(tmp_path / "model", "deberta-v2", position_buckets=64, **none)
    padded, varlen = jobs(tmp_path, "token-classification", "deberta-v2")
    lengths = padded.task.train.lengths.tolist()
    longer = next(length for length in lengths if length - 1 in lengths)
    rows = np.array([lengths.index(longer - 1), lengths.index(longer)])
    squares = []
    for job in (padded, varlen):
        answers, batch = AnswerGradient(job.adapter), job.task.collate(rows, job.device)
        answers.start()
        answers.before_pass(batch)
        job.task.loss(job.adapter.model, batch, job.task.num_items(rows)).loss.backward()
        answers.after_pass()
        squares.append(answers.squares(None))
    assert relative_error(squares[1], squares[0]) <= CLOSE


def test_adalora_prunes_the_same(tmp_path):
    sections = {"adalora": {"initial_rank": 6, "target_rank": 3}, "budget": "8steps", "evaluation": {"every": "end"}}
    kept = []
    for choice in ("padded", "none"):
        training = {"padding": choice, "sampling": "random", "learning_rate": 1e-3}
        run = run_of(tmp_path, "classification", "deberta-v2", method="adalora", training=training, **sections)
        assert train(run, results_dir=tmp_path, name=choice).status == "done"
        kept.append(weights(tmp_path / choice, "adapter"))
    for name, value in kept[0].items():
        assert kept[1][name].shape == value.shape
        assert relative_error(kept[1][name], value) <= 1e-2, name


# ---- whole runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "family"), [("classification", "deberta-v2"), ("word-problems", "gemma3_text")])
def test_a_resume_goes_on_to_the_bit(kind, family, tmp_path):
    """Dropout is on, in attention too."""
    more = {"max_new_tokens": 4} if kind == "word-problems" else {}
    run = run_of(
        tmp_path, kind, family, dropout=0.1, budget="6steps", evaluation={"every": "3steps", **more},
        training={"padding": "none", "checkpoint_steps": 2},
    )  # fmt: skip
    unbroken = train(run, results_dir=tmp_path, name="unbroken")
    stop = StopRequest()
    listener = Listener(lambda e: e["type"] == "checkpoint" and setattr(stop, "signal", signal.SIGTERM))
    assert train(run, results_dir=tmp_path, name="broken", reporter=listener, stop=stop).status == "stopped"
    resumed = train(None, results_dir=tmp_path, name="broken", resume=True)
    assert_same_outcome(resumed, unbroken)
    assert_same_weights(weights(tmp_path / "broken", "adapter"), weights(tmp_path / "unbroken", "adapter"))


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("classification", "deberta-v2"),
        ("classification", "qwen3"),
        pytest.param("token-classification", "roberta", marks=pytest.mark.soak),
    ],
)
def test_peft_scores_the_adapter_the_same(kind, family, tmp_path):
    run = run_of(
        tmp_path, kind, family, dropout=0.1, budget="6steps", evaluation={"every": "end"},
        training={"padding": "none"},
    )  # fmt: skip
    result = train(run, results_dir=tmp_path, name="r")
    job = build_job(run)
    auto = getattr(transformers, job.task.auto_class)
    base = auto.from_pretrained(job.backbone.model.name_or_path, **job.task.load_arguments())
    model = PeftModel.from_pretrained(base, tmp_path / "r" / "adapter").eval()
    assert job.task.export_check(job.backbone).score(model, torch.device("cpu")) == result.metric["value"]


# ---- which way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["group_by_length", "random"])
def test_auto_goes_by_what_was_measured(sampling, tmp_path, monkeypatch):
    """Rows of one length have little padding to leave out, and rows drawn at random much."""
    run = kind_run(tmp_path, "classification", training={"sampling": sampling})
    share = padding_share(
        build_job(kind_run(tmp_path, "classification", training={"sampling": sampling, "padding": "padded"})).batches
    )
    job = build_job(run)
    assert job.batches.grouped == (sampling == "group_by_length")
    assert job.task.train.varlen == (share > 0.1) == (sampling == "random")
    assert ("the rows of a batch lie one behind another, without padding" in job.notes) == job.task.train.varlen
    monkeypatch.setattr(padding, "PAYS_ABOVE", {"cpu": share / 2})
    assert build_job(run).task.train.varlen
    monkeypatch.setattr(padding, "PAYS_ABOVE", {"cuda": 0.0})
    assert not build_job(run).task.train.varlen


@pytest.mark.parametrize("why", ["", "torch.nn.attention.varlen: it has no dropout"])
def test_a_gpu_is_told_how_attention_is_computed(why, monkeypatch, tmp_path):
    job = build_job(kind_run(tmp_path, "regression", training={"padding": "none"}))
    monkeypatch.setattr(padding, "attention_way", lambda model: Way("a way", why))
    said = padding._way(job.backbone, torch.device("cuda"))
    assert said == ["attention within rows: a way" + (f" ({why})" if why else "")]
    assert padding._way(job.backbone, torch.device("cpu")) == []


def test_a_model_that_is_not_known_is_padded_and_says_so(tmp_path):
    make_model(tmp_path / "model", "bert")
    run = kind_run(tmp_path, "regression", training={"padding": "none"}, model={"name": str(tmp_path / "electra")})
    make_electra(tmp_path)
    job = build_job(run)
    assert not job.task.train.varlen
    assert [note for note in job.notes if "training.padding" in note] == [
        "training.padding none: ElectraForSequenceClassification is no model that it knows, so that rows are padded"
    ]


def make_electra(folder: Path) -> None:
    shutil.copytree(folder / "model", folder / "electra")
    config = transformers.AutoConfig.for_model(
        "electra", vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(folder / "electra")


def test_a_model_that_lets_rows_leak_is_padded_and_says_so(tmp_path, monkeypatch):
    from fastpeft.kernels.ops.varlen_attention import op

    run = kind_run(tmp_path, "regression", training={"padding": "none"})

    def leaking(query, key, value, queries, sequences, *more):
        y = original(query, key, value, queries, sequences, *more)
        return y.roll(1, 0)

    original = op._by_runs
    monkeypatch.setattr(op, "_by_runs", leaking)
    job = build_job(run)
    assert not job.task.train.varlen
    (told,) = [note for note in job.notes if "training.padding" in note]
    assert "BertForSequenceClassification computes other outputs for rows in one piece: they differ by" in told


def test_a_cached_prefix_keeps_padded_rows(tmp_path):
    with pytest.raises(ConfigError, match=r"training\.padding: none does not go with training\.cache_prefix"):
        kind_run(tmp_path, "classification", training={"padding": "none", "cache_prefix": True})
