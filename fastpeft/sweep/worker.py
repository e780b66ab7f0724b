"""One process of a sweep, and what it and the sweep tell each other: JSON over a pipe.

Processes are forked from a server that has imported torch and transformers once, so that a trial starts in
milliseconds where the imports take seconds, and still has an interpreter, a CUDA context and memory of its own. The
sweep itself imports neither.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from fastpeft.config.registry import import_target
from fastpeft.errors import UnavailableError, UserError

Message = dict[str, Any]
Job = Callable[[Message, "Channel"], Message]
"""What a process runs: (what it is to do, its end of the pipe) -> what it came to."""

PRELOADED = ["fastpeft.sweep.preloaded", "fastpeft.cli"]
"""Modules that the server imports."""
_END_S = 10.0
_CRASHED = 1


class Channel:
    """The process's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def tell(self, message: Message) -> None:
        """For any thread."""
        with self._lock:
            self._pipe.send_bytes(json.dumps(message).encode())

    def report(self, number: int, value: float) -> bool:
        """An evaluation's number and value. Returns whether the trial is to end there."""
        self.tell({"report": [number, value]})
        return bool(json.loads(self._pipe.recv_bytes())["prune"])


class Worker:
    """A process that runs one job.

    Args:
        target: `package.module:function`, a Job.
        spec: what it is to do: JSON values.
        log: file that its output goes to, behind what is there.
    """

    def __init__(self, target: str, spec: Message, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._ended: Message | None = None
        self._untold: list[Message] = []
        self._pipe, theirs = connection.Pipe()
        arguments = (theirs, target, json.dumps(spec), str(log))
        self._process: ForkServerProcess = forking_context().Process(target=_run, args=arguments)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def handles(self) -> list[Any]:
        """To wait on: one is ready when there is a message or the end."""
        return [self._process.sentinel] if self._pipe.closed else [self._pipe, self._process.sentinel]

    def messages(self) -> list[Message]:
        """What it has told since the last look, but for its end."""
        self._read()
        found, self._untold = self._untold, []
        return found

    def _read(self) -> None:
        try:
            while not self._pipe.closed and self._pipe.poll():
                message = json.loads(self._pipe.recv_bytes())
                if "ended" in message:
                    self._ended = message["ended"]
                else:
                    self._untold.append(message)
        except (EOFError, OSError):
            self._pipe.close()

    def answer(self, prune: bool) -> None:
        """To a report."""
        try:
            self._pipe.send_bytes(json.dumps({"prune": prune}).encode())
        except OSError:  # it was killed meanwhile: its end says so
            self._pipe.close()

    def outcome(self) -> Message | None:
        """Of a process that has ended: what its job returned, or {failed, exit_code}. None while it runs."""
        if self._process.is_alive():
            return None
        self._read()
        self._process.join()
        if self._ended is not None:
            return self._ended
        code = self._process.exitcode or 0
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return {"failed": cause, "exit_code": _CRASHED}

    def stop(self) -> None:
        """Ask it to end: a trainer saves a checkpoint first."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.join(_END_S)


def warm_up() -> None:
    """Start the server now, so that it imports while something else goes on."""
    from multiprocessing import forkserver

    forking_context()
    forkserver.ensure_running()


def wait(workers: list[Worker], timeout_s: float) -> None:
    """Until one of them has something to tell, at most `timeout_s`."""
    connection.wait([handle for worker in workers for handle in worker.handles], timeout_s)


def forking_context() -> ForkServerContext:
    """Its processes begin with everything imported."""
    # Whether there is a GPU is asked without CUDA's runtime, which a forked process could not use any more.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _run(pipe: Connection, target: str, spec: str, log: str) -> None:
    """In the process."""
    os.setsid()  # Ctrl-C is the sweep's to hear: it asks the processes to stop
    write_to(log)
    threading.Thread(target=_end_with_the_sweep, name="fastpeft-sweep-watch", daemon=True).start()
    channel = Channel(pipe)
    try:
        job: Job = import_target(target)
        ended = job(json.loads(spec), channel)
    except UserError as error:
        print(f"fastpeft: {error}", flush=True)
        ended = {"failed": str(error), "exit_code": error.exit_code, "ends_sweep": ends_sweep(error)}
    except BaseException as error:
        traceback.print_exc()
        ended = {"failed": f"{type(error).__name__}: {error}", "exit_code": _CRASHED}
    sys.stdout.flush()
    channel.tell({"ended": ended})


def ends_sweep(error: UserError) -> bool:
    """Whether every other trial would fail by it as well: no model, no data, no such metric."""
    return isinstance(error, UnavailableError) or getattr(error, "ends_sweep", False)


def write_to(log: str) -> None:
    """Everything that the process prints, what libraries print below Python included."""
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.close(number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False, errors="backslashreplace")
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")


def _end_with_the_sweep() -> None:
    """A trial whose sweep was killed would train on, and nobody would hear of it."""
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os._exit(_CRASHED)
