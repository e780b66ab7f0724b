"""W&B and TensorBoard, each in a process of its own that reads the run's event log as it grows.

The log is the queue. It is unbounded and survives a kill. A resume has truncated it before a tracker starts, so the
tracker sees every step once. The trainer only starts a process and closes a pipe: a tracker that hangs or dies can
neither slow nor stop it.

    choose.py    which trackers a run has
    process.py   the trainer's side
    __main__.py  the tracker's side: follow the log, send its rows
    scalars.py   events -> rows of numbers
    tracker.py   the interface of wandb_run.py and tensorboard.py; config/trackers.py lists them
"""

from fastpeft.trackers.choose import Choice, choose
from fastpeft.trackers.process import Trackers

__all__ = ["Choice", "Trackers", "choose"]
