"""Losses, statistics and gradients of rows of logits, in PyTorch or by one Triton program per row.

Shape suffixes: C rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastpeft.kernels.dispatch import Config, choose, runs_triton
from fastpeft.kernels.launch import launch

CONFIGS = tuple(Config(1, block, 1, warps, 1) for block, warps in ((2048, 4), (4096, 8), (8192, 8), (8192, 16)))
"""The tuner's candidates: columns per iteration of a program (block_n), and its warps. More columns spill registers."""


@dataclass(frozen=True)
class Options:
    name: str
    """Name of the operation, for error messages."""
    ignore_index: int
    label_smoothing: float
    reduction: str
    num_items: float | torch.Tensor | None
    statistics: bool

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"{self.name}: reduction is {self.reduction!r}; expected 'mean' or 'sum'")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"{self.name}: label_smoothing is {self.label_smoothing}; expected 0 to 1")
        if isinstance(self.num_items, torch.Tensor):
            if self.num_items.ndim:
                raise ValueError(f"{self.name}: num_items has shape {tuple(self.num_items.shape)}; expected ()")
        elif self.num_items is not None and not (isinstance(self.num_items, int | float) and self.num_items > 0):
            raise ValueError(f"{self.name}: num_items is {self.num_items!r}; expected a positive number")


@dataclass(frozen=True)
class PerRow:
    """Results of each row; the statistics are None unless requested."""

    loss_C: torch.Tensor
    fisher_C: torch.Tensor | None
    entropy_C: torch.Tensor | None

    @classmethod
    def empty(cls, num_rows: int, logits: torch.Tensor, statistics: bool) -> PerRow:
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss, fisher, entropy = torch.empty(3, num_rows, dtype=wide, device=logits.device).unbind()
        return cls(loss, fisher, entropy) if statistics else cls(loss, None, None)

    def __getitem__(self, where: slice) -> PerRow:
        fisher_C, entropy_C = (None if v is None else v[where] for v in (self.fisher_C, self.entropy_C))
        return PerRow(self.loss_C[where], fisher_C, entropy_C)


def compute_rows(
    logits_CV: torch.Tensor,
    gradient_CV: torch.Tensor | None,
    labels_C: torch.Tensor,
    weights_C: torch.Tensor | None,
    num_labelled: int,
    options: Options,
    out: PerRow,
) -> None:
    """Fill `out`, and `gradient_CV` with weight * (p - target); `gradient_CV` may be logits_CV itself.

    Rows from num_labelled on have no label, so that only their entropy is computed. Rows with an ignored label get 0.
    """
    if not len(logits_CV):
        return
    if runs_triton(logits_CV):
        _triton(logits_CV, gradient_CV, labels_C, weights_C, num_labelled, options, out)
    else:
        _pytorch(logits_CV, gradient_CV, labels_C, weights_C, num_labelled, options, out)


# ---- PyTorch ---------------------------------------------------------------------------------


def _pytorch(
    logits_CV: torch.Tensor,
    gradient_CV: torch.Tensor | None,
    labels_C: torch.Tensor,
    weights_C: torch.Tensor | None,
    num_labelled: int,
    options: Options,
    out: PerRow,
) -> None:
    wide, smoothing = out.loss_C.dtype, options.label_smoothing
    labels_L = labels_C[:num_labelled]
    ignored_L = labels_L == options.ignore_index
    labels_L1 = labels_L.masked_fill(ignored_L, 0)[:, None]
    log_p_CV = torch.log_softmax(logits_CV, 1, dtype=wide)
    label_log_p_L1 = log_p_CV[:num_labelled].gather(1, labels_L1)
    losses_L = -label_log_p_L1[:, 0]
    if smoothing:
        losses_L = (1 - smoothing) * losses_L - smoothing * log_p_CV[:num_labelled].mean(1)
    if weights_C is not None:
        losses_L = losses_L * weights_C[:num_labelled]
    out.loss_C.zero_()[:num_labelled] = losses_L.masked_fill(ignored_L, 0)
    if gradient_CV is None and not options.statistics:
        return
    in_place = gradient_CV is not None and gradient_CV.dtype == wide
    p_CV = torch.exp(log_p_CV, out=gradient_CV) if in_place else log_p_CV.exp()
    if out.entropy_C is not None:
        log_p_CV.clamp_(min=torch.finfo(wide).min).mul_(p_CV)  # clamped: 0 times -inf is NaN
        out.entropy_C.copy_(-log_p_CV.sum(1))[:num_labelled].masked_fill_(ignored_L, 0)
    g_LV = p_CV[:num_labelled]  # p - onehot; expm1 has more correct digits than p - 1
    g_LV.scatter_(1, labels_L1, label_log_p_L1.expm1())
    if out.fisher_C is not None:
        squares_LV = torch.mul(g_LV, g_LV, out=log_p_CV[:num_labelled])  # pairwise sum; a dot product loses digits
        out.fisher_C.zero_()[:num_labelled] = squares_LV.sum(1).masked_fill(ignored_L, 0)
    if gradient_CV is None:
        return
    if smoothing:
        g_LV.sub_(smoothing / g_LV.shape[1])
        g_LV.scatter_add_(1, labels_L1, torch.full_like(label_log_p_L1, smoothing))
    if weights_C is not None:
        g_LV.mul_(weights_C[:num_labelled, None])
    if not g_LV.is_cpu or bool(ignored_L.any()):
        g_LV.masked_fill_(ignored_L[:, None], 0)
    if not in_place:
        gradient_CV.copy_(p_CV)


# ---- Triton ----------------------------------------------------------------------------------


def config_for(vocab: int) -> Config:
    block = min(8192, max(16, 1 << (vocab - 1).bit_length()))
    return Config(1, block, 1, 1 if block <= 512 else 4 if block <= 2048 else 8, 1)


def _triton(
    logits_CV: torch.Tensor,
    gradient_CV: torch.Tensor | None,
    labels_C: torch.Tensor,
    weights_C: torch.Tensor | None,
    num_labelled: int,
    options: Options,
    out: PerRow,
) -> None:
    from fastpeft.kernels.ops.linear_cross_entropy.kernel import cross_entropy_row

    num_rows, vocab = logits_CV.shape
    target_CV = logits_CV if gradient_CV is None else gradient_CV
    config = choose("cross_entropy", logits_CV, 0, vocab, 0, num_rows).config or config_for(vocab)
    # In a padded buffer the columns after `vocab` may be overwritten, so that whole vectors can be stored.
    owned = gradient_CV is None or gradient_CV.data_ptr() == logits_CV.data_ptr()
    width = logits_CV.stride(0) if owned and 0 <= logits_CV.stride(0) - vocab < 16 else vocab
    launch(
        cross_entropy_row, (num_rows,),
        logits_CV, target_CV, labels_C, out.loss_C if weights_C is None else weights_C, out.loss_C,
        out.loss_C if out.fisher_C is None else out.fisher_C,
        out.loss_C if out.entropy_C is None else out.entropy_C,
        num_labelled, vocab, width, logits_CV.stride(0), target_CV.stride(0),
        options.ignore_index, float(options.label_smoothing),
        HAS_WEIGHT=weights_C is not None, GRADIENT=gradient_CV is not None, STATISTICS=options.statistics,
        SMOOTHING=options.label_smoothing > 0, BLOCK_V=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip
