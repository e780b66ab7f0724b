"""A frozen head's cross entropy on a CPU, in one pass over the head.

The gradient by a hidden state, sum_v p_v W_v - W_label, has the form of attention to the rows of the head. It is summed
block by block, and rescaled when a later block holds a larger logit (arXiv:2205.14135, algorithm 1). So every logit is
computed once and stays in the cache, and a block of the head is read from memory once for both products.

Shape suffixes: C rows of a chunk, L labelled rows of a chunk, B columns of a block, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastpeft.kernels.ops.linear_cross_entropy.per_row import Options, PerRow

ROWS = 512
"""Most rows of a chunk."""
LOGITS_BYTES, HEAD_BYTES = 4 * 2**20, 4 * 2**20
"""Memory of a tile of logits, and of the block of the head that it is computed from: together they fit into a cache."""
_SMALLEST = 64
"""Fewest columns of a block."""


@dataclass(frozen=True)
class Head:
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None

    def columns(self, num_rows: int) -> int:
        """Columns per block, for a chunk of `num_rows` rows."""
        vocab, width = self.weight_VD.shape
        wide = torch.promote_types(self.weight_VD.dtype, torch.float32).itemsize
        fit = min(
            LOGITS_BYTES // (wide * max(1, num_rows)), HEAD_BYTES // (self.weight_VD.dtype.itemsize * max(1, width))
        )
        return min(vocab, max(_SMALLEST, fit // _SMALLEST * _SMALLEST))


class Chunk:
    """Rows of hidden states, and the running sums of their losses over blocks of the vocabulary.

    Logits and their gradient are rounded to the dtype of `hidden_CD`; everything between them is computed in `wide`.
    """

    def __init__(
        self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, num_labelled: int, head: Head, options: Options,
        wants_gradient: bool, wide: torch.dtype,
    ) -> None:  # fmt: skip
        """Rows from num_labelled on have no label."""
        self.hidden_CD, self.head, self.options, self.wide = hidden_CD, head, options, wide
        self.num_labelled = num_labelled
        num_rows, lowest = len(hidden_CD), torch.finfo(wide).min
        self.has_label_C = labels_C != options.ignore_index
        self.has_label_C[num_labelled:] = False
        self.labels_C = labels_C.masked_fill(~self.has_label_C, -1)
        self.label_logit_C = hidden_CD.new_full((num_rows,), -float("inf"), dtype=wide)
        self.top_C = hidden_CD.new_full((num_rows,), lowest, dtype=wide)
        zeros = hidden_CD.new_zeros(4, num_rows, dtype=wide)
        self.rest_C, self.squares_C, self.moment_C, self.total_logit_C = zeros.unbind()
        """Sums of e, e^2 and e log e over all columns but the label's, e = exp(z - top); and the sum of all z."""
        self.sum_LD = hidden_CD.new_zeros(num_labelled, hidden_CD.shape[1], dtype=wide) if wants_gradient else None
        """Sum of e W over all columns but the label's."""

    def read(self) -> None:
        """Process all blocks of the head."""
        num_rows, vocab = len(self.hidden_CD), len(self.head.weight_VD)
        columns = self.head.columns(num_rows)
        size = num_rows * columns
        logits = self.hidden_CD.new_empty(size)
        is_half = self.hidden_CD.dtype != self.wide
        widened = logits.new_empty(size, dtype=self.wide) if is_half else logits
        more = widened.new_empty(size) if self.options.statistics else widened
        for start in range(0, vocab, columns):
            shape = num_rows, min(columns, vocab - start)
            tiles = (tile[: shape[0] * shape[1]].view(shape) for tile in (logits, widened, more))
            self._read_block(start, *tiles)

    def _read_block(self, start: int, logits_CB: torch.Tensor, z_CB: torch.Tensor, more_CB: torch.Tensor) -> None:
        """Process one block. With statistics `more_CB` is a second tile, else it is z_CB."""
        stop = start + logits_CB.shape[1]
        weight_BD, bias_V = self.head.weight_VD[start:stop], self.head.bias_V
        if bias_V is None:
            torch.mm(self.hidden_CD, weight_BD.t(), out=logits_CB)
        else:
            torch.addmm(bias_V[start:stop], self.hidden_CD, weight_BD.t(), out=logits_CB)
        if z_CB.dtype != logits_CB.dtype:
            z_CB.copy_(logits_CB)
        if self.options.label_smoothing:
            self.total_logit_C += z_CB.sum(1)
        self._take_labels(start, stop, z_CB)
        top_C = torch.maximum(self.top_C, z_CB.amax(1))
        step_C, self.top_C = self.top_C - top_C, top_C
        shrink_C = step_C.exp()
        z_CB.sub_(top_C[:, None])
        if self.options.statistics:
            self.moment_C.addcmul_(step_C, self.rest_C).mul_(shrink_C)
            self.squares_C.mul_(shrink_C.square())
            e_CB = torch.exp(z_CB, out=more_CB)
            z_CB.clamp_(min=torch.finfo(self.wide).min)  # 0 times -inf is NaN
            self.moment_C += z_CB.mul_(e_CB).sum(1)
            self.squares_C += torch.mul(e_CB, e_CB, out=z_CB).sum(1)  # pairwise sum; a dot product loses digits
        else:
            e_CB = z_CB.exp_()
        self.rest_C.mul_(shrink_C).add_(e_CB.sum(1))
        if self.sum_LD is not None and self.num_labelled:
            self._add(shrink_C, e_CB, logits_CB, weight_BD)

    def _take_labels(self, start: int, stop: int, z_CB: torch.Tensor) -> None:
        """Move this block's label logits out of the sums: 1 - p, summed without them, is exact for p near 1."""
        rows = ((self.labels_C >= start) & (self.labels_C < stop)).nonzero()[:, 0]
        if len(rows):
            columns = self.labels_C[rows] - start
            self.label_logit_C[rows] = z_CB[rows, columns]
            z_CB[rows, columns] = -float("inf")

    def _add(
        self, shrink_C: torch.Tensor, e_CB: torch.Tensor, logits_CB: torch.Tensor, weight_BD: torch.Tensor
    ) -> None:
        assert self.sum_LD is not None
        labelled = slice(self.num_labelled)
        self.sum_LD.mul_(shrink_C[labelled, None])
        if e_CB.dtype == weight_BD.dtype:
            self.sum_LD.addmm_(e_CB[labelled], weight_BD)
        else:
            self.sum_LD += logits_CB[labelled].copy_(e_CB[labelled]) @ weight_BD

    def finish(self, weights_L: torch.Tensor | None, out: PerRow, gradient_LD: torch.Tensor | None) -> None:
        """Fill `out` and `gradient_LD`."""
        top_C = torch.maximum(self.top_C, self.label_logit_C)
        step_C = self.top_C - top_C
        shrink_C = step_C.exp()
        above_C = self.label_logit_C - top_C
        label_C = above_C.exp()
        rest_C = self.rest_C * shrink_C
        total_C = rest_C + label_C
        ignored_C = ~self.has_label_C
        log_total_C = total_C.log()
        losses_C = log_total_C - above_C
        smoothing, vocab = self.options.label_smoothing, len(self.head.weight_VD)
        if smoothing:
            mean_C = log_total_C + top_C - self.total_logit_C / vocab
            losses_C = (1 - smoothing) * losses_C + smoothing * mean_C
        if weights_L is not None:
            losses_C[: self.num_labelled] *= weights_L
        out.loss_C.copy_(losses_C.masked_fill_(ignored_C, 0))
        if out.entropy_C is not None and out.fisher_C is not None:
            moment_C = torch.addcmul(self.moment_C, step_C, self.rest_C).mul_(shrink_C)
            moment_C += label_C * above_C.clamp(min=torch.finfo(self.wide).min)
            out.entropy_C.copy_(log_total_C - moment_C / total_C)[: self.num_labelled].masked_fill_(
                ignored_C[: self.num_labelled], 0
            )
            squares_C = self.squares_C * shrink_C.square() + rest_C.square()
            out.fisher_C.copy_((squares_C / total_C.square()).masked_fill_(ignored_C, 0))
        if gradient_LD is not None and self.num_labelled:
            self._gradient(shrink_C / total_C, rest_C / total_C, weights_L, gradient_LD)

    def _gradient(
        self, factor_C: torch.Tensor, miss_C: torch.Tensor, weights_L: torch.Tensor | None, out_LD: torch.Tensor
    ) -> None:
        """Fill `out_LD`. `factor_C` times e is a probability, and `miss_C` is 1 - p of the label."""
        assert self.sum_LD is not None
        labelled, smoothing = slice(self.num_labelled), self.options.label_smoothing
        g_LD = self.sum_LD.mul_(factor_C[labelled, None])
        own_LD = self.head.weight_VD.index_select(0, self.labels_C[labelled].clamp(min=0)).to(self.wide)
        g_LD.addcmul_(own_LD, (smoothing - miss_C[labelled])[:, None])
        if smoothing:
            g_LD.sub_(smoothing * self.head.weight_VD.mean(0, dtype=self.wide))
        if weights_L is not None:
            g_LD.mul_(weights_L[:, None])
        if not bool(self.has_label_C[labelled].all()):
            g_LD.masked_fill_(~self.has_label_C[labelled, None], 0)
        out_LD.copy_(g_LD)
