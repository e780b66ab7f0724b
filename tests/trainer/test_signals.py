"""Real SIGINT and SIGTERM to a real process, in each phase of a run."""

from __future__ import annotations

import re
import shlex
import signal
import time
from pathlib import Path

import pytest

from fastpeft.runs.store import RunFolder
from fastpeft.trainer.checkpoint_files import Checkpoint, newest_checkpoint
from tests.support.tiny_runs import Child, has_event, steps_logged, strict_events, write_run

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
MANY_ROWS = 4000
"""Validation rows that take seconds, one at a time."""


def start(files: Path, *settings: str, **data: int) -> Child:
    path = write_run(files, **data)
    places = ["--name", "r", "--results-dir", str(files)]
    return Child(files / "0.log", "train", "--run", str(path), *places, *settings)


def stop(child: Child, number: signal.Signals, files: Path) -> Checkpoint:
    """Send the signal and check how the process ends. Returns the checkpoint that it leaves."""
    sent_at = time.monotonic()
    child.process.send_signal(number)
    assert child.end(30) == EXIT_CODES[number], child.output()
    assert time.monotonic() - sent_at < 20
    output = child.output()
    assert f"{number.name}: finishing this step and saving a checkpoint" in output
    assert re.search(r"status +stopped", output)
    assert f"resume with  fastpeft train --resume --name r --results-dir {files}" in output
    assert "Traceback" not in output
    checkpoint, skipped = newest_checkpoint(files / "r" / "checkpoints")
    assert checkpoint is not None
    assert skipped == []
    result = RunFolder(files / "r").read_result()
    assert result is not None
    assert (result.status, result.steps) == ("stopped", checkpoint.step)
    end = strict_events(files / "r")[-1]
    assert (end["type"], end["status"]) == ("end", "stopped")
    return checkpoint


@pytest.mark.soak
def test_sigint_in_calibration(tmp_path: Path) -> None:
    settings = ["regulariser.warmup_steps=100000", "budget=1000000steps"]  # the cap is at 20,000 batches
    with start(tmp_path, *settings) as child:
        child.wait_until(lambda: has_event(tmp_path / "r", lambda e: e["type"] == "run"))
        time.sleep(0.3)
        checkpoint = stop(child, signal.SIGINT, tmp_path)
    assert checkpoint.step == 0
    assert checkpoint.parts["clock"]["tokens"] > 0
    assert not has_event(tmp_path / "r", lambda e: e["type"] in ("importance", "step"))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_in_training(number: signal.Signals, tmp_path: Path) -> None:
    settings = ["budget=240steps", "training.checkpoint_steps=1000", "evaluation.every=end"]
    with start(tmp_path, *settings) as child:
        child.wait_until(lambda: has_event(tmp_path / "r", lambda e: e["type"] == "step" and e["step"] > 5))
        checkpoint = stop(child, number, tmp_path)
    steps = checkpoint.step
    assert 6 < steps < 240
    assert steps_logged(tmp_path / "r") == list(range(steps))
    if number == signal.SIGTERM:
        resume_as_printed(child, steps, tmp_path)


def resume_as_printed(child: Child, steps: int, files: Path) -> None:
    command = re.search(r"resume with +fastpeft (.+)", child.output())
    assert command is not None
    with Child(files / "1.log", *shlex.split(command[1])) as resumed:
        assert resumed.end() == 0, resumed.output()
    assert f"after step {steps}" in resumed.output()
    assert steps_logged(files / "r") == list(range(240))
    result = RunFolder(files / "r").read_result()
    assert result is not None
    assert (result.status, result.steps) == ("done", 240)


@pytest.mark.soak
def test_sigterm_in_evaluation(tmp_path: Path) -> None:
    settings = ["training.checkpoint_steps=4", "evaluation.every=5steps", "evaluation.batch_tokens=1"]
    with start(tmp_path, *settings, num_dev=MANY_ROWS) as child:
        # The checkpoint of step 4, the fifth step, and then an evaluation of several seconds.
        child.wait_until(lambda: has_event(tmp_path / "r", lambda e: e["type"] == "step" and e["step"] == 4))
        time.sleep(0.3)
        checkpoint = stop(child, signal.SIGTERM, tmp_path)
    assert checkpoint.step == 5
    assert not has_event(tmp_path / "r", lambda e: e["type"] == "eval")


@pytest.mark.soak
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """One step here is a pass over thousands of rows: the second signal comes before it ends."""
    settings = ["method=lora", "training.batch_size=20000", "training.micro_batch_tokens=512", "budget=1000steps"]
    with start(tmp_path, *settings, num_train=20000) as child:
        child.wait_until(lambda: has_event(tmp_path / "r", lambda e: e["type"] == "run"))
        time.sleep(0.3)
        child.process.send_signal(signal.SIGINT)
        child.wait_until(lambda: "SIGINT: finishing this step" in child.output())
        sent_at = time.monotonic()
        child.process.send_signal(signal.SIGTERM)
        assert child.end(10) == EXIT_CODES[signal.SIGTERM]
        assert time.monotonic() - sent_at < 2
    assert "resume with" not in child.output()
    assert not has_event(tmp_path / "r", lambda e: e["type"] in ("step", "end"))


def test_before_training_begins_no_folder_is_made(tmp_path: Path) -> None:
    with start(tmp_path) as child:
        child.wait_until(lambda: "loading torch" in child.output())
        child.process.send_signal(signal.SIGINT)
        assert child.end() == 130
    assert "Traceback" not in child.output()
    assert not (tmp_path / "r").exists()
