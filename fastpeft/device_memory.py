"""When the device runs out of memory: which errors mean it, and what a batch is cut down to."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastpeft.errors import UserError

# cuBLAS and cuDNN allocate past torch, and their failures are plain RuntimeErrors.
_WORDS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")

_ADVICE = (
    "Set dataset.max_length or adapter.rank lower, match fewer layers with adapter.target_modules, set "
    "training.precision=bf16, or take a smaller model"
)


class OutOfMemory(UserError):
    """The device is too small, however small the batches."""

    def __init__(self, where: str, cause: str, advice: str = _ADVICE) -> None:
        super().__init__(f"out of memory {where}: {cause}. {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)


def free_memory() -> None:
    """Give back what nothing holds any more. Not inside an `except`: its traceback holds the activations."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@dataclass
class TokenLimits:
    """Most padded tokens in one pass; they fall when the device runs out of memory, and never rise again."""

    training: int
    evaluation: int

    def halve_training(self, num_rows: int, width: int, where: str) -> str:
        """After a micro-batch of `num_rows` x `width` did not fit. Returns what to tell the user."""
        before, self.training = self.training, _half(num_rows, width, where)
        return f"out of memory {where}: micro-batches of at most {self.training:,} tokens instead of {before:,}"

    def halve_evaluation(self, num_rows: int, width: int, where: str) -> str:
        before, self.evaluation = self.evaluation, _half(num_rows, width, where)
        return f"out of memory {where}: evaluation batches of at most {self.evaluation:,} tokens instead of {before:,}"

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.training, self.evaluation = state["training"], state["evaluation"]


def _half(num_rows: int, width: int, where: str) -> int:
    """Half of what did not fit, which may be far under the limit. Raises OutOfMemory for a single row."""
    if num_rows <= 1:
        raise OutOfMemory(where, f"a single row of {width:,} tokens does not fit")
    return num_rows * width // 2
