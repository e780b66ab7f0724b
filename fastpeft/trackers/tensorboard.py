"""A run's scalars for TensorBoard, in `results/NAME/tensorboard/`. A resume writes them anew from the log."""

from __future__ import annotations

import shutil
from pathlib import Path

from fastpeft.runs.events import Event
from fastpeft.trackers.scalars import Row


class TensorBoardRun:
    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"

    def start(self) -> str:
        """Returns how the run can be seen."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = EventFileWriter(str(self._folder), flush_secs=2)
        return f"TensorBoard: tensorboard --logdir {self._folder}"

    def describe(self, event: Event) -> None: ...

    def add(self, row: Row) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=k, simple_value=v) for k, v in row.values.items() if k != "step"]
        self._writer.add_event(Record(wall_time=row.time_s, step=row.step, summary=Summary(value=scalars)))

    def caught_up(self) -> None: ...

    def finish(self, end: Event | None) -> None:
        self._writer.close()
