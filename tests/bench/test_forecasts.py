"""Forecasts of a last loss: right where the curve is what they assume, and said to be wrong where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import forecasts
from fastpeft.runs.store import RunFolder

STEPS = 1024


def run_of(folder: Path, losses: np.ndarray, every: int = 32) -> Path:
    folder.mkdir()
    lines = []
    for step, loss in enumerate(losses.tolist(), 1):
        lines.append({"type": "step", "elapsed_s": step, "step": step, "loss": loss, "lr": 1e-3})
        if step % every == 0:
            evaluation = {"type": "eval", "elapsed_s": step, "step": step, "split": "validation", "value": 0.5}
            lines.append(evaluation | {"loss": loss})
    RunFolder(folder).events.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return folder


def curve(floor: float) -> np.ndarray:
    return floor + 2.0 * np.arange(1.0, STEPS + 1) ** -0.5


def test_a_law_of_its_own_form_is_forecast(tmp_path):
    for floor, form in ((0.0, "no floor"), (0.5, "floor")):
        found = forecasts.errors(forecasts.curves_of(run_of(tmp_path / form, curve(floor))), 0.5)
        for points in forecasts.POINTS:
            assert found[points, form] < min(0.07, found[points, "last"])  # a block's mean is no loss of its middle
    assert found["validation", "no floor"] > 0.05, "a floor that the law does not know"


def test_a_plateau_stays_where_it_is(tmp_path):
    rng = np.random.default_rng(0)
    flat = 0.7 + 0.01 * rng.standard_normal(STEPS)
    found = forecasts.errors(forecasts.curves_of(run_of(tmp_path / "flat", flat)), 0.5)
    for points in forecasts.POINTS:
        assert found[points, "plateau"] == found[points, "last"] < 0.05


def test_the_table_holds_every_way_and_its_figures(tmp_path, capsys):
    runs = [str(run_of(tmp_path / f"r{i}", curve(0.1 * i))) for i in range(2)]
    forecasts.main([*runs, "--at", "0.5", "--json", str(tmp_path / "out.json")])
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["runs"] == ["r0", "r1"]
    assert len(said["rows"]) == len(forecasts.POINTS) * len(forecasts.FORMS)
    assert all(len(row["errors"]) == 1 and len(row["errors"][0]) == 2 for row in said["rows"])
    assert "after 50%" in capsys.readouterr().out


def test_what_cannot_be_forecast_is_named(tmp_path, capsys):
    short = run_of(tmp_path / "short", curve(0.0)[:100])
    for path, words in ((short, "evaluation.every=5%"), (tmp_path / "none", "no run is there")):
        with pytest.raises(SystemExit) as end:
            forecasts.main([str(path)])
        assert end.value.code == 2
        assert words in capsys.readouterr().err
