"""What a checkpoint holds: a state of each part of a run, by the part's name."""

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
    """A part of a run that a resume has to find as it was left."""

    def state_dict(self) -> State:
        """Tensors and JSON values, by names. Tensors may be the part's own, not to be changed."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Become what gave `state`. It was made with the same settings."""


class Checkpointing(AbstractContextManager):
    """Saves and restores a run's parts. They are restored in the order of the registry.

    A thread writes what was saved while training goes on. Use as a context: leaving it waits until that is on disk.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Stateful]) -> None:
        self._folder, self._parts = folder, parts
        self._writer = ThreadPoolExecutor(1, "fastpeft-checkpoint")
        self._writing: Future[None] | None = None
        self.saved_at = 0
        """Steps that had been taken when the last checkpoint was saved."""

    def __exit__(self, *exception: object) -> None:
        try:
            self._wait()
        finally:
            self._writer.shutdown()

    def save(self, step: int, events_bytes: int) -> None:
        """Keep the state as it is now. One checkpoint is written at a time, so that no more than one copy is held.

        Raises:
            OSError: the one before could not be written.
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
            CheckpointError: it has other parts than the run. Nothing has been restored.
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
    """In the host's memory, and no part of what training changes. A GPU's copies are behind the work that it has."""
    if isinstance(value, torch.Tensor) and value.is_cuda:
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return host.copy_(value.detach(), non_blocking=True)
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    return copy.deepcopy(value)
