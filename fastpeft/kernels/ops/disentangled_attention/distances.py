"""Map from the distance between a query and a key to a row of the position tables."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Distances:
    """Rows of the position tables for the distances i - j from 1 - max_keys to max_queries - 1, ascending.

    P distances, R rows of a table. The tensors are on the device, so that a step copies nothing from the host; make one
    object per length and reuse it.
    """

    rows_P: torch.Tensor
    """(P,) int32, non-decreasing. Small distances have a row each; large ones may share a row."""
    starts_R1: torch.Tensor
    """(R + 1,) int32: row r has the distances from index starts[r] up to but excluding starts[r + 1]."""
    max_queries: int
    """Largest number of queries of a row of tokens."""
    max_keys: int
    """Largest number of keys of a row of tokens."""
    one_each: bool
    """Whether every distance has a row of its own: rows_P is 0 to P - 1."""

    @property
    def num_rows(self) -> int:
        return self.starts_R1.numel() - 1

    @staticmethod
    def of(rows: Sequence[int], max_keys: int, device: torch.device | str = "cpu") -> Distances:
        """The map for a list of rows, one per distance in ascending order.

        Args:
            rows: P integers, non-decreasing from 0.
            max_keys: at most P; max_queries is P - max_keys + 1.

        Raises:
            ValueError: fewer distances than keys, or rows that do not start at 0 or that decrease.
        """
        if not 1 <= max_keys <= len(rows) or rows[0] != 0 or list(rows) != sorted(rows):
            raise ValueError(
                f"Distances: {len(rows)} rows for {max_keys} keys, the first {list(rows[:3])}; expected a row for each "
                "distance, from 0 up"
            )
        starts = [bisect_left(rows, row) for row in range(rows[-1] + 2)]
        rows_P, starts_R1 = (torch.tensor(x, dtype=torch.int32, device=device) for x in (list(rows), starts))
        one_each = list(rows) == list(range(len(rows)))
        return Distances(rows_P, starts_R1, len(rows) - max_keys + 1, max_keys, one_each)
