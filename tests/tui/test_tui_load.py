"""The bench of the terminal UI runs, and on a machine of its own its goals are met."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, *args: str, timeout: float) -> tuple[subprocess.CompletedProcess, dict]:
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "bench" / "tui_load.py"), "--json", str(out), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert out.is_file(), done.stderr
    return done, json.loads(out.read_text())


def test_a_small_load_is_measured(tmp_path):
    done, found = run(tmp_path, "--events", "5000", "--runs", "3", "--seconds", "1", "--rounds", "1", timeout=120)
    assert done.returncode == 0, done.stderr
    assert found["open"]["events"] == 5000
    assert found["open"]["read_twice_bytes"] == 0
    assert found["list"]["runs"] == 3
    assert found["day"]["rows"] > 0
    assert found["day"]["more_files"] == 0
    assert "redraw.160x48.plain_ms" in done.stdout


@pytest.mark.soak
def test_the_goals_are_met_and_a_day_leaks_nothing(tmp_path):
    done, found = run(tmp_path, "--check", timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert found["day"]["hours"] > 20
    assert found["day"]["resumes_seen"] == 1
