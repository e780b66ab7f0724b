"""A killed process goes on to the very bits of a run that was never killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from fastpeft.runs.store import RunFolder
from fastpeft.trainer import train
from fastpeft.trainer.checkpoint_files import newest_checkpoint
from tests.support.tiny_runs import (
    STEPS_PER_EPOCH,
    Child,
    assert_same_outcome,
    assert_same_weights,
    steps_logged,
    strict_events,
    tiny_run,
    weights,
    write_run,
)

CHECKPOINT_STEPS = 3


def newest_step(folder: Path) -> int:
    """Of the checkpoints that are whole."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def kill(child: Child, folder: Path, target: int, in_a_save: bool, rng: random.Random) -> None:
    """SIGKILL after the checkpoint of step `target`: while the next one is written, or a step or so later."""
    child.wait_until(lambda: newest_step(folder) >= target)
    if in_a_save:
        child.wait_until(lambda: any((folder / "checkpoints").glob(".writing-*")))
    else:
        time.sleep(rng.uniform(0, 0.03))
    child.process.kill()
    assert child.end() == -signal.SIGKILL, f"it was not alive any more:\n{child.output()}"


LIFTED = {"unihyperlora": {"max_extra_flops": 100.0}, "sat_lora": {"max_extra_flops": 100.0}}
"""The tiny model is narrower than a dictionary of atoms."""


def kill_and_resume(
    files: Path, num_steps: int, saves: list[bool], rng: random.Random, method: str = "iw_lora", **names: str
) -> None:
    """Kill a run of `num_steps` once for each of `saves`, in a save or not, and compare with an unbroken one.

    `names`: of the run's sections, such as optimizer.
    """
    path, seed = write_run(files), rng.randrange(1000)
    settings = [f"budget={num_steps}steps", "evaluation.every=20%", f"training.seed={seed}"]
    settings += [f"{section}.name={name}" for section, name in names.items()] + [f"method={method}"]
    settings += [f"{section}.{key}={value}" for section, own in LIFTED.items() for key, value in own.items()]
    folder = files / "killed"
    places = ["--name", "killed", "--results-dir", str(files)]
    start = ["train", "--run", str(path), *places, *settings]
    resume = ["train", "--resume", *places]
    # One kill a part, and two parts without: a late kill could meet a finished run.
    part = num_steps // (len(saves) + 2)
    left_over = []
    for i, in_a_save in enumerate(saves):
        target = i * part + rng.randrange(1, part - 2 * CHECKPOINT_STEPS)
        with Child(files / f"{i}.log", *(resume if i else start)) as child:
            kill(child, folder, target, in_a_save, rng)
        checkpoint, skipped = newest_checkpoint(folder / "checkpoints")
        assert checkpoint is not None
        assert skipped == []
        assert checkpoint.step >= target
        left_over.append(any((folder / "checkpoints").glob(".writing-*")))
    assert any(left_over) or not any(saves), "no kill hit a save"
    with Child(files / "last.log", *resume) as child:
        assert child.end(600) == 0, child.output()
        assert "resuming" in child.output()

    sections = {section: {"name": name} for section, name in names.items()}
    sections |= {"evaluation": {"every": "20%"}, "training": {"seed": seed}, **LIFTED}
    run = tiny_run(files, method=method, budget=f"{num_steps}steps", **sections)
    unbroken = train(run, results_dir=files, name="unbroken")
    result = RunFolder(folder).read_result()
    assert result is not None
    assert_same_outcome(result, unbroken)
    for adapter in ("adapter", "adapter_best"):
        assert_same_weights(weights(folder, adapter), weights(files / "unbroken", adapter))
    assert steps_logged(folder) == list(range(num_steps))
    assert [e["value"] for e in strict_events(folder) if e["type"] == "eval"] == [
        e["value"] for e in strict_events(files / "unbroken") if e["type"] == "eval"
    ]
    assert len([e for e in strict_events(folder) if e["type"] == "run"]) == 1 + len(saves)


@pytest.mark.soak
def test_three_kills(tmp_path: Path, seed: int) -> None:
    """Dropout is on, the importances move at every step, and the kills fall anywhere in an epoch of twelve steps."""
    rng = random.Random(seed)
    saves = [True, True, False]
    rng.shuffle(saves)
    kill_and_resume(tmp_path, num_steps=30 * STEPS_PER_EPOCH, saves=saves, rng=rng)


@pytest.mark.soak
@pytest.mark.parametrize("method", ["unihyperlora", "sat_lora", "hf_sat_lora"])
def test_three_kills_of_methods_with_files_of_their_own(method: str, tmp_path: Path, seed: int) -> None:
    kill_and_resume(tmp_path, 20 * STEPS_PER_EPOCH, [True, False, True], random.Random(seed), method)


@pytest.mark.soak
@pytest.mark.parametrize("names", [{}, {"optimizer": "schedule_free", "schedule": "constant"}], ids=["adamw", "free"])
def test_twenty_four_kills(names: dict[str, str], tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    saves = [i % 3 != 0 for i in range(24)]
    kill_and_resume(tmp_path, num_steps=150 * STEPS_PER_EPOCH, saves=saves, rng=rng, **names)
