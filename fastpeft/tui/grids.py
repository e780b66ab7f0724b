"""Values of a model's matrices from a run's log, as a grid of layer x projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fastpeft.tui.parse import Blocks, Importance, Rates
from fastpeft.tui.series import Floats


@dataclass(frozen=True)
class Grid:
    """The content of a Heatmap. Every array is (rows, columns), nan where the model has no such matrix."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Floats
    value_name: str = "value"
    more: dict[str, Floats] = field(default_factory=dict)
    """Further values shown at the cursor, by name."""
    first: Floats | None = None
    """Earlier values, from which the change is shown."""
    names: dict[tuple[int, int], str] = field(default_factory=dict)
    """Full name by (row, column)."""
    is_ratio: bool = False
    """Values are factors: the scale is logarithmic with 1 in the middle."""


def importance_grid(snapshots: Sequence[Importance], at: int = -1) -> Grid:
    """Snapshot `at`, with the change since the first. Matrices of one layer and projection get separate columns.

    Raises:
        IndexError: there is no such snapshot.
    """
    snapshot, first = snapshots[at], snapshots[0]
    grid = _grid(snapshot, first, snapshot.weights, first.weights)
    more = {"sensitivity": snapshot.sensitivity, "rank": snapshot.ranks}
    more = {name: _spread(snapshot, values)[2] for name, values in more.items() if values is not None}
    return replace(grid, value_name="weight", more=more)


def rates_grid(snapshots: Sequence[Rates], at: int = -1) -> Grid:
    """As `importance_grid`, for the multipliers of the learning rate."""
    snapshot, first = snapshots[at], snapshots[0]
    grid = _grid(snapshot, first, snapshot.multipliers, first.multipliers)
    return replace(grid, value_name="multiplier", is_ratio=True)


def _grid(snapshot: Blocks, first: Blocks, values: Floats, first_values: Floats) -> Grid:
    rows, columns, values_RC, keys = _spread(snapshot, values)
    return Grid(
        rows=rows,
        columns=columns,
        values=values_RC,
        first=_spread(first, first_values)[2] if first.names == snapshot.names and first is not snapshot else None,
        names=dict(zip(keys, snapshot.names)),
    )


def _spread(blocks: Blocks, values: Floats) -> tuple[tuple[str, ...], tuple[str, ...], Floats, list[tuple[int, int]]]:
    """(row names, column names, values, each block's (row, column))."""
    rows = sorted(set(blocks.layer))
    keys, columns = [], {}
    seen: dict[tuple[int, str], int] = {}
    for layer, projection in zip(blocks.layer, blocks.projection):
        seen[layer, projection] = again = seen.get((layer, projection), 0) + 1
        column = projection if again == 1 else f"{projection}#{again}"
        keys.append((rows.index(layer), columns.setdefault(column, len(columns))))
    out_RC = np.full((len(rows), len(columns)), np.nan)
    out_RC[tuple(np.array(keys).reshape(-1, 2).T)] = values
    return tuple(str(layer) for layer in rows), tuple(columns), out_RC, keys
