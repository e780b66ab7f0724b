"""Ctrl-C and SIGTERM: the first asks the loop to stop after its step, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from fastpeft.launched import place


class StopRequest:
    """A context that installs handlers for both signals. It may be nested. Outside the main thread it installs none."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._depth = 0

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        if place().rank > 0:
            return
        # A handler may interrupt a print, and a nested print raises: write directly to the file descriptor.
        text = f"\n{self.signal.name}: finishing this step and saving a checkpoint; a second one ends at once\n"
        os.write(2, text.encode())
