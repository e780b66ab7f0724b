"""A file cache of each training row's hidden states below the first adapter, filled as rows are first used.

It changes the method: below the first adapter there is no dropout. It is for adapters on upper layers: from the second
epoch on, a step computes only those.

Shapes: N rows of L tokens, D hidden.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastpeft.data.batches import Batch, TokenRows
from fastpeft.errors import UserError
from fastpeft.models.prefix import FrozenPrefix

FOLDER = "prefix_cache"
_DTYPES = {"fp32": np.float32, "fp16": np.float16}


def open_prefix_cache(
    setting: bool | str, folder: Path, model: nn.Module, adapted: list[str], rows: TokenRows, sample: Batch
) -> PrefixCache:
    """Open or create the cache in a run's folder.

    Args:
        setting: training.cache_prefix, True or fp16.
        folder: the run's folder.
        adapted: names of the adapted matrices.
        sample: a batch of a few rows, on which the split of the model is checked.

    Raises:
        UserError: the model or its adapters cannot be split so; no room on the disk.
    """
    prefix = FrozenPrefix(model, adapted)
    prefix.check(sample.inputs)
    width = prefix.take(sample.inputs).shape[-1]
    return PrefixCache(folder / FOLDER, prefix, rows, width, "fp16" if setting == "fp16" else "fp32")


def reading(
    cache: PrefixCache | None, rows: np.ndarray, batch: Batch, collate: Callable[[np.ndarray], Batch]
) -> AbstractContextManager[None]:
    """As PrefixCache.reading; does nothing without a cache."""
    return nullcontext() if cache is None else cache.reading(rows, batch, collate)


class PrefixCache:
    """The cache of one run. A resume reuses its files."""

    def __init__(self, folder: Path, prefix: FrozenPrefix, rows: TokenRows, width: int, precision: str) -> None:
        """
        Args:
            width: D.
            precision: dtype of the file, fp32 or fp16.

        Raises:
            UserError: the disk has no room for it.
        """
        self._prefix, self._offsets = prefix, rows.offsets
        self._folder, dtype, num_tokens = folder, np.dtype(_DTYPES[precision]), int(rows.offsets[-1])
        self.num_bytes = num_tokens * width * dtype.itemsize
        self.num_layers = prefix.num_layers
        is_new = not self._states.exists()
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if is_new and self.num_bytes > free:
            raise UserError(
                f"training.cache_prefix {precision}: {num_tokens:,} tokens take {self.num_bytes / 2**20:,.0f} MB, and "
                f"{free / 2**20:,.0f} MB are free at {folder}; take fp16, fewer rows, or training.cache_prefix=off"
            )
        mode = "w+" if is_new else "r+"
        self._states_TD = np.memmap(self._states, dtype, mode, shape=(num_tokens, width))
        self._done_N = np.memmap(folder / "done.bin", np.bool_, mode, shape=(len(rows),))

    @property
    def _states(self) -> Path:
        return self._folder / "states.bin"

    @contextmanager
    def reading(self, rows: np.ndarray, batch: Batch, collate: Callable[[np.ndarray], Batch]) -> Iterator[None]:
        """Around a pass over `batch`, which holds `rows`. Rows not cached yet are made by `collate` and computed."""
        new = rows[~self._done_N[rows]]
        if len(new):
            inputs = collate(new).inputs
            self._keep(new, self._prefix.take(inputs))
        with self._prefix.given(self._padded(rows, batch.inputs["input_ids"])):
            yield

    def _keep(self, rows: np.ndarray, hidden_NLD: torch.Tensor) -> None:
        found = hidden_NLD.float().cpu().numpy()
        for row, hidden_LD in zip(rows, found):
            begin, end = self._offsets[row : row + 2]
            self._states_TD[begin:end] = hidden_LD[: end - begin]
        self._states_TD.flush()
        self._done_N[rows] = True  # after the states, so that a marked row is whole even after a kill

    def _padded(self, rows: np.ndarray, ids_NL: torch.Tensor) -> torch.Tensor:
        hidden_NLD = torch.zeros(*ids_NL.shape, self._states_TD.shape[1])
        for place, row in enumerate(rows):
            begin, end = self._offsets[row : row + 2]
            hidden_NLD[place, : end - begin] = torch.from_numpy(np.array(self._states_TD[begin:end], dtype=np.float32))
        return hidden_NLD.to(ids_NL.device, self._prefix.dtype)

    def describe(self) -> str:
        return (
            f"training.cache_prefix: what the lowest {self.num_layers} layers make of the training rows is kept, "
            f"{self.num_bytes / 2**20:,.0f} MB at most at {self._folder}; there is no dropout in these layers"
        )

    def remove(self) -> None:
        """Delete the files, at the end of the run."""
        shutil.rmtree(self._folder, ignore_errors=True)
