"""Turns of throughput's workers: what is timed, what ratios are of, what fails or learns otherwise and is said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from bench import throughput, throughput_turns
from bench.throughput_curves import CURVE_STEPS, apart
from bench.throughput_presets import BASE, Plan
from bench.throughput_turns import RowFailed, Timed
from bench.throughput_worker import Turns

CPU = torch.device("cpu")
PLAN = Plan(preset="mnli", model=None, data=None, device="cpu", threads=1, warmup_steps=3, num_steps=8)


def answers(turns: Turns, pauses: list[tuple[int, int]]) -> tuple[list[bool], list[dict]]:
    stops = [turns(*pause) for pause in pauses]
    return stops, [json.loads(line) for line in turns._answers.getvalue().splitlines()]


def test_a_turn_is_of_the_steps_between_two_waits():
    orders = io.StringIO('{"steps": 2}\n{"steps": 1}\n{"stop": true}\n')
    turns = Turns(orders, io.StringIO(), CPU, warmup_steps=1, trims=False)
    stops, told = answers(turns, [(0, 0), (1, 10), (2, 30), (3, 60), (3, 60), (4, 100), (5, 150)])
    assert stops == [False] * 5 + [True, True]
    assert told[0]["ready"]
    assert [(turn["steps"], turn["tokens"]) for turn in told[1:]] == [(2, 50), (1, 40)]
    assert all(turn["seconds"] > 0 and turn["cpu_s"] > 0 and turn["peak_mb"] > 0 for turn in told[1:])


def test_the_step_after_a_trim_is_not_timed(monkeypatch):
    trims = []
    monkeypatch.setattr("bench.throughput_worker.trim", lambda: trims.append(len(trims)))
    orders = io.StringIO('{"steps": 1}\n')  # and then its parent is gone
    turns = Turns(orders, io.StringIO(), CPU, warmup_steps=0, trims=True)
    stops, told = answers(turns, [(0, 0), (1, 10), (2, 30)])
    assert stops == [False, False, True]
    assert [(turn["steps"], turn["tokens"]) for turn in told[1:]] == [(1, 20)]
    assert len(trims) == 2


class FakeWorker:
    """Answers at once; a row may fail, or hold other tokens."""

    pace: ClassVar = {BASE: 2.0, "fastpeft": 1.0, "hf_padded": 4.0}
    fails_at: ClassVar[dict[str, int]] = {}
    tokens: ClassVar[dict[str, int]] = {}

    def __init__(self, folder: Path, row: str, plan: Plan) -> None:
        self.row, self.turns = row, 0

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None: ...

    def ready(self) -> dict:
        return self._answer()

    def turn(self, steps: int) -> dict:
        self.turns += 1
        return self._answer()

    def _answer(self) -> dict:
        if self.turns >= self.fails_at.get(self.row, 99):
            raise RowFailed("ended by signal 9")
        tokens = self.tokens.get(self.row, 100 + self.turns)
        seconds = self.pace[self.row] * (100 + self.turns)
        return {
            "seconds": seconds,
            "cpu_s": seconds**2,
            "steps": 2,
            "tokens": tokens,
            "peak_mb": 50 * self.pace[self.row],
        }


def timed(monkeypatch, rounds: int = 6, **fake) -> dict[str, dict]:
    monkeypatch.setattr(throughput_turns, "Worker", type("Worker", (FakeWorker,), fake))
    with Timed(Path(), PLAN, 2, ["hf_padded", BASE, "fastpeft"]) as found:
        found.set_up()
        found.take_turns(rounds, lambda: False)
        return {row["name"]: row for row in found.report({"liger": "not here"})["rows"]}


def test_ratios_are_of_speed_and_paired_by_round(monkeypatch):
    rows = timed(monkeypatch)
    assert [*rows] == ["hf_padded", BASE, "liger", "fastpeft"]
    assert rows["fastpeft"]["ratio"] == rows["fastpeft"]["ratio_low"] == rows["fastpeft"]["ratio_high"] == 2.0
    assert rows["hf_padded"]["ratio"] == 0.5
    assert rows["fastpeft"]["cpu_ratio"] == pytest.approx(4.0)
    assert (rows["fastpeft"]["tokens_a_s"], rows["fastpeft"]["memory_ratio"]) == (1.0, 0.5)
    assert rows["liger"]["missing"] == "not here"
    assert rows["liger"]["tokens_a_s"] is rows["fastpeft"]["joules_a_ktoken"] is None


@pytest.mark.parametrize("turns", [0, 3])
def test_a_row_that_fails_leaves_the_others_their_figures(monkeypatch, capsys, turns):
    rows = timed(monkeypatch, fails_at={"hf_padded": turns})
    assert rows["hf_padded"]["failed"] == "ended by signal 9"
    assert (rows["hf_padded"]["ratio"] is None) == (turns == 0)
    assert rows["fastpeft"]["ratio"] == 2.0
    assert len(rows["fastpeft"]["tokens"]) == 12
    assert "hf_padded: ended by signal 9" in capsys.readouterr().err


def test_a_row_of_other_tokens_is_void(monkeypatch):
    rows = timed(monkeypatch, tokens={"fastpeft": 90})
    assert rows["fastpeft"]["void"] == f"its turns held other tokens than {BASE}'s, such as 90 for 101"
    assert rows["hf_padded"]["void"] is None


def test_joules_are_counted_where_there_is_a_meter(monkeypatch):
    class Meter:
        works, method, joules = True, "fake", 5.0

        def start(self) -> None: ...

        def stop(self) -> None: ...

    monkeypatch.setattr(throughput_turns.EnergyMeter, "open", lambda uuid: Meter())
    rows = timed(monkeypatch, rounds=1)
    assert rows["fastpeft"]["joules_a_ktoken"] == pytest.approx(1e3 * 10 / (101 + 102))


# ---- curves --------------------------------------------------------------------------------


def curves(random: np.random.Generator, offset: float = 0.0, seeds: int = 3) -> np.ndarray:
    """Falling losses, each with a level of its own and noise a step."""
    falling = 1.1 - 0.3 * np.arange(CURVE_STEPS) / CURVE_STEPS
    level = 0.01 * random.standard_normal((seeds, 1))
    return falling + offset + level + 0.05 * random.standard_normal((seeds, CURVE_STEPS))


def test_equal_rows_are_seldom_apart_and_others_are():
    random = np.random.default_rng(3)
    assert sum(apart(curves(random), curves(random)).is_apart for _ in range(200)) <= 6
    assert sum(apart(curves(random, offset=0.2), curves(random)).is_apart for _ in range(50)) >= 48


def test_a_row_whose_loss_is_no_number_is_apart():
    own, base = (curves(np.random.default_rng(i)) for i in range(2))
    own[1, 37] = np.nan
    far = apart(own, base)
    assert far.is_apart
    assert far.at_step == 30


def test_a_row_that_learns_otherwise_is_void(monkeypatch):
    random = np.random.default_rng(0)
    offsets = {BASE: 0.0, "fastpeft": 0.3, "hf_padded": 0.0}

    def curve(folder: Path, row: str, plan: Plan, seed: int) -> list[float]:
        if row == "hf_padded":
            raise RowFailed("ended by signal 9")
        return curves(random, offsets[row], seeds=1)[0].tolist()

    monkeypatch.setattr(throughput.Worker, "curve", curve)
    rows = [{"name": name, "tokens_a_s": 1.0, "failed": None, "void": None} for name in offsets]
    rows.append({"name": "liger", "tokens_a_s": None, "failed": None, "void": None})
    report = throughput.add_curves(rows, Path(), PLAN, [1, 2, 3])
    by_name = {row["name"]: row for row in rows}
    assert by_name["fastpeft"]["void"].startswith("its loss is off by +0.")
    assert by_name[BASE]["void"] is None
    assert by_name["hf_padded"]["failed"] == "while its curve was taken: ended by signal 9"
    assert report["curves"].keys() == {BASE, "fastpeft"}
    assert len(report["curves"]["fastpeft"]) == 3
