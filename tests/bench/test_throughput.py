"""Throughput in turns: rows train on the same tokens, which are counted right; what fails or differs is said."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import throughput, throughput_presets, throughput_rows, throughput_turns
from bench.throughput_inputs import Inputs, grouped_batches, prepare
from bench.throughput_presets import (
    BASE,
    LEVERS,
    ONLY_BY_NAME,
    PEERS,
    PREFIX,
    PRESETS,
    ROWS,
    Lever,
    Plan,
    levers_of,
    with_settings,
)
from bench.throughput_turns import RowFailed
from fastpeft.data.batches import IGNORE
from fastpeft.models.prefix import FrozenPrefix
from tests.support.tiny import _settings

SMALL = {"training.batch_size": 4, "adapter.rank": 4}
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24,
}  # fmt: skip


def plan(preset: str, model: Path | None, **more) -> Plan:
    fields = {"data": None, "device": "cpu", "threads": 1, "warmup_steps": 3, "num_steps": 8, "settings": SMALL}
    return Plan(preset=preset, model=None if model is None else str(model), **fields | more)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of one that drops nothing."""
    folder = tmp_path_factory.mktemp("encoder")
    settings = {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(_settings("bert", 60) | {"max_position_embeddings": 256} | settings))
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> dict[str, tuple[Plan, Path]]:
    """Inputs by the preset's name."""
    decoder = tmp_path_factory.mktemp("decoder")
    (decoder / "config.json").write_text(json.dumps(QWEN3))
    made = {}
    for preset, model in (("mnli", encoder), ("gemma", decoder), ("alpaca", decoder)):
        folder = tmp_path_factory.mktemp(preset)
        made[preset] = plan(preset, model, settings=SMALL | {"training.batch_size": 8}), folder
        made[preset][0].write(folder)
        prepare(folder)
    return made


def widths(inputs: Inputs) -> np.ndarray:
    return np.diff(inputs.offsets)


# ---- the whole -----------------------------------------------------------------------------


@pytest.mark.soak
def test_two_rows_in_turns_from_a_bare_checkout(script, encoder, tmp_path):
    out = tmp_path / "out.json"
    rows, rounds, steps = [BASE, "fastpeft"], 2, 2
    done = script(
        "throughput.py", "--device", "cpu", "--model", encoder, "--rows", ",".join(rows), "--rounds", rounds, "--steps",
        steps, "--json", out, *(f"{key}={value}" for key, value in SMALL.items()), timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report.keys() >= {"device", "versions", "commit", "date", "preset", "model", "data", "batch_size", "rank"}
    assert (report["rounds"], report["steps_a_turn"], report["batch_size"], report["rank"]) == (rounds, steps, 4, 4)
    assert [row["name"] for row in report["rows"]] == rows
    folder = tmp_path / "again"
    folder.mkdir()
    plan("mnli", encoder, num_steps=2 * rounds * steps).write(folder)
    prepare(folder)
    inputs = Inputs.read(folder)
    wanted = widths(inputs)[inputs.steps_SB].sum(1).reshape(2 * rounds, steps).sum(1).tolist()
    for row in report["rows"]:
        assert row["tokens"] == wanted
        assert (row["missing"], row["failed"], row["void"]) == (None, None, None)
        turns = report["turns"][row["name"]]
        assert [turn["steps"] for turn in turns] == [steps] * 2 * rounds
        paces = sorted(turn["tokens"] / turn["seconds"] for turn in turns)
        assert row["tokens_a_s"] == pytest.approx((paces[1] + paces[2]) / 2)
        assert 100 < row["peak_mb"] < 4000  # a Python with torch in it
        assert row["ratio"] > 0
        assert row["name"] in done.stdout
    assert report["rows"][0]["ratio"] == report["rows"][0]["memory_ratio"] == 1


def test_the_peak_is_the_process_s_own():
    """And not that of a larger one which has started it, such as this."""
    code = "import torch; from bench.throughput_worker import peak_mb; cpu = torch.device('cpu'); before = peak_mb(cpu)"
    code += "; held = torch.ones(64 * 2**20); print(peak_mb(cpu) - before)"  # 256 MiB
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=throughput_turns.HERE.parent
    )
    assert float(done.stdout) == pytest.approx(256, abs=40), done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--preset", "qqp"], "--preset"),
        (["--rows", "hf_grouped,hf_fast"], "unknown: hf_fast; there are hf_padded, hf_grouped"),
        (["--rounds", "0"], "--rounds"),
        (["--model", "nowhere"], "--model nowhere: there is no such folder with a config.json in it"),
        (["--model", "/"], "--model /: there is no such folder with a config.json in it"),
        (["--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["--preset", "gemma"], "--preset gemma trains a pretrained model: give its folder as --model"),
        (["--curves", "1"], "--curves"),
        (["--json", "/proc/nowhere/out.json"], "--json"),
        (["training.speed=3"], "training.speed: a run has no such setting"),
        (["training"], "training: a run has no such setting"),
        (["training.batch_size=many"], "training.batch_size=many: expected a number"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_made(monkeypatch, capsys, given, said):
    monkeypatch.setattr(throughput, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as end:
        throughput.main(["--device", "cpu", *given])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_rows_are_chosen_in_their_order_and_levers_means_all_of_them():
    assert throughput.parse(["--rows", "fastpeft,hf_grouped"]).rows == ["hf_grouped", "fastpeft"]
    assert throughput.parse(["--rows", "levers"]).rows == throughput_presets.LEVER_ROWS
    assert throughput.parse([]).rows == [row for row in ROWS if row not in ONLY_BY_NAME]


@pytest.mark.parametrize(
    ("vocab_size", "said"),
    [(600, "--data: 3 training rows are no batch of 4"), (60, "tokens, and its vocabulary has 60")],
)
def test_inputs_that_cannot_be_made_end_with_the_reason(encoder, tmp_path, capfd, vocab_size, said):
    config = json.loads((encoder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}))
    row = {"premise": "a", "hypothesis": "b", "label": "neutral"}
    rows = [json.dumps(row | {"label": label}) for label in ("neutral", "entailment", "contradiction")]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    given = ["--device", "cpu", "--model", str(tmp_path), "--data", str(tmp_path), "training.batch_size=4"]
    with pytest.raises(SystemExit) as end:
        throughput.main(given)
    assert end.value.code == 2
    assert said in capfd.readouterr().err


# ---- inputs and rows -----------------------------------------------------------------------


def test_batches_hold_rows_of_similar_length_once_each():
    lengths = np.random.default_rng(0).integers(5, 100, size=410)
    batches = grouped_batches(lengths, 4)
    assert sorted({len(rows) for rows in batches}) == [4]
    assert len(np.unique(np.concatenate(batches))) == 408
    padded = sum(4 * lengths[rows].max() for rows in batches)
    assert lengths[np.concatenate(batches)].sum() > 0.9 * padded


def test_the_warm_up_begins_with_the_widest_batch_and_steps_have_every_width(prepared):
    _, folder = prepared["mnli"]
    inputs = Inputs.read(folder)
    widest = widths(inputs)[inputs.warmup_WB].max(1)
    assert widest[0] == widths(inputs).max() > widest[1] > widest[2]
    first = widths(inputs)[inputs.steps_SB].max(1)
    assert sorted(first, reverse=True) != first.tolist()


@pytest.mark.parametrize("preset", ["mnli", "gemma"])
@pytest.mark.parametrize("row", ["hf_padded", BASE])
def test_a_peer_is_given_the_rows_as_they_are_counted(prepared, preset, row):
    import transformers

    plan, folder = prepared[preset]
    inputs, run, is_causal = Inputs.read(folder), plan.run(folder), preset == "gemma"
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model.name)
    collate = throughput_rows._Counted(throughput_rows._collator(tokenizer, PEERS[row], run, is_causal))
    rows = inputs.steps_SB[0]
    batch = collate([inputs.feature(int(i), is_causal) for i in rows])
    lengths = widths(inputs)[rows]
    assert collate.num_tokens == [lengths.sum()] == [int(batch["attention_mask"].sum())]
    assert batch["input_ids"].shape == (8, run.dataset.max_length if row == "hf_padded" else lengths.max())
    if is_causal:
        assert ((batch["labels"] != IGNORE).sum(1).numpy() == lengths - inputs.labels[rows]).all()


@pytest.mark.parametrize("preset", ["mnli", "gemma", "alpaca"])
def test_rows_begin_with_the_same_loss_on_the_same_tokens(prepared, preset):
    """The language models' peers take a batch in parts."""
    plan, folder = prepared[preset]
    inputs = Inputs.read(folder)
    wanted = np.cumsum([widths(inputs)[rows].sum() for rows in inputs.batches()])
    losses = {}
    others = ["hf_padded", "fastpeft", *(["trl"] if PEERS["trl"].missing(PRESETS[preset], "cpu") is None else [])]
    for row in (BASE, *others):
        counted = {}

        def pause(steps: int, tokens: int, counted: dict[int, int] = counted) -> bool:
            counted[steps] = tokens
            return steps >= 3

        losses[row] = throughput_rows.train(row, plan, folder, 7, pause, curve=True)
        assert {steps: tokens for steps, tokens in counted.items() if steps} == dict(enumerate(wanted[:3], 1))
    for row in others:
        assert losses[row][0] == pytest.approx(losses[BASE][0], rel=1e-4)


def test_what_a_device_lacks_is_said(monkeypatch):
    mnli, gsm8k = PRESETS["mnli"], PRESETS["gsm8k"]
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "C++ compiler" in str(PEERS["hf_compiled"].missing(mnli, "cpu"))
    assert PEERS["hf_compiled"].missing(mnli, "cuda") is None
    assert PEERS["trl_packed"].missing(mnli, "cpu") == "trl trains language models only"
    assert PEERS["liger"].missing(gsm8k, "cpu") == "liger_kernel computes on a GPU only"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert PEERS["unsloth"].missing(gsm8k, "cuda") == "unsloth is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert PEERS["trl_packed"].missing(gsm8k, "cpu") is None


# ---- levers --------------------------------------------------------------------------------


def test_one_row_lacks_captured_steps_alone(prepared):
    plan, folder = prepared["mnli"]
    assert [name for name, is_on in levers_of("fastpeft_launched").items() if not is_on] == ["graphs"]
    for row, setting in (("fastpeft", "auto"), ("fastpeft_launched", "off"), ("fastpeft_graphs", "auto")):
        assert plan.run(folder, 0, levers_of(row)).training.cuda_graphs == setting


def test_a_lever_is_alone_in_its_row_and_on_while_it_trains(prepared, monkeypatch):
    plan, folder = prepared["mnli"]
    states: list[bool] = []

    @contextmanager
    def switch(is_on: bool):
        states.append(is_on)
        yield
        states.pop()

    for name in list(LEVERS):
        monkeypatch.delitem(LEVERS, name)
    monkeypatch.setitem(LEVERS, "quick", Lever(switch=switch))
    monkeypatch.setitem(LEVERS, "short", Lever(off={"training.micro_batch_tokens": 77}))
    assert levers_of("fastpeft_quick")["quick"]
    assert not levers_of("fastpeft_quick")["short"]
    assert not any(levers_of("fastpeft_plain").values())
    assert all(levers_of("fastpeft").values())
    for row, tokens in (("fastpeft_quick", 77), ("fastpeft_short", "auto"), ("fastpeft_plain", 77)):
        assert plan.run(folder, 0, levers_of(row)).training.micro_batch_tokens == tokens
        seen = []

        def pause(steps: int, tokens: int, seen: list = seen) -> bool:
            seen.append(states[-1])
            return steps >= 1

        throughput_rows.train(row, plan, folder, 0, pause)
        assert set(seen) == {row == "fastpeft_quick"}
        assert states == []


def test_the_prefix_row_is_timed_after_its_first_epoch(prepared, monkeypatch):
    plan, folder = prepared["mnli"]
    plan = replace(plan, settings={"adapter.target_modules": r".*layer\.1\..*(query|value)"})
    taken = []
    take = FrozenPrefix.take
    monkeypatch.setattr(FrozenPrefix, "take", lambda *args: taken.append(None) or take(*args))
    before = []

    def pause(steps: int, tokens: int) -> bool:
        before.append(len(taken))
        return steps >= 2

    losses = throughput_rows.train(PREFIX, plan, folder, 0, pause)
    assert len(losses) == 2
    assert before[0] > 1
    assert set(before) == {before[0]}, "a layer below the first adapter ran in a timed step"


def test_a_setting_becomes_what_its_key_holds(prepared):
    plan, folder = prepared["mnli"]
    run = with_settings(plan.run(folder), {"training.learning_rate": "3e-4", "training.threads": "2"})
    assert (run.training.learning_rate, run.training.threads) == (3e-4, 2)
    with pytest.raises(ValueError, match="nothing"):
        with_settings(run, {"nothing.at_all": 1})


# ---- workers -------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_worker_that_dies_says_how(prepared):
    plan, folder = prepared["mnli"]
    with throughput_turns.Worker(folder, "no_such_row", plan) as worker:
        with pytest.raises(RowFailed, match="KeyError: 'no_such_row'"):
            worker.ready()
        with pytest.raises(RowFailed):
            worker.turn(1)


@pytest.mark.parametrize(("number", "said"), [(9, "where the memory is short"), (15, "ended by SIGTERM")])
def test_a_worker_that_is_ended_says_by_what(prepared, number, said):
    plan, folder = prepared["mnli"]
    with throughput_turns.Worker(folder, BASE, plan) as worker:
        worker._process.send_signal(number)
        with pytest.raises(RowFailed, match=said):
            worker.ready()
