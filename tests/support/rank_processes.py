"""Processes that are the ranks of one run, on this machine's loopback, and do what a test asks of them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["torch", "transformers", "peft", "safetensors.torch"]
"""What takes seconds to import, once for all processes. Nothing of fastpeft: `_in_float64` comes before it."""
_own_servers: set[int | None] = set()

TIMEOUT_S = 120


class RankFailed(Exception):
    """A rank has raised: its traceback."""


class RankProcesses:
    """Call it with a function and its arguments: what that returns on each rank, in their order.

    Args:
        float64: everything that fastpeft has in fp32 is float64 there.
    """

    def __init__(self, size: int, float64: bool = False) -> None:
        _begin_own_server()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._ranks: list[tuple[Any, Any]] = []
        for rank in range(size):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(there, rank, size, port, float64), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """
        Raises:
            RankFailed: of the rank that raised first; all ranks are ended.
        """
        for _, pipe in self._ranks:
            pipe.send((work, args))
        try:
            return self._answers()
        except BaseException:
            self.end()
            raise

    def _answers(self) -> list[Any]:
        pipes = [pipe for _, pipe in self._ranks]
        found: dict[int, Any] = {}
        while len(found) < len(pipes):
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in found], TIMEOUT_S)
            assert ready, f"ranks {[rank for rank in range(len(pipes)) if rank not in found]} hang"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pipes.index(pipe)
                is_value, value = pipe.recv()
                if not is_value:
                    raise RankFailed(f"rank {rank}: {value}")
                found[rank] = value
        return [found[rank] for rank in range(len(pipes))]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process, _ in self._ranks)

    def end(self) -> None:
        for process, _ in self._ranks:
            process.kill()
            process.join()


def _begin_own_server() -> None:
    """A process has one fork server, and a sweep's, which another test may have begun here, has fastpeft in it."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid not in _own_servers:
        server._stop()
        _CONTEXT.set_forkserver_preload(_PRELOADED)
        server.ensure_running()
        _own_servers.add(server._forkserver_pid)


def _serve(pipe: Connection, rank: int, size: int, port: int, float64: bool) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if float64:
        _in_float64()
    while True:
        work, args = pipe.recv()
        try:
            pipe.send((True, work(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _in_float64() -> None:
    """fp32 is float64 in what is imported from here on, and in every tensor that is made without a dtype."""
    import numpy as np
    import torch

    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    from fastpeft.kernels.ops.adamw import op
    from fastpeft.tasks.multi_label.task import MultiLabel
    from fastpeft.tasks.regression.task import Regression

    MultiLabel.label_dtype = Regression.label_dtype = np.float64

    def step_plainly(buffers: Any, layout: Any, lr: float, divisor: Any, skipped: Any, options: Any) -> None:
        op._step_plainly(buffers, layout, lr, divisor, skipped == 0, None, options)

    op._step_fused = step_plainly  # torch's counts its steps in fp32
