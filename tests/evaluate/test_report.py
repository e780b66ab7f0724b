"""`fastpeft evaluate` on real runs: files, figures, refusals."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys

import pytest
from trainer.tiny_runs import write_run

from fastpeft.config import load_run
from fastpeft.errors import UserError
from fastpeft.evaluate.figures import smooth
from fastpeft.evaluate.report import report
from fastpeft.trainer.seeds import train_seeds


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
    command = [sys.executable, "-m", "fastpeft", "evaluate", "--results-dir", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "minus lora" in done.stdout
    assert str(results / "comparison") in done.stdout
    done = subprocess.run([*command, "nothing"], capture_output=True, text=True, env=environment)
    assert (done.returncode, "no such run" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def test_smoothing_has_no_bias_at_its_start_and_passes_over_what_is_not_finite(seed):
    rng = random.Random(seed)
    assert smooth([3.0] * 40) == pytest.approx([3.0] * 40)
    values = [rng.random() for _ in range(50)]
    broken = [*values[:20], math.nan, math.inf, *values[20:]]
    kept = smooth(broken)
    assert kept[:20] + kept[22:] == pytest.approx(smooth(values))
