"""Whole runs under each schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastpeft.config.schedules import SCHEDULES
from fastpeft.trainer import train
from fastpeft.trainer.loop import Loop
from fastpeft.trainer.probes.hooks import Probes
from fastpeft.tui.parse import parse
from tests.support.probe_runs import StopAfter, pairs_run
from tests.support.tiny_runs import assert_same_outcome, assert_same_weights, strict_events, weights

OPTIONS: dict[str, dict[str, Any]] = {
    "fot": {"window": 1, "calibrate": True, "floor": True},  # a forecast from the tenth step on
    "fot, aligned": {"window": 1, "alignment": True, "confidence": 0.5, "anneal": 0.5},
    "graff": {"trace_decay": 0.5, "warm_start": "shipped"},
    "reactor": {"window": 4},
}
STEPS = 40
TELL = {"fot", "graff", "reactor"}
"""Those that say something of themselves."""


NAMES = sorted({*SCHEDULES.names, *OPTIONS})
QUICK = "fot, aligned", "graff"
"""These measure while they train; the rest are for the soak, and tests/schedules holds every one's state exact."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.soak) for n in NAMES])
def test_a_resume_goes_on_to_the_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of a window, of a forecast, of a recurrence. Each step takes a second on the clock, which
    two of them read."""
    begin = Probes.begin
    monkeypatch.setattr(Probes, "begin", lambda self, step, progress, _: begin(self, step, progress, float(step)))
    kind = name.partition(",")[0]
    schedule = {"name": kind, "warmup_steps": 2} | ({kind: OPTIONS[name]} if name in OPTIONS else {})
    run = pairs_run(tmp_path, budget=f"{STEPS}steps", evaluation={"every": "end"}, schedule=schedule)
    unbroken = train(run, results_dir=tmp_path, name="unbroken")
    stop = StopAfter(22)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stop.counting(Loop._step))
        assert train(run, results_dir=tmp_path, name="r", stop=stop).status == "stopped"
    result = train(None, results_dir=tmp_path, name="r", resume=True)
    assert_same_outcome(result, unbroken)
    assert_same_weights(weights(tmp_path / "r"), weights(tmp_path / "unbroken"))
    events = [strict_events(tmp_path / folder) for folder in ("r", "unbroken")]
    for type, keys in {"step": ["lr", "loss"], "forecast": ["value", "horizon"], "schedule": ["rate", "eta"]}.items():
        told = [[[e.get(key) for key in keys] for e in of if e["type"] == type] for of in events]
        assert told[0] == told[1], type
    assert len([e for e in events[0] if e["type"] == "step"]) == STEPS
    log = parse((tmp_path / "r" / "events.jsonl").read_bytes())
    assert log.malformed == 0
    assert any(key.startswith("schedule/") for key in log.values) == (kind in TELL)
    if kind == "fot":
        assert len([e for e in events[0] if e["type"] == "forecast"]) >= STEPS - 12
