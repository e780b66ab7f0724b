"""Events as rows: one order whatever was redone, and nothing of an event lost."""

from __future__ import annotations

import math

from fastpeft.trackers.scalars import Rows


def event(kind: str, step: int, **fields) -> dict:
    return {"type": kind, "time_s": 7.0, "elapsed_s": 1.5, "step": step} | fields


STEP = event("step", 9, loss=0.5, grad_norm="inf", penalty="nan", energy_j=None, tokens=32)
EVAL = event("eval", 10, split="validation", metric="f1", value=0.75, loss=0.4, num=64, metrics={"accuracy": 0.5})
IMPORTANCE = event("importance", 10, names=["a.q", "a.v"], weights=[0.25, 0.75], layer=[0, 0])


def test_what_belongs_to_one_step_follows_in_order_and_shares_its_number():
    rows = [Rows().of(e) for e in (STEP, EVAL, IMPORTANCE, event("step", 10, loss=0.4))]
    assert [row.step for row in rows] == [10, 10, 10, 11]
    orders = [row.order for row in rows]
    assert orders == sorted(set(orders))
    assert [Rows().of(e).order for e in (STEP, EVAL, IMPORTANCE)] == orders[:3]  # whatever came before


def test_calibration_comes_before_the_first_step():
    assert Rows().of(IMPORTANCE | {"step": 0}).order < Rows().of(event("step", 0, loss=1.0)).order


def test_every_number_of_an_event_is_kept():
    values = Rows().of(STEP).values
    assert math.isnan(values.pop("train/penalty"))
    assert values == {
        "step": 10, "elapsed_s": 1.5, "train/loss": 0.5, "train/grad_norm": math.inf, "train/tokens": 32,
    }  # fmt: skip
    assert Rows().of(EVAL).values == {
        "step": 10, "elapsed_s": 1.5, "eval/f1": 0.75, "eval/loss": 0.4, "eval/num": 64, "eval/metrics/accuracy": 0.5,
    }  # fmt: skip
    assert Rows().of(IMPORTANCE).values == {
        "step": 10, "elapsed_s": 1.5, "importance/a.q": 0.25, "importance/a.v": 0.75,
    }  # fmt: skip


def test_system_figures_go_with_the_next_step():
    rows = Rows()
    assert rows.of(event("system", 30, util=50.0, power_w=None)) is None
    assert rows.of(event("system", 31, util=60.0, power_w=None)) is None
    values = rows.of(STEP).values
    assert (values["system/util"], "system/power_w" in values) == (60.0, False)
    assert "system/util" not in rows.of(STEP).values


def test_other_events_have_no_row():
    for kind in ("run", "checkpoint", "warning", "end", "of_tomorrow"):
        assert Rows().of(event(kind, 1, message="x", loss=1.0)) is None
