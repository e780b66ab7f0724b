"""Optuna's journal file, made safe against kill -9 and a full disk.

Optuna's own file lock is a link, which outlives a killed process. Its reader raises on every later read once a line is
truncated. Here the lock is a flock, which the kernel releases with its process, and its next holder removes a truncated
last line.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from fastpeft.errors import UserError, first_line

LOCK_TIMEOUT_S = 60.0
_POLL_S = 0.005


class JournalError(UserError):
    """The journal cannot be read or written; the message says what to do."""


class KernelLock:
    """flock on a file beside the journal."""

    def __init__(self, path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._held: IO[bytes] | None = None

    def __enter__(self) -> None:
        """Raises JournalError if another process holds the lock for longer than `timeout_s`."""
        file = self._path.open("ab")
        until = time.monotonic() + self._timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    file.close()
                    raise
            else:
                self._held = file
                return
            if time.monotonic() > until:
                file.close()
                raise JournalError(
                    f"{self._path} is locked by another process for {self._timeout_s:.0f} s; end that process (fuser "
                    "names it), or put the sweep into another --results-dir"
                )
            time.sleep(_POLL_S)

    def __exit__(self, *exception: object) -> None:
        assert self._held is not None
        self._held.close()
        self._held = None


class JournalFile(JournalFileBackend):
    """Journal backend that appends whole records or nothing."""

    def __init__(self, path: Path, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self._path = path
        self._kernel_lock = KernelLock(path.with_name(f"{path.name}.lock"), lock_timeout_s)
        try:
            super().__init__(str(path))
            with self._kernel_lock:
                self._cut_torn_line()
        except OSError as error:
            raise JournalError(f"{path} cannot be opened: {error.strerror}") from None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append all records. If that fails, the file is truncated to its former size and JournalError raised."""
        try:
            with self._kernel_lock:
                self._cut_torn_line()
                size = self._path.stat().st_size
                try:
                    self._append(logs)
                except OSError:
                    os.truncate(self._path, size)
                    raise
        except OSError as error:
            raise JournalError(
                f"{self._path} cannot be written: {error.strerror}. What is in it is kept; the same command goes on "
                "when that is mended"
            ) from None

    def _append(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._path.open("ab", buffering=0) as file:
            data = lines.encode()
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())

    def _cut_torn_line(self) -> None:
        """Remove a last line that a killed process left incomplete. The caller holds the lock."""
        with self._path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            whole = end
            while whole:
                file.seek(whole - 1)
                if file.read(1) == b"\n":
                    break
                whole -= 1
            if whole != end:
                file.truncate(whole)


def open_journal(path: Path) -> JournalStorage:
    """Open the journal at `path`, or create it. Raises JournalError if it cannot be read."""
    try:
        journal = JournalFile(path)
        for line in path.read_bytes().splitlines()[-1:]:
            json.loads(line)  # Optuna would take an invalid last line for one that is still being written
        return JournalStorage(journal)
    except UserError:
        raise
    except Exception as error:  # Optuna assumes valid records, and raises any class on others
        raise JournalError(f"{path} is no journal of Optuna, or is damaged: {first_line(error)}") from None
