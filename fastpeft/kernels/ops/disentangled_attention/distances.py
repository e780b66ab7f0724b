"""Which rows of its position tables an attention reads at which distance between a query and a key."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Distances:
    """Of the distances i - j from 1 - max_keys to max_queries - 1, ascending: P of them, R rows of the tables.

    It lies on the device, so that nothing is asked of the host while a step is computed; make it once a length.
    """

    rows_P: torch.Tensor
    """int32, never descending: near distances have a row each, far ones share some."""
    starts_R1: torch.Tensor
    """int32: the distances of row r are those from starts[r] up to, not with, starts[r + 1]."""
    max_queries: int
    max_keys: int
    one_each: bool
    """Distance and row are the same, counted from the first."""

    @property
    def num_rows(self) -> int:
        return self.starts_R1.numel() - 1

    @staticmethod
    def of(rows: Sequence[int], max_keys: int, device: torch.device | str = "cpu") -> Distances:
        """`rows` holds one row for each distance.

        Raises:
            ValueError: there are fewer distances than keys, or the rows do not begin at 0, or descend.
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
