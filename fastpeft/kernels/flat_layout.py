"""Layout of the trainable parameters in flat buffers, as tables that kernels read.

A buffer holds the adapted matrices first: for each shape all A, then all B. After them come the other adapter
parameters (`extra`), and last the parameters of the task head. Statistics are kept per `unit`: an adapted matrix (its
A and B), or one other parameter. The first units are `blocks`, which may have learning rates of their own: all
matrices, and the first `num_named` of `extra`.

Shape suffixes: K matrices or blocks, U units, P contiguous pieces of the buffer, I in, O out, R rank.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

NORM_SLICE = 32768
"""Most elements of `extra` or the head whose norm one program of the penalty kernel computes."""
STEP_SLICE = 4096
"""Most elements that one program of an optimizer step updates; a multiple of the kernel's block."""
TASK_COLUMNS, SLICE_COLUMNS = 6, 4


@dataclass(frozen=True)
class MatrixGroup:
    """Adapted matrices of one shape and one scale."""

    indices: tuple[int, ...]
    """Index of each matrix in the model's order."""
    rank: int
    num_in: int
    num_out: int
    scale: float
    """s, lora_alpha / rank: the update is s B A."""
    start: int
    """Offset of the first A in the buffers, in elements."""

    @property
    def middle(self) -> int:
        """Offset of the first B."""
        return self.start + len(self.indices) * self.rank * self.num_in

    @property
    def end(self) -> int:
        return self.middle + len(self.indices) * self.rank * self.num_out

    def stack_a(self, flat: torch.Tensor) -> torch.Tensor:
        """All A of the group, a view (matrices, R, I) of a flat buffer."""
        return flat[self.start : self.middle].view(-1, self.rank, self.num_in)

    def stack_b(self, flat: torch.Tensor) -> torch.Tensor:
        """All B of the group, a view (matrices, O, R) of a flat buffer."""
        return flat[self.middle : self.end].view(-1, self.num_out, self.rank)


class FlatLayout:
    """Offsets of all parameters, and the device tables made from them once.

    The tables include counters that every kernel resets to zero, so a layout must not be used on two streams at once.
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
        """(offset, elements) of the parameters that are not LoRA factors, `extra` first."""
        for size in (*extra, *head):
            self.others.append((sum(self.others[-1]) if self.others else self.num_factors, size))
        self.num_units = self.num_matrices + len(self.others)
        self.num_blocks = self.num_matrices + num_named
        self._place = self._places()
        self._make_tasks(device)
        self._make_slices(device)
        self.index_K = [torch.tensor(group.indices, device=device) for group in groups]
        """Per group, the indices of its matrices in the model's order."""
        placed = sorted(range(self.num_matrices), key=lambda i: indices[i])
        self._unit_order = torch.tensor([*placed, *range(self.num_matrices, self.num_units)], device=device)
        """Permutation from group order to unit order."""
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
        """Programs of a running launch that are done: of the penalty's launch, of a step's launch, and of each unit."""
        self.device = self.tickets.device

    def _places(self) -> list[tuple[MatrixGroup, int, int]]:
        """(group, offset of A, offset of B) of each matrix, in the model's order."""
        found = {}
        for group in self.groups:
            for i, k in enumerate(group.indices):
                a = group.start + i * group.rank * group.num_in
                found[k] = group, a, group.middle + i * group.rank * group.num_out
        return [found[k] for k in range(self.num_matrices)]

    def _make_tasks(self, device: torch.device | str) -> None:
        """One row per program of the penalty kernel: every A, every B, slices of `extra`, slices of the head.

        Columns: offset and number of elements, offset of the other factor, rank, I of A or O of B, and the same of the
        other factor.
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
        """Whether all ranks, and all I and O, are multiples of four."""

    def _make_slices(self, device: torch.device | str) -> None:
        """One row per program of an optimizer step; the rows of a unit are consecutive."""
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
        """Columns: offset, number of elements, unit, 1 for the head and 0 for the adapter."""
        self.units = torch.tensor(units, dtype=torch.int64, device=device).view(-1, 2)
        """Columns: first slice and number of slices of a unit."""
        self.aligned = all(start % 4 == 0 for start, *_ in slices)
        """Whether every slice starts at a multiple of four elements: 16 bytes of fp32."""

    def unit_parts(self) -> list[list[tuple[int, int]]]:
        """(offset, elements) of each unit's parameters."""
        matrices = [[(a, g.rank * g.num_in), (b, g.rank * g.num_out)] for g, a, b in self._place]
        return matrices + [[part] for part in self.others]

    def unit_sums(self, flat: torch.Tensor) -> torch.Tensor:
        """(..., num_units): sums over the elements of each unit, from flat tensors (..., num_total)."""
        if flat.device.type != "cpu":
            rows = [self._sums_by_group(row) for row in flat.reshape(-1, self.num_total)]
            return torch.stack(rows).view(*flat.shape[:-1], -1)
        sum_P = np.add.reduceat(flat.numpy(), self._starts_P, axis=-1)  # a call per unit would cost more than the sums
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
        """(num_blocks,): the sum of squares of each matrix's B, and of all elements of each other block."""
        norms = [torch.linalg.vector_norm(group.stack_b(flat), dim=(1, 2)) for group in self.groups]
        named = self.others[: self.num_blocks - self.num_matrices]
        norms += [torch.linalg.vector_norm(flat[at : at + size])[None] for at, size in named]
        if not norms:
            return flat.new_empty(0)
        return torch.cat(norms)[self._unit_order[: self.num_blocks]].square()

    def spread(self, value_K: torch.Tensor, fill: float) -> torch.Tensor:
        """(num_total,): each block's value at all of its elements, `fill` at all other elements."""
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
        """Raise ValueError, with the operation's name, if a tensor is not a flat buffer of this layout."""
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
