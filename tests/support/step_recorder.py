"""Whether a step could be captured once and replayed, told on a CPU by what it does.

A replay repeats operations with the numbers, shapes and addresses that were captured. So a step is recorded several
times over, on other data of the same shapes. It fails where it asks the device for a value, waits, or makes a tensor of
the host's; and where two recordings differ in an operation, a number, a shape, an allocation, or the address of a
tensor that was there before the step.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpeft

ATEN = torch.ops.aten
WAITING = {
    ATEN._local_scalar_dense.default,  # item, float, bool, tolist, an index or a size that is a tensor
    ATEN.nonzero.default,  # how large the result is, the device knows
    ATEN.masked_select.default,
    ATEN.equal.default,
    ATEN.is_nonzero.default,
    ATEN._unique2.default,
    ATEN.unique_consecutive.default,
    ATEN.repeat_interleave.Tensor,
}
INDEXING = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default, ATEN._unsafe_index_put.default}
"""By a mask they are nonzero."""
ON_A_CPU_ALONE = {
    "check_classes": "labels are checked where that is free",
    "_take_labels": "of tiles, which a GPU does not take",
    "_gradient": "likewise",
    "_check_rows": "rows are checked where that is free",
    "_generated_mask": "dropout's masks are drawn from a generator of the host's",
    "_pytorch": "rows that are ignored are looked for where that is free",
    "linear_cross_entropy": "rows with a label are looked for where that is free",
}
"""Functions that ask which device it is before they look."""
FROM_THE_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.pin_memory}
"""What they make is copied to a GPU once, when the step is captured."""
_OURS = str(Path(fastpeft.__file__).parent)
TO_THE_HOST = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item}


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host would wait for the device in this operation."""
    return func in WAITING or (func in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1]))


def place() -> str:
    """The function of fastpeft's or of transformers' that is nearest to what is called now."""
    frame = sys._getframe(1)
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.startswith(_OURS):
            return name
        if "/transformers/" in path:
            return f"transformers {Path(path).stem}.{name}"
        frame = frame.f_back
    return "?"


class NotReplayable(AssertionError):
    """What a replay would not do again, and where it is done."""


@dataclass(frozen=True)
class Operation:
    """One operation of a step."""

    name: str
    place: str
    numbers: tuple[str, ...]
    """Arguments that are no tensors."""
    results: tuple[tuple[Any, ...], ...]
    """Shape, strides and dtype of each."""
    allocations: tuple[int, ...]
    """Bytes of each new storage."""
    addresses: tuple[int | None, ...]
    """Of each tensor that it is given: where it lies, if it was there before the step."""


_DIFFERENCES = {
    "name": "another operation is done",
    "place": "another operation is done",
    "numbers": "a number of the host's differs",
    "results": "a result has another shape",
    "allocations": "memory is allocated in another size",
    "addresses": "a tensor from before the step lies at another address",
}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.kept: list[torch.Tensor] = []
        """Every tensor that was seen, alive, so that no address is used twice."""
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, where = kwargs or {}, place()
        counts = where not in ON_A_CPU_ALONE
        if counts and waits(func, args):
            raise NotReplayable(f"{where} waits for the device: {func}")
        leaves = tree_leaves((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if func is ATEN.lift_fresh.default and not given[0].ndim:  # a number, as in x[0] = 1, which a GPU is handed
            self._made.add(_storage(given[0]))
            leaves.append(given[0].tolist())
        addresses = tuple(None if _storage(t) in self._made else t.data_ptr() for t in given)
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        known = self._made | {_storage(tensor) for tensor in given}
        new = {_storage(tensor): tensor for tensor in results if _storage(tensor) not in known}
        self._made |= new.keys()
        self.kept += [*given, *results]
        if counts:
            numbers = tuple(_told(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor))
            shapes = tuple((tuple(t.shape), t.stride(), str(t.dtype)) for t in results)
            sizes = tuple(tensor.untyped_storage().nbytes() for tensor in new.values())
            self.operations.append(Operation(str(func), where, numbers, shapes, sizes, addresses))
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _told(value: Any) -> str:
    return "generator" if isinstance(value, torch.Generator) else repr(value)


class _HostCalls(TorchFunctionMode):
    """What no operation tells: on a CPU there is nothing to copy."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in FROM_THE_HOST | TO_THE_HOST and (where := place()) not in ON_A_CPU_ALONE:
            what = "makes a tensor of the host's" if func in FROM_THE_HOST else "waits for the device"
            raise NotReplayable(f"{where} {what}: {func.__name__}")
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def in_backward(self) -> Iterator[None]:
        """Also in what a backward pass calls, within whose own call the mode is off."""
        run = torch.autograd._engine_run_backward  # pyright: ignore[reportAttributeAccessIssue]

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return run(*args, **kwargs)

        with mock.patch.object(torch.autograd, "_engine_run_backward", watched):
            yield


@contextlib.contextmanager
def _no_synchronising() -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotReplayable(f"{place()} waits for the device: synchronize")

    with contextlib.ExitStack() as stack:
        for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
            stack.enter_context(mock.patch.object(owner, "synchronize", refuse))
        yield


def record(step: Callable[[], object]) -> tuple[list[Operation], list[torch.Tensor]]:
    """What a step does, and the tensors that it saw, to be kept while others are recorded.

    Raises:
        NotReplayable: it asks the device for a value, waits for it, or makes a tensor of the host's.
    """
    with _no_synchronising(), _HostCalls() as calls, calls.in_backward(), _Recorder() as recorder:
        step()
    return recorder.operations, recorder.kept


def check_replayable(step: Callable[[], object], fills: Sequence[Callable[[], object]]) -> list[Operation]:
    """Record `step` behind each of `fills`, which put other data into its tensors. The first is not compared with: it
    is the warm-up.

    Returns:
        The operations of a step.

    Raises:
        NotReplayable: what a replay would not do again.
    """
    assert len(fills) > 2, "a warm-up, and two to compare"
    fills[0]()
    step()
    recorded = []
    for fill in fills[1:]:
        fill()
        recorded.append(record(step))
    first = recorded[0][0]
    for operations, _ in recorded[1:]:
        _compare(first, operations)
    return first


def _compare(first: list[Operation], other: list[Operation]) -> None:
    for number, (a, b) in enumerate(zip(first, other)):
        for field in fields(Operation):
            if getattr(a, field.name) != getattr(b, field.name):
                raise NotReplayable(
                    f"{_DIFFERENCES[field.name]}: {a.name} in {a.place}, operation {number}: "
                    f"{getattr(a, field.name)}, then {getattr(b, field.name)} in {b.name}"
                )
    if len(first) != len(other):
        longer = max(first, other, key=len)[min(len(first), len(other))]
        raise NotReplayable(f"another operation is done: {longer.name} in {longer.place} in one of two steps alone")


class Rerun:
    """In a CUDA graph's place: a replay does the step again."""

    def __init__(self) -> None:
        self.num_captured = self.num_replays = 0

    def __call__(self, step: Callable[[], None]) -> Rerun._Step:
        step()
        self.num_captured += 1
        return Rerun._Step(self, step)

    class _Step:
        def __init__(self, owner: Rerun, step: Callable[[], None]) -> None:
            self._owner, self._step = owner, step

        def replay(self) -> None:
            self._owner.num_replays += 1
            self._step()
