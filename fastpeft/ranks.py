"""The processes that train one run together, and their collectives.

torch.distributed does the work: NCCL for tensors on GPUs, gloo for tensors on CPUs. A process that no launcher started
is ALONE: nothing is set up, and no collective is called.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from fastpeft.errors import UserError
from fastpeft.launched import Place, place

LONGEST_WAIT = timedelta(hours=2)
"""Timeout of a collective. A live rank may be late, as rank 0 while it downloads; a dead one is noticed at once."""
_PR_SET_PDEATHSIG = 1
_JOIN_WAIT, _WORD_WAIT = timedelta(minutes=15), timedelta(seconds=20)

Tensors = dict[str, torch.Tensor]
P = ParamSpec("P")
T = TypeVar("T")

_c10d: Any = dist  # its stores and its rendezvous are documented, but the type stubs do not export them
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name in older torch


class RankLost(UserError):
    """Another rank has ended during a collective."""

    exit_code = 1


def _or_lost(collective: Callable[P, T]) -> Callable[P, T]:
    """`collective`, which raises RankLost where another rank does not take part."""

    @wraps(collective)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:
            said, _, _ = str(error).partition(". ")
            raise RankLost(
                "another rank has ended without a message: it was killed, or its host is gone. Resume the run with "
                f"--resume, or give the launcher --max-restarts ({said})"
            ) from None

    return guarded


class Ranks:
    """The ranks of one run, as this process sees them. Every rank has to call the collectives in the same order."""

    def __init__(self, where: Place) -> None:
        self.rank, self.size = where.rank, where.size
        self.local_rank, self.local_size = where.local_rank, where.local_size

    def device(self) -> torch.device:
        """This rank's device: the GPU of its LOCAL_RANK, or the CPU.

        Raises:
            UserError: the host has fewer GPUs than ranks.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UserError(
                f"{self.local_size} ranks on this host, and {count} GPUs: each rank needs one of its own. Take "
                f"--ranks {count}, or --nproc-per-node {count} of torchrun"
            )
        return torch.device("cuda", self.local_rank) if self.size > 1 else torch.device("cuda")

    def share(self, items: T) -> T:
        """This rank's part of a list or an array: every `size`-th item, so that sorted items are shared evenly."""
        return items if self.size == 1 else cast(Any, items)[self.rank :: self.size]

    @_or_lost
    def add_up(self, tensor: torch.Tensor) -> None:
        """All-reduce: the sum over the ranks, in place, bitwise equal on all of them."""
        if self.size > 1:
            dist.all_reduce(tensor)

    @_or_lost
    def most(self, value: int) -> int:
        """The largest of the ranks' values, on the hosts: no device is synchronized."""
        if self.size == 1:
            return value
        found = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    @_or_lost
    def gather_into(self, whole: torch.Tensor, own: torch.Tensor, group: Any, async_op: bool) -> Any:
        """All-gather: the ranks' equally large tensors, concatenated in `whole`. Returns torch's work handle if
        `async_op`."""
        return _all_gather(whole, own, group=group, async_op=async_op)

    @_or_lost
    def take_first(self, tensor: torch.Tensor) -> None:
        """Broadcast: rank 0's tensor, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def told(self, values: Any) -> Any:
        """Broadcast: rank 0's JSON values. Those of the other ranks are not read."""
        return json.loads(self._first_bytes(json.dumps(values).encode())) if self.size > 1 else values

    def given(self, tensors: Tensors) -> Tensors:
        """Broadcast: rank 0's tensors, on the CPU. Those of the other ranks are not read."""
        return load(self._first_bytes(save(tensors))) if self.size > 1 else tensors

    @_or_lost
    def _first_bytes(self, content: bytes) -> bytes:
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == 0:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(buffer, 0)
        return buffer.numpy().tobytes()

    @_or_lost
    def gathered(self, tensors: Tensors) -> list[Tensors]:
        """Every rank's tensors, in rank order, on the CPU. Names and shapes may differ between ranks."""
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(content)]))
        buffer = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        buffer[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        buffers = [torch.empty_like(buffer) for _ in range(self.size)]
        dist.all_gather(buffers, buffer)
        return [load(found[: int(length)].numpy().tobytes()) for found, length in zip(buffers, lengths)]


ALONE = Ranks(Place())


@cache
def join() -> Ranks:
    """Join the launcher's process group until this process ends. Waits for all ranks.

    Raises:
        UserError: no GPU for this rank; torch.distributed is set up already in this process.
    """
    where = place()
    if where.size == 1:
        return ALONE
    if dist.is_initialized():
        raise UserError(
            "torch.distributed is set up already in this process: fastpeft.train sets it up by itself, so leave "
            "init_process_group out"
        )
    ranks = Ranks(where)
    device = ranks.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    _or_lost(dist.init_process_group)(
        backend, store=_store(), rank=where.rank, world_size=where.size, timeout=LONGEST_WAIT
    )
    atexit.register(dist.destroy_process_group)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _stop_with_the_launcher()
    return ranks


def _stop_with_the_launcher() -> None:
    """Have the kernel send SIGTERM when torch's launcher is killed: nothing else would end this process. Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@cache
def _store() -> Any:
    """The launcher's key-value store, under a prefix of this restart, so that keys of earlier ones are not seen."""
    found, _, _ = next(_c10d.rendezvous("env://", timeout=_JOIN_WAIT))
    return _c10d.PrefixStore(f"fastpeft/{place().restarts}", found)


def fails_first(exit_code: int) -> tuple[bool, int]:
    """(whether this rank failed first and has to tell the user, exit code of the rank that failed first)."""
    try:
        store = _store()
        if store.add("failed", 1) == 1:
            store.set("exit_code", str(exit_code))
            return True, exit_code
        store.wait(["exit_code"], _WORD_WAIT)
        return False, int(store.get("exit_code"))
    except RuntimeError:  # the launcher's store is gone
        return place().rank == 0, exit_code


# ---- work shared by all ranks ----------------------------------------------------------------

_together: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """Inside, every rank runs the same code: `current` returns `ranks`, and work may be shared and gathered."""
    token = _together.set(ranks)
    try:
        yield
    finally:
        _together.reset(token)


def current() -> Ranks:
    """The ranks to share work with: those of `together`, and outside of it ALONE."""
    return _together.get()


def everybodys(tensors: Tensors | None) -> list[Tensors] | None:
    """Every rank's results of its share of the work. None on all ranks if one was stopped and passed None."""
    ranks = current()
    if ranks.size == 1:
        return None if tensors is None else [tensors]
    found = ranks.gathered({} if tensors is None else tensors)
    return found if all(found) else None


def joined_parts(
    parts: list[tuple[np.ndarray, torch.Tensor]] | None, loss: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """(places, values, loss) of all ranks: places and values concatenated on the CPU, the loss summed.

    Args:
        parts: (places, values) of this rank's share; None if it was stopped.

    Returns:
        None on all ranks if one of them was stopped.
    """
    mine = None
    if parts is not None:
        mine = {"loss": loss}
        if parts:
            mine["places"] = torch.from_numpy(np.concatenate([places for places, _ in parts]))
            mine["values"] = torch.cat([values for _, values in parts]).cpu()
    found = everybodys(mine)
    if found is None:
        return None
    there = [each for each in found if "places" in each]
    places, values = (torch.cat([each[name] for each in there]) for name in ("places", "values"))
    return places, values, sum(float(each["loss"]) for each in found)
