"""What TensorBoard's own reader finds in the folder of a run, resumed ones included."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tensorboard", reason="tensorboard is not installed")

from fastpeft.trackers import Choice, Trackers
from tests.support.tracked_logs import write_log


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return [(e.step, e.value) for e in found.Scalars(tag)]


def test_a_resume_leaves_every_step_once(tmp_path):
    said, folder = [], tmp_path / "r"
    for steps in (range(6), range(6, 8)):
        write_log(folder, steps).close()
        Trackers([Choice("tensorboard")], folder, said.append, pytest.fail).close()
    assert said == [f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}"] * 2
    losses = scalars(folder, "train/loss")
    assert [step for step, _ in losses] == list(range(1, 9))
    assert [value for _, value in losses] == pytest.approx([1 / step for step in range(1, 9)])
    assert scalars(folder, "eval/accuracy") == [(4, 0.375), (8, 0.875)]
    assert scalars(folder, "importance/q") == [(0, 1.0)]
