"""A worker process of a sweep, and the messages between the two: JSON over a pipe.

Workers are forked from a server that has imported torch and transformers once. A trial thus starts in milliseconds
instead of the seconds that the imports take, and still has its own interpreter, CUDA context and memory. The sweep's
process imports neither library.
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
"""Function that a worker runs: (specification, its end of the pipe) -> result."""

PRELOADED = ["fastpeft.sweep.preloaded", "fastpeft.cli"]
"""Modules that the fork server imports."""
_END_S = 10.0
_CRASHED = 1


class Channel:
    """The worker's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def tell(self, message: Message) -> None:
        """Send a message to the sweep. Thread-safe."""
        with self._lock:
            self._pipe.send_bytes(json.dumps(message).encode())

    def report(self, number: int, value: float) -> bool:
        """Report an evaluation's number and value. Blocks until the sweep answers whether to prune the trial."""
        self.tell({"report": [number, value]})
        return bool(json.loads(self._pipe.recv_bytes())["prune"])


class Worker:
    """A process that runs one job.

    Args:
        target: `package.module:function`, a Job.
        spec: argument of the job, JSON values.
        log: file that its output is appended to.
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
        """Handles for `connection.wait`: ready on a message or on the end of the process."""
        return [self._process.sentinel] if self._pipe.closed else [self._pipe, self._process.sentinel]

    def messages(self) -> list[Message]:
        """Messages since the last call, without the final result."""
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
        """Answer a report."""
        try:
            self._pipe.send_bytes(json.dumps({"prune": prune}).encode())
        except OSError:  # it was killed meanwhile; `outcome` reports that
            self._pipe.close()

    def outcome(self) -> Message | None:
        """Return value of the job, or {failed, exit_code} if it failed. None while the process runs."""
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
        """Send SIGTERM. A trainer saves a checkpoint before it ends."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.join(_END_S)


def warm_up() -> None:
    """Start the fork server early, so that its imports overlap with other work."""
    from multiprocessing import forkserver

    forking_context()
    forkserver.ensure_running()


def wait(workers: list[Worker], timeout_s: float) -> None:
    """Wait until a worker has a message or has ended, at most `timeout_s`."""
    connection.wait([handle for worker in workers for handle in worker.handles], timeout_s)


def forking_context() -> ForkServerContext:
    """The multiprocessing context whose processes start with PRELOADED imported."""
    # torch detects GPUs through NVML. Initialising the CUDA runtime here would make it unusable in forked processes.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _run(pipe: Connection, target: str, spec: str, log: str) -> None:
    """Entry point of the worker process."""
    os.setsid()  # keeps Ctrl-C from the workers; the sweep stops them
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
    """Whether every trial would fail with this error: missing model, missing data or unknown metric."""
    return isinstance(error, UnavailableError) or getattr(error, "ends_sweep", False)


def write_to(log: str) -> None:
    """Redirect file descriptors 1 and 2 to `log`, which includes output of native libraries."""
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.close(number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False, errors="backslashreplace")
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")


def _end_with_the_sweep() -> None:
    """End this process with its sweep. A trial would otherwise keep training without anybody to receive its result."""
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os._exit(_CRASHED)
