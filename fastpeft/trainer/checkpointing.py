"""Saving and restoring a run: a checkpoint holds the state of each part by the part's name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from fastpeft.trainer.checkpoint_files import Checkpoint, CheckpointError, State, save_checkpoint


class Stateful(Protocol):
    """A part of a run whose state a resume restores, as torch's `Stateful`."""

    def state_dict(self) -> State:
        """Tensors and JSON values by name. Tensors may be the part's own buffers: do not change them."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Restore `state`, which a part with the same settings returned."""


class Checkpointing(AbstractContextManager):
    """Saves a run's parts, and restores them in the order of `parts`.

    A thread writes the checkpoint while training continues. Use as a context: leaving it waits for the write.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Stateful]) -> None:
        self._folder, self._parts = folder, parts
        self._writer = ThreadPoolExecutor(1, "fastpeft-checkpoint")
        self._writing: Future[None] | None = None
        self.saved_at = 0
        """Optimizer steps taken when the last checkpoint was saved."""

    def __exit__(self, *exception: object) -> None:
        try:
            self._wait()
        finally:
            self._writer.shutdown()

    def save(self, step: int, events_bytes: int) -> None:
        """Copy the state and write it on the thread. Waits for the previous write, so at most one copy is held.

        Raises:
            OSError: the previous checkpoint could not be written.
        """
        self._wait()
        parts = {name: _copied(part.state_dict()) for name, part in self._parts.items()}
        copies = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copies is not None:
            copies.record()
        self._writing = self._writer.submit(self._write, Checkpoint(step, events_bytes, parts), copies)
        self.saved_at = step

    def _write(self, checkpoint: Checkpoint, copies: torch.cuda.Event | None) -> None:
        if copies is not None:
            copies.synchronize()
        save_checkpoint(self._folder, checkpoint)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore(self, checkpoint: Checkpoint) -> None:
        """
        Raises:
            CheckpointError: the checkpoint's parts are not those of the run. Nothing was restored.
        """
        self._refuse_other_parts(checkpoint)
        for name, part in self._parts.items():
            part.load_state_dict(checkpoint.parts[name])
        self.saved_at = checkpoint.step

    def _refuse_other_parts(self, checkpoint: Checkpoint) -> None:
        missing = [f"lacks the part {name}" for name in self._parts if name not in checkpoint.parts]
        unknown = [f"has a part {name} that is not known here" for name in checkpoint.parts if name not in self._parts]
        if missing or unknown:
            raise CheckpointError(
                f"{self._folder}: the checkpoint of step {checkpoint.step:,} {' and '.join(missing + unknown)}. Resume "
                "the run with the version of fastpeft that began it, or begin anew under another --name"
            )


def _copied(value: Any) -> Any:
    """A copy in host memory that training does not change. Copies from a GPU are queued behind its work."""
    if isinstance(value, torch.Tensor) and value.is_cuda:
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return host.copy_(value.detach(), non_blocking=True)
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    return copy.deepcopy(value)
