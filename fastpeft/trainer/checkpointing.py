"""What a checkpoint holds: a state of each part of a run, by the part's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from fastpeft.trainer.checkpoint_files import Checkpoint, CheckpointError, State, save_checkpoint


class Stateful(Protocol):
    """A part of a run that a resume has to find as it was left."""

    def state_dict(self) -> State:
        """Tensors and JSON values, by names. Tensors may be the part's own, not to be changed."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Become what gave `state`. It was made with the same settings."""


class Checkpointing:
    """Saves and restores a run's parts. They are restored in the order of the registry."""

    def __init__(self, folder: Path, parts: Mapping[str, Stateful]) -> None:
        self._folder, self._parts = folder, parts
        self.saved_at = 0
        """Steps that had been taken when the last checkpoint was saved."""

    def save(self, step: int, events_bytes: int) -> None:
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        save_checkpoint(self._folder, Checkpoint(step, events_bytes, parts))
        self.saved_at = step

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
