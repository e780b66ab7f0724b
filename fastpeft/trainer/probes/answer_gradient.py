"""||dL/dB_k||^2 over the labelled tokens, measured by the layers during the step's own backward pass.

Shape suffixes: K adapted matrices, N rows of a micro-batch, L tokens of a row, T = N L.
"""

from __future__ import annotations

import torch

from fastpeft.adapters import Adapter
from fastpeft.adapters.blocks import low_rank_first
from fastpeft.data.batches import Batch
from fastpeft.errors import UserError
from fastpeft.models.layers import RowMask, Watch, is_fused, never_plain
from fastpeft.ranks import ALONE, Ranks


class AnswerGradient:
    """Asks the adapted layers for their gradients over the labelled positions, micro-batch by micro-batch.

    dB is a sum over tokens, and each layer measures the squared norm of the labelled tokens' part. That is exact for a
    batch of one micro-batch. For several micro-batches m, ||sum_m dB_m||^2 has cross terms that no layer sees. Then

        sum_m ||dB_m,labelled||^2 * ||sum_m dB_m||^2 / sum_m ||dB_m||^2

    is reported. It assumes that cross terms have the same proportion as in the whole gradient, where all three norms
    are known. It is exact too if the labelled part is the same share of each micro-batch's gradient.

    In classification, labels belong to rows and not to tokens. Every token counts, the whole gradient's norms are
    reported, exact for any micro-batches, and no layer measures anything. So classification allows blocks of any kind;
    labelled tokens need blocks of low rank.
    """

    def __init__(self, adapter: Adapter, ranks: Ranks = ALONE) -> None:
        self._flat, self._ranks = adapter.flat, ranks
        self._blocks, self._others = low_rank_first(adapter.blocks)
        self._rows = RowMask()
        self._watches = [Watch(self._rows) for _ in self._blocks]
        for block, watch in zip(self._blocks, self._watches):
            block.module.watch = watch
        self._parts: list[torch.Tensor] = []

    def start(self) -> None:
        """Called before the passes over a batch."""
        self._rows.mask_T = None
        self._parts = []

    def before_pass(self, batch: Batch) -> None:
        if batch.rows is not None:
            self._rows.mask_T = torch.zeros_like(batch.labels, dtype=torch.bool).flatten()
            self._rows.mask_T[batch.rows] = True

    def after_pass(self) -> None:
        """Called after the backward pass over a micro-batch. Raises UserError for layers that cannot measure it."""
        if self._rows.mask_T is None:
            return
        self._rows.mask_T = None
        if self._others:
            raise UserError(_not_measured(self._others[0].name, "it is not adapted by a low-rank product"))
        found = [(watch.measures.db_square_masked, watch.measures.db_square) for watch in self._watches]
        for block, watch, (square, _) in zip(self._blocks, self._watches, found):
            if square is None:
                raise UserError(_not_measured(block.name, _why(block.module)))
            watch.measures.db_square_masked = watch.measures.db_square = None
        if found:
            self._parts.append(torch.stack([torch.stack(column) for column in zip(*found)]))

    def squares(self, loss_scale: torch.Tensor | None) -> torch.Tensor:
        """(K,), ||dL/dB_k||^2 of the batch whose gradient, already divided by `loss_scale`, is in the flat buffer."""
        is_alone = self._ranks.size == 1
        if len(self._parts) == 1 and is_alone:
            square_K = self._parts[0][0]
            return square_K if loss_scale is None else square_K / loss_scale.square()
        square_K = self._flat.layout.b_squares(self._flat.grad)
        if not is_alone:
            return square_K * self._share_of_ranks()
        if not self._parts:
            return square_K
        labelled_K, all_K = torch.stack(self._parts).sum(0)
        return square_K * (labelled_K / all_K.clamp_min(torch.finfo(all_K.dtype).tiny))

    def _share_of_ranks(self) -> torch.Tensor:
        """(K,), the labelled tokens' share over all micro-batches of all ranks; 1 where nothing was measured."""
        parts = torch.stack(self._parts) if self._parts else self._flat.grad.new_zeros(1, 2, len(self._watches))
        sums = parts.sum(0)
        self._ranks.add_up(sums)
        labelled_K, all_K = sums
        return torch.where(all_K > 0, labelled_K / all_K.clamp_min(torch.finfo(all_K.dtype).tiny), 1.0)


def _why(layer: torch.nn.Module) -> str:
    reason = None if is_fused(layer) else never_plain(layer)
    return reason or "PEFT computes it, as where a base layer has hooks"


def _not_measured(name: str, reason: str) -> str:
    return (
        f"the schedule reads the gradient of the labelled tokens, which the layer {name} cannot tell: {reason}. Choose "
        "another schedule"
    )
