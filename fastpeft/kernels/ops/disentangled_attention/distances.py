"""Which rows of its position tables an attention reads at which distance between a query and a key."""

from __future__ import annotations

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

    @property
    def num_rows(self) -> int:
        return self.starts_R1.numel() - 1

    @property
    def one_each(self) -> bool:
        """No two distances share a row."""
        return self.num_rows == self.rows_P.numel()

    @staticmethod
    def of(rows: Sequence[int], max_keys: int, device: torch.device | str = "cpu") -> Distances:
        """`rows` holds one row for each distance.

        Raises:
            ValueError: there are fewer distances than keys, or the rows do not ascend from 0 without a gap.
        """
        steps = {after - before for before, after in zip(rows, rows[1:])}
        if not 1 <= max_keys <= len(rows) or rows[0] != 0 or not steps <= {0, 1}:
            raise ValueError(
                f"Distances: {len(rows)} rows for {max_keys} keys, first {list(rows[:1])}, steps {sorted(steps)}; "
                "expected a row for each distance, the first 0 and each the same as the one before it or the next"
            )
        starts = [place for place, row in enumerate(rows) if not place or row != rows[place - 1]]
        rows_P, starts_R1 = (torch.tensor(x, dtype=torch.int32, device=device) for x in (rows, [*starts, len(rows)]))
        return Distances(rows_P, starts_R1, len(rows) - max_keys + 1, max_keys)
