"""Functions in several processes that are the ranks of one run, on this machine's loopback."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers", "peft", "safetensors.torch"])
"""What takes seconds to import, once for all processes. Nothing of fastpeft: `in_float64` comes before it."""

TIMEOUT_S = 90


class RankFailed(Exception):
    """One of the ranks has raised: its message."""


def on_ranks(size: int, work: Callable[..., Any], *args: Any, float64: bool = False) -> list[Any]:
    """What `work(*args)` returns on each of `size` ranks, in their order.

    Args:
        float64: everything that fastpeft has in fp32 is float64 there.

    Raises:
        RankFailed: with the message of the rank that was the first; the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(size):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_rank, args=(there, rank, size, port, float64, work, args), daemon=True)
        process.start()
        there.close()
        ranks.append((process, here))
    try:
        return _results([here for _, here in ranks])
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def _results(pipes: list[Connection]) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        left = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
        ready = multiprocessing.connection.wait(left, TIMEOUT_S)
        assert ready, f"ranks {[rank for rank in range(len(pipes)) if rank not in found]} hang"
        for pipe in ready:
            try:
                is_value, value = pipe.recv()
            except EOFError:
                is_value, value = False, "ended without a word"
            if not is_value:
                raise RankFailed(f"rank {pipes.index(pipe)}: {value}")
            found[pipes.index(pipe)] = value
    return [found[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, rank: int, size: int, port: int, float64: bool, work: Callable[..., Any], args: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if float64:
        in_float64()
    try:
        pipe.send((True, work(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def in_float64() -> None:
    """fp32 is float64 in what is imported from here on, and in every tensor that is made without a dtype."""
    import torch

    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    from fastpeft.kernels.ops.adamw import op

    def step_plainly(buffers, layout, lr, divisor, skipped, options) -> None:  # torch's fused form counts in fp32
        op._step_plainly(buffers, layout, lr, divisor, skipped == 0, None, options)

    op._step_fused = step_plainly
