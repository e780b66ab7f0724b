"""A run's scalars for TensorBoard, in `results/NAME/tensorboard/`. A resume rewrites them from the log."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError
from fastpeft.runs.events import Event
from fastpeft.trackers.scalars import Row
from fastpeft.trackers.tracker import Tracker, is_installed


class TensorBoardRun(Tracker):
    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"

    @classmethod
    def settings(cls, section: Any, say: Callable[[str], None]) -> dict[str, str]:
        if not is_installed("tensorboard"):
            raise UserError("tensorboard: true, but it is not installed: pip install tensorboard")
        return {}

    def start(self) -> str:
        """Returns how the run can be seen."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = EventFileWriter(str(self._folder), flush_secs=2)
        return f"TensorBoard: tensorboard --logdir {self._folder}"

    def add(self, row: Row) -> None:
        record = import_module("tensorboard.compat.proto.event_pb2").Event  # protobuf creates its classes at import
        summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
        scalars = [summary.Value(tag=k, simple_value=v) for k, v in row.values.items() if k != "step"]
        self._writer.add_event(record(wall_time=row.time_s, step=row.step, summary=summary(value=scalars)))

    def finish(self, end: Event | None) -> None:
        self._writer.close()
