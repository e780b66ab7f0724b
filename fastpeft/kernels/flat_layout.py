"""Where the parameters of a model lie in its flat buffers, as tables that kernels read.

The buffers hold adapted matrices (A of one shape side by side, then their B, shape after shape), behind them other
adapter parameters (`extra`), and behind those the task head's. A `unit` is what statistics are kept of: an adapted
matrix (its A and B), or one other piece. The first K units are `blocks`, which may have learning rates of their own:
the matrices, and of `extra` the first `num_named`.

Shape suffixes: K matrices or blocks, I in, O out, R rank.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

NORM_SLICE = 32768
"""Elements of `extra` and head that one program of a norm sums."""
STEP_SLICE = 4096
"""Elements that one program of an optimizer step updates; a multiple of its block."""
TASK_COLUMNS, SLICE_COLUMNS = 6, 4


@dataclass(frozen=True)
class MatrixGroup:
    """Matrices of one shape, one scale."""

    indices: tuple[int, ...]
    """Number of each matrix in the model."""
    rank: int
    num_in: int
    num_out: int
    scale: float
    """s, lora_alpha / rank: the update is s B A."""
    start: int
    """Place of the first A in the buffers."""

    @property
    def middle(self) -> int:
        """Place of the first B."""
        return self.start + len(self.indices) * self.rank * self.num_in

    @property
    def end(self) -> int:
        return self.middle + len(self.indices) * self.rank * self.num_out

    def stack_a(self, flat: torch.Tensor) -> torch.Tensor:
        """View of A in a flat buffer."""
        return flat[self.start : self.middle].view(-1, self.rank, self.num_in)

    def stack_b(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.middle : self.end].view(-1, self.num_out, self.rank)


class FlatLayout:
    """The places of all parameters, and device tables made of them once.

    The tables hold counters that kernels leave at zero: one layout serves one stream at a time.
    """

    def __init__(
        self,
        groups: Sequence[MatrixGroup],
        extra: Sequence[int] = (),
        head: Sequence[int] = (),
        device: torch.device | str = "cpu",
        num_named: int = 0,
    ) -> None:
        """
        Args:
            groups: without a gap from place 0; their indices are 0..K-1, each once.
            extra, head: number of elements of each piece that is no LoRA factor.
            num_named: how many of `extra`, the first, are blocks.

        Raises:
            ValueError: groups that overlap, or whose indices are not 0..K-1; a size below 1.
        """
        self.groups = tuple(groups)
        indices = [k for group in groups for k in group.indices]
        ends = [0, *(group.end for group in groups)]
        if sorted(indices) != list(range(len(indices))) or [g.start for g in groups] != ends[:-1]:
            raise ValueError(
                f"FlatLayout: groups of matrices {[g.indices for g in groups]} at {[g.start for g in groups]}; "
                "expected indices 0..K-1, each once, and every group where the one before it ends"
            )
        sizes = [size for g in self.groups for size in (g.rank, g.num_in, g.num_out)]
        if min([*sizes, *extra, *head, 1]) < 1:
            raise ValueError(f"FlatLayout: sizes {[*sizes, *extra, *head]}; expected positive numbers")
        self.num_matrices = len(indices)
        self.num_factors = ends[-1]
        self.num_adapter = self.num_factors + sum(extra)
        self.num_total = self.num_adapter + sum(head)
        self.max_rank = max((group.rank for group in groups), default=0)
        self.others: list[tuple[int, int]] = []
        """(place, elements) of the parameters that are no factors, `extra` first."""
        for size in (*extra, *head):
            self.others.append((sum(self.others[-1]) if self.others else self.num_factors, size))
        self.num_units = self.num_matrices + len(self.others)
        self.num_blocks = self.num_matrices + num_named
        self._place = self._places()
        self._make_tasks(device)
        self._make_slices(device)
        self.index_K = [torch.tensor(group.indices, device=device) for group in groups]
        """The indices of each group."""
        placed = sorted(range(self.num_matrices), key=lambda i: indices[i])
        self._unit_order = torch.tensor([*placed, *range(self.num_matrices, self.num_units)], device=device)
        """Place of each unit where the matrices come group by group."""
        self.in_head_U = np.array([False] * self.num_matrices + [at >= self.num_adapter for at, _ in self.others])
        self._starts_P = np.array(sorted(at for own in self.unit_parts() for at, _ in own))
        places = [[bisect(self._starts_P, at) - 1 for at, _ in own] for own in self.unit_parts()]
        self._first_U = np.array([own[0] for own in places])
        self._second_K = np.array([own[1] for own in places[: self.num_matrices]], dtype=np.int64)
        self._unit_P = np.empty(len(self._starts_P), dtype=np.int64)
        for unit, own in enumerate(places):
            self._unit_P[own] = unit
        self._sizes_P = np.diff(self._starts_P, append=self.num_total)
        self.scale_K = torch.tensor([g.scale for g, _, _ in self._place], dtype=torch.float32, device=device)
        self.num_in_K = torch.tensor([g.num_in for g, _, _ in self._place], dtype=torch.float32, device=device)
        self.tickets = torch.zeros(2 + self.num_units, dtype=torch.int32, device=device)
        """How many programs of a running launch are done: of the penalty's, of a step's, of each unit's."""
        self.device = self.tickets.device

    def _places(self) -> list[tuple[MatrixGroup, int, int]]:
        """(group, place of A, place of B) of each matrix, in the model's order."""
        found = {}
        for group in self.groups:
            for i, k in enumerate(group.indices):
                a = group.start + i * group.rank * group.num_in
                found[k] = group, a, group.middle + i * group.rank * group.num_out
        return [found[k] for k in range(self.num_matrices)]

    def _make_tasks(self, device: torch.device | str) -> None:
        """Programs of the penalty: A of each matrix, B of each, slices of extra, of the head.

        Columns: place and number of elements, place of the other factor, rank, longer side, the other's longer side.
        """
        tasks = [[a, g.rank * g.num_in, b, g.rank, g.num_in, g.num_out] for g, a, b in self._place]
        tasks += [[b, g.rank * g.num_out, a, g.rank, g.num_out, g.num_in] for g, a, b in self._place]

        def slices(first: int, last: int) -> list[list[int]]:
            return [[at, min(NORM_SLICE, last - at), at, 0, 0, 0] for at in range(first, last, NORM_SLICE)]

        tasks += slices(self.num_factors, self.num_adapter)
        self.num_adapter_tasks = len(tasks)
        tasks += slices(self.num_adapter, self.num_total)
        self.tasks = torch.tensor(tasks, dtype=torch.int64, device=device).view(-1, TASK_COLUMNS)
        self.aligned_rows = all(task[3] % 4 == task[4] % 4 == 0 for task in tasks)
        """Ranks and longer sides are multiples of four."""

    def _make_slices(self, device: torch.device | str) -> None:
        """Programs of an optimizer step; those of one unit are neighbours."""
        slices: list[list[int]] = []
        units = []
        for unit, parts in enumerate(self.unit_parts()):
            first = len(slices)
            for start, size in parts:
                slices += [
                    [at, min(STEP_SLICE, start + size - at), unit, int(start >= self.num_adapter)]
                    for at in range(start, start + size, STEP_SLICE)
                ]
            units.append([first, len(slices) - first])
        self.slices = torch.tensor(slices, dtype=torch.int64, device=device).view(-1, SLICE_COLUMNS)
        """Columns: place, number of elements, unit, 1 for the head's."""
        self.units = torch.tensor(units, dtype=torch.int64, device=device).view(-1, 2)
        """First slice and number of slices of each unit."""
        self.aligned = all(start % 4 == 0 for start, *_ in slices)
        """Every parameter begins at a multiple of four elements: 16 bytes of fp32."""

    def unit_parts(self) -> list[list[tuple[int, int]]]:
        """(place, elements) of each unit's parameters."""
        matrices = [[(a, g.rank * g.num_in), (b, g.rank * g.num_out)] for g, a, b in self._place]
        return matrices + [[part] for part in self.others]

    def unit_sums(self, flat: torch.Tensor) -> torch.Tensor:
        """Sum over each unit's elements of flat tensors (..., num_total): (..., num_units). On a GPU a few operations a
        group and tensor."""
        if flat.device.type != "cpu":
            rows = [self._sums_by_group(row) for row in flat.reshape(-1, self.num_total)]
            return torch.stack(rows).view(*flat.shape[:-1], -1)
        sum_P = np.add.reduceat(flat.numpy(), self._starts_P, axis=-1)  # an operation each would cost more than reading
        sum_U = sum_P[..., self._first_U]
        sum_U[..., : self.num_matrices] += sum_P[..., self._second_K]
        return torch.from_numpy(sum_U)

    def _sums_by_group(self, flat: torch.Tensor) -> torch.Tensor:
        sums = [group.stack_a(flat).sum((1, 2)) + group.stack_b(flat).sum((1, 2)) for group in self.groups]
        if self.others:
            parts = flat[self.num_factors :].split([size for _, size in self.others])
            sums.append(torch.stack([part.sum() for part in parts]))
        return torch.cat(sums)[self._unit_order]

    def b_squares(self, flat: torch.Tensor) -> torch.Tensor:
        """Sum of the squares of each matrix's B, and of all elements of each other block: (num_blocks,)."""
        norms = [torch.linalg.vector_norm(group.stack_b(flat), dim=(1, 2)) for group in self.groups]
        named = self.others[: self.num_blocks - self.num_matrices]
        norms += [torch.linalg.vector_norm(flat[at : at + size])[None] for at, size in named]
        if not norms:
            return flat.new_empty(0)
        return torch.cat(norms)[self._unit_order[: self.num_blocks]].square()

    def spread(self, value_K: torch.Tensor, fill: float) -> torch.Tensor:
        """A value of each block at all of its elements, `fill` at all others: (num_total,)."""
        if value_K.is_cpu:
            value_U = np.full(self.num_units, fill, dtype=value_K.numpy().dtype)
            value_U[: self.num_blocks] = value_K.numpy()
            return torch.from_numpy(np.repeat(value_U[self._unit_P], self._sizes_P))
        out = value_K.new_full((self.num_total,), fill)
        for group, index_K in zip(self.groups, self.index_K):
            own_K = value_K[index_K][:, None, None]
            group.stack_a(out).copy_(own_K.expand(-1, group.rank, group.num_in))
            group.stack_b(out).copy_(own_K.expand(-1, group.num_out, group.rank))
        for value, (at, size) in zip(value_K[self.num_matrices :], self.others):
            out[at : at + size] = value
        return out

    def check(self, name: str, **tensors: torch.Tensor) -> None:
        """Raises ValueError, in the name of an operation, for tensors that are no flat buffers of this layout."""
        first = next(iter(tensors.values()))
        for argument, tensor in tensors.items():
            if tensor.shape != (self.num_total,) or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: {argument} has shape {tuple(tensor.shape)}; expected ({self.num_total},), contiguous"
                )
            if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != first.dtype:
                raise ValueError(f"{name}: {argument} is {tensor.dtype}; expected all buffers float32, or all float64")
            if tensor.device != self.device:
                raise ValueError(f"{name}: {argument} is on {tensor.device}; the layout is on {self.device}")
