"""`fastpeft evaluate` on real runs: files, figures, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys

import pytest
from rich.console import Console

from fastpeft.cli.console import comparison_table
from fastpeft.compare.figures import smooth
from fastpeft.compare.report import report
from fastpeft.config import load_run
from fastpeft.errors import UserError
from fastpeft.runs.curves import Budgets, auc_of, evaluations
from fastpeft.runs.events import read_events
from fastpeft.runs.store import Result, RunFolder, write_json
from fastpeft.trainer.seeds import train_seeds
from tests.support.tiny_runs import write_run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two seeds of LoRA and of IW-LoRA, and a folder that is no run."""
    home = tmp_path_factory.mktemp("evaluate")
    file = write_run(home)
    for method in ("lora", "iw_lora"):
        run = load_run(file, {"method": method, "budget": "16steps", "evaluation.every": "4steps"})
        train_seeds(run, [0, 1], results_dir=home / "results", name=method)
    (home / "results" / "notes").mkdir()
    return home / "results"


def test_files_and_figures(results):
    comparison = report([], results)
    assert [(row.label, row.metric.count) for row in comparison.rows] == [("iw_lora", 2), ("lora", 2)]
    for name in ("lora-seed0", "lora-seed1", "iw_lora-seed0", "iw_lora-seed1"):
        metrics = json.loads((results / name / "metrics.json").read_text())
        events = [json.loads(line) for line in (results / name / "events.jsonl").open()]
        scores = [event["value"] for event in events if event["type"] == "eval"]
        assert [entry["value"] for entry in metrics["evaluations"]] == scores
        assert metrics["metric"]["value"] == scores[-1]
        assert metrics["steps_logged"] == 8
        losses = [event["loss"] for event in events if event["type"] == "step"]
        assert metrics["last_loss"] == pytest.approx(sum(losses) / len(losses))
        assert (results / name / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((results / "comparison" / "comparison.json").read_text())
    assert saved["rows"][0]["metric"]["value"] == comparison.rows[0].metric.value
    assert (results / "comparison" / "metric.png").read_bytes().startswith(b"\x89PNG")


def test_a_group_and_a_run_by_name(results):
    assert [row.runs for row in report(["lora"], results).rows] == [["lora-seed0", "lora-seed1"]]
    assert [row.runs for row in report(["iw_lora-seed1"], results).rows] == [["iw_lora-seed1"]]


def test_refusals(results, tmp_path):
    with pytest.raises(UserError, match=r"lorra: there is no such run .*; there are: iw_lora, iw_lora-seed0"):
        report(["lora", "lorra"], results)
    with pytest.raises(UserError, match="nothing has been evaluated yet"):
        report([], tmp_path)


def test_the_command(results, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fastpeft", "evaluate", "--results-dir", str(results), "--target", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "minus lora (best)" in done.stdout
    assert "to 0.01" in done.stdout
    assert str(results / "comparison") in done.stdout
    done = subprocess.run([*command, "nothing"], capture_output=True, text=True, env=environment)
    assert (done.returncode, "no such run" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def made_run(results_dir, name, values, metered=True, **fields):
    """A run of 100 s with an evaluation every 20 s, and its test."""
    folder = RunFolder(results_dir / name)
    folder.path.mkdir(parents=True)
    folder.config.write_text("method: lora\n")
    events = [{"type": "step", "elapsed_s": float(i), "step": i, "loss": 1.0, "lr": 0.1} for i in range(90)]
    for i, value in enumerate(values, start=1):
        common = {"type": "eval", "time_s": 0.0, "elapsed_s": 20.0 * i, "step": 20 * i, "energy_j": 900.0 * i}
        events.append(common | {"split": "validation", "metric": "exact_match", "value": value, "loss": 0.9, "num": 5})
    events.append(events[-1] | {"split": "test", "value": 0.99, "elapsed_s": 95.0})
    if not metered:
        events = [event | {"energy_j": None} for event in events]
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    result = Result(
        run_id="r", name=name, status="done", method="lora", dataset="gsm8k", elapsed_s=95.0,
        budget={"kind": "seconds", "limit": 100.0, "spent": 95.0}, energy_j=4000.0 if metered else None,
        metric={"name": "exact_match", "value": values[-1]}, best={"value": max(values), "step": 20},
        test={"name": "exact_match", "value": 0.99, "num": 7, "weights": "best", "step": 20}, **fields,
    )  # fmt: skip
    write_json(folder.result, dataclasses.asdict(result))
    return folder


def test_areas_the_target_and_the_test_are_reported(tmp_path):
    folder = made_run(tmp_path, "a", [0.2, 0.4, 0.6, 0.5])
    made_run(tmp_path, "b", [0.1, 0.2, 0.3, 0.4], seed=1)
    comparison = report([], tmp_path, target=0.6)
    (row,) = comparison.rows
    saved = json.loads((folder.path / "metrics.json").read_text())
    assert saved["auc"]["seconds"] == pytest.approx((0.3 + 0.5 + 0.55 + 0.5) * 20 / 100)
    assert saved["auc"]["joules"] == pytest.approx(((0.3 + 0.5 + 0.55) * 900 + 0.5 * 400) / 4000)
    assert saved["target"] == {"value": 0.6, "seconds": 60.0, "joules": 2700.0}
    budgets = Budgets.of(saved["budget"], saved["elapsed_s"], saved["energy_j"])
    assert saved["auc"] == auc_of(evaluations(read_events(folder.events)), budgets), "as result.json's"
    assert [entry["value"] for entry in saved["evaluations"]] == [0.2, 0.4, 0.6, 0.5], "the test is no part of it"
    assert [(entry["split"], entry["value"]) for entry in saved["other_splits"]] == [("test", 0.99)]
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["target"]["seconds"] is None
    assert (str(row.target), row.auc["seconds"].count, comparison.by) == ("1 of 2 runs", 2, "test")
    for picture in ("comparison/metric.png", "comparison/joules.png", "a/figures/curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    text = printed(comparison)
    for fact in ("AUC over J", "to 0.6", "1 of 2 runs", "0.9900", "minus lora (test)"):
        assert fact in text, fact


def test_without_a_meter_nothing_is_drawn_or_said_over_joules(tmp_path):
    made_run(tmp_path, "a", [0.2, 0.4], metered=False)
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "joules.png").write_bytes(b"of earlier runs")
    comparison = report([], tmp_path)
    assert not (tmp_path / "comparison" / "joules.png").exists()
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["target"] is None
    assert "AUC" in printed(comparison)
    assert "AUC over J" not in printed(comparison)


@pytest.mark.parametrize("target", [0.0, 60.0, -1.0, math.nan])
def test_a_target_is_a_share(tmp_path, target):
    with pytest.raises(UserError, match=r"write 0.6 for 60 %"):
        report([], tmp_path, target)


def printed(comparison):
    console = Console(width=250)
    with console.capture() as capture:
        console.print(comparison_table(comparison))
    return capture.get()


def test_smoothing_has_no_bias_at_its_start_and_passes_over_what_is_not_finite(seed):
    rng = random.Random(seed)
    assert smooth([3.0] * 40) == pytest.approx([3.0] * 40)
    values = [rng.random() for _ in range(50)]
    broken = [*values[:20], math.nan, math.inf, *values[20:]]
    kept = smooth(broken)
    assert kept[:20] + kept[22:] == pytest.approx(smooth(values))
