"""The events of a set-up, from its first second on.

A new run gets its folder and log before anything is read, so that its progress can be watched. If the set-up fails,
they are removed. In a resumed run's folder nothing is written until the set-up has passed all checks. The reporter
receives every event immediately.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

from fastpeft import phases
from fastpeft.runs.events import Event, EventLog, make_event
from fastpeft.runs.store import RunFolder
from fastpeft.trainer.checkpoint_files import Checkpoint


class SetUp(AbstractContextManager):
    """A context that logs phases (fastpeft.phases) begun inside as `phase` events. Call `open_log` after it.

    Args:
        resume: the folder exists and is locked; otherwise it is made.
        checkpoint: the one that the run continues from.
    """

    def __init__(
        self, folder: RunFolder, listener: Callable[[Event], None], resume: bool, checkpoint: Checkpoint | None
    ) -> None:
        self._folder, self._listener, self._resume = folder, listener, resume
        self._place = {"elapsed_s": 0.0, "step": 0}
        if checkpoint is not None:
            self._place = {"elapsed_s": checkpoint.parts["clock"]["elapsed_s"], "step": checkpoint.step}
        self._early: list[Event] = []
        self._log: EventLog | None = None

    def __enter__(self) -> SetUp:
        if not self._resume:
            self._has_parent = self._folder.path.parent.exists()
            self._folder.create()
            self._log = EventLog(self._folder.events, (self._listener,))
        self._told = phases.told_to(self._phase)
        self._told.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._told.__exit__(*exception)
        if exception[0] is not None and self._log is not None:
            self._log.close()
            shutil.rmtree(self._folder.path)
            if not self._has_parent:
                with suppress(OSError):  # another run has a folder there by now
                    self._folder.path.parent.rmdir()

    def open_log(self) -> EventLog:
        """The run's log, which holds the set-up's events."""
        log = self._log or EventLog(self._folder.events, (self._listener,))
        for event in self._early:
            log.append(event)
        return log

    def _phase(self, **fields: Any) -> None:
        if self._log is not None:
            self._log.write("phase", **self._place, **fields)
            return
        event = make_event("phase", **self._place, **fields)
        self._early.append(event)
        self._listener(event)
