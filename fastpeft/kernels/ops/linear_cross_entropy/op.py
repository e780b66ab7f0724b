"""Cross entropy with its gradient computed in the forward pass, through a frozen head or from given logits.

The logits of the head exist for one chunk of rows at a time, and for labelled rows only where those are known. Each
chunk yields losses and statistics, and is overwritten by its gradient, which is multiplied by the head's weight at
once. On a CPU the logits exist for one tile of a chunk at a time: see tiles.py.

Shape suffixes: T tokens, L labelled tokens, M lens tokens, C rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastpeft.kernels.dispatch import runs_triton
from fastpeft.kernels.launch import refuse_second_order
from fastpeft.kernels.ops.linear_cross_entropy import tiles
from fastpeft.kernels.ops.linear_cross_entropy.arguments import check_classes, check_head, check_labels
from fastpeft.kernels.ops.linear_cross_entropy.per_row import Options, PerRow, compute_rows

CHUNK_BYTES = 2 * 2**30
"""Memory of one chunk's logits on a GPU: 7,000 rows of 150,000 classes in bf16."""


class CrossEntropy(NamedTuple):
    """Result of the cross entropies. Only the loss carries a gradient. The other fields are None unless requested."""

    loss: torch.Tensor
    """Scalar, fp32 (fp64 for fp64), nats."""
    fisher: torch.Tensor | None
    """||softmax(z) - onehot(y)||^2 of each token, in the shape of the labels; 0 without a label. It is the squared norm
    of the unsmoothed loss's gradient by the logits. Its mean estimates the trace of their Fisher information."""
    entropy: torch.Tensor | None
    """Entropy of softmax(z) of each token, in nats, in the shape of the labels; 0 without a label."""
    lens_entropy: torch.Tensor | None = None
    """(M,), entropy of softmax(z) of each row of lens_hidden, in nats."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    rows: torch.Tensor | None = None,
    ignore_index: int = -100,
    token_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
    statistics: bool = False,
    lens_hidden: torch.Tensor | None = None,
    chunk_rows: int | None = None,
) -> CrossEntropy:
    """Cross entropy of softmax(hidden W^T + bias) through a frozen head, never storing the T x V logits.

    Chunking and the gradient in the forward pass follow Liger-Kernel (arXiv:2410.10989, section 3.2). Here the head
    gets no gradient, rows without a label can be left out, and the statistics come from the same pass over the logits.
    The host never waits for a GPU. With half precision input, logits and their gradient are rounded to half precision;
    everything between them is computed in fp32.

    Args:
        hidden: (..., D), bf16, fp16, fp32 or fp64.
        weight: (V, D), frozen, in hidden's dtype. For a trained head use logits_cross_entropy on its output.
        labels: (...), int64 classes, or ignore_index. Any other value raises on a CPU; on a GPU the loss is NaN.
        bias: (V,), frozen, added to the logits, or None.
        rows: (L,), int64, distinct indices of the labelled tokens among the flattened tokens. A GPU then computes these
            rows only; without `rows` it computes all, because finding them would stall the host. A CPU finds them.
        token_weights: (...), floating, a factor on each token's loss, or None. Gets no gradient.
        label_smoothing: s, as torch's: the target is 1 - s at the label, plus s / V everywhere.
        reduction: `sum` of the weighted losses; or `mean`, that sum divided by num_items, or by the sum of the
            labelled tokens' weights. Without any labelled token both are 0 with a gradient of 0 (torch's mean: NaN).
        num_items: the divisor of `mean`, so that micro-batches add up to the mean of their batch.
        statistics: also return `fisher` and `entropy`.
        lens_hidden: (M, D), other hidden states, for which `lens_entropy` is returned (a logit lens).
        chunk_rows: rows per chunk; the default is what fits into CHUNK_BYTES, and on a CPU tiles.ROWS.

    Returns:
        CrossEntropy(loss, fisher, entropy, lens_entropy).

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; a head that requires a gradient.
    """
    options = Options(
        "linear_cross_entropy",
        ignore_index,
        label_smoothing,
        reduction,
        num_items,
        statistics or lens_hidden is not None,
    )
    check_head(options, hidden, weight, bias, rows, lens_hidden, chunk_rows)
    check_labels(options, "hidden", hidden, labels, token_weights)
    labels_T = labels.reshape(-1)
    if hidden.is_cpu:
        check_classes(options, labels_T, len(weight))
        if rows is None and bool((labels_T == ignore_index).any()):
            rows = (labels_T != ignore_index).nonzero()[:, 0]
    labels_L = _take(labels_T, rows)
    weights_L = None if token_weights is None else _take(token_weights.reshape(-1), rows)
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    with torch.no_grad():
        hidden_TD = hidden.reshape(len(labels_T), hidden.shape[-1])
        head = _Head(weight, bias, options, wants_gradient, chunk_rows)
        found, gradient_LD = head.run(hidden_TD, rows, lens_hidden, labels_L, weights_L)
        labelled = found[: len(labels_L)]
        loss, scale = _reduce(labelled.loss_C, labels_L, weights_L, options)
    if wants_gradient:
        loss = _Precomputed.apply(hidden, (loss, gradient_LD, rows, scale))
    fisher, entropy = (_put(v, rows, labels) if statistics else None for v in (labelled.fisher_C, labelled.entropy_C))
    lens_entropy = None
    if lens_hidden is not None:
        assert found.entropy_C is not None, "options ask for statistics"
        lens_entropy = found.entropy_C[len(labels_L) :]
    return CrossEntropy(loss, fisher, entropy, lens_entropy)


def logits_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    token_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
    statistics: bool = False,
) -> CrossEntropy:
    """As linear_cross_entropy, of given logits: for classification and for a trained head.

    Args:
        logits: (..., V), bf16, fp16, fp32 or fp64; not changed.
        labels, ignore_index, token_weights, label_smoothing, reduction, num_items, statistics: as there.

    Returns:
        CrossEntropy(loss, fisher, entropy).

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
    """
    options = Options("logits_cross_entropy", ignore_index, label_smoothing, reduction, num_items, statistics)
    check_labels(options, "logits", logits, labels, token_weights)
    labels_T = labels.reshape(-1)
    if logits.is_cpu:
        check_classes(options, labels_T, logits.shape[-1])
    weights_T = None if token_weights is None else token_weights.reshape(-1).contiguous()
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    with torch.no_grad():
        logits_TV = logits.reshape(len(labels_T), logits.shape[-1]).contiguous()
        gradient_TV = torch.empty_like(logits_TV) if wants_gradient else None
        found = PerRow.empty(len(labels_T), logits_TV, statistics)
        compute_rows(logits_TV, gradient_TV, labels_T.contiguous(), weights_T, len(labels_T), options, found)
        loss, scale = _reduce(found.loss_C, labels_T, weights_T, options)
    if wants_gradient:
        loss = _Precomputed.apply(logits, (loss, gradient_TV, None, scale))
    return CrossEntropy(loss, _put(found.fisher_C, None, labels), _put(found.entropy_C, None, labels))


# ---- the head --------------------------------------------------------------------------------


class _Head:
    """The product of hidden states with the head and the loss of its logits, chunk by chunk."""

    def __init__(
        self,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        options: Options,
        wants_gradient: bool,
        chunk_rows: int | None,
    ) -> None:
        self.weight_VD, self.bias_V, self.options = weight_VD, bias_V, options
        self.wants_gradient, self.chunk_rows = wants_gradient, chunk_rows
        self._buffer_CV: torch.Tensor | None = None

    def run(
        self,
        hidden_TD: torch.Tensor,
        rows: torch.Tensor | None,
        lens_MD: torch.Tensor | None,
        labels_L: torch.Tensor,
        weights_L: torch.Tensor | None,
    ) -> tuple[PerRow, torch.Tensor | None]:
        """Results of all labelled rows followed by all lens rows; the gradient of the labelled rows."""
        num_labelled = len(labels_L)
        num_rows = num_labelled + (0 if lens_MD is None else len(lens_MD))
        chunk = min(num_rows, self.chunk_rows or self._rows_that_fit(num_rows))
        found = PerRow.empty(num_rows, hidden_TD, self.options.statistics)
        gradient_LD = hidden_TD.new_empty(num_labelled, hidden_TD.shape[1]) if self.wants_gradient else None
        if num_rows > num_labelled:
            labels_L = torch.cat([labels_L, labels_L.new_full((num_rows - num_labelled,), self.options.ignore_index)])
        read = self._read_tiles if self._in_tiles else self._read_chunk
        for start in range(0, num_rows, chunk or 1):
            stop = min(start + chunk, num_rows)
            rows_CD = _rows_of(hidden_TD, rows, lens_MD, num_labelled, start, stop)
            here = max(0, min(stop, num_labelled) - start)
            weights_C = None if weights_L is None else weights_L[start:stop]
            gradient_CD = None if gradient_LD is None else gradient_LD[start : start + here]
            read(rows_CD, labels_L[start:stop], weights_C, here, found[start:stop], gradient_CD)
        return found, gradient_LD

    @property
    def _in_tiles(self) -> bool:
        return self.weight_VD.is_cpu and not runs_triton(self.weight_VD)

    def _read_tiles(
        self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, weights_C: torch.Tensor | None, num_labelled: int,
        found: PerRow, gradient_CD: torch.Tensor | None,
    ) -> None:  # fmt: skip
        head = tiles.Head(self.weight_VD, self.bias_V)
        wide = found.loss_C.dtype
        chunk = tiles.Chunk(hidden_CD, labels_C, num_labelled, head, self.options, self.wants_gradient, wide)
        chunk.read()
        chunk.finish(weights_C, found, gradient_CD)

    def _read_chunk(
        self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, weights_C: torch.Tensor | None, num_labelled: int,
        found: PerRow, gradient_CD: torch.Tensor | None,
    ) -> None:  # fmt: skip
        logits_CV = self._logits(hidden_CD)
        destination_CV = logits_CV if self.wants_gradient else None
        compute_rows(logits_CV, destination_CV, labels_C, weights_C, num_labelled, self.options, found)
        if gradient_CD is not None and num_labelled:
            torch.mm(logits_CV[:num_labelled], self.weight_VD, out=gradient_CD)

    def _logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Logits of a chunk, in a buffer that all chunks share."""
        vocab = len(self.weight_VD)
        if self._buffer_CV is None:  # the first chunk is the largest; rows begin at multiples of 32 bytes for Triton
            width = -(-vocab // 16) * 16 if runs_triton(hidden_CD) else vocab
            self._buffer_CV = hidden_CD.new_empty(len(hidden_CD), width)[:, :vocab]
        logits_CV = self._buffer_CV[: len(hidden_CD)]
        if self.bias_V is None:
            return torch.mm(hidden_CD, self.weight_VD.t(), out=logits_CV)
        return torch.addmm(self.bias_V, hidden_CD, self.weight_VD.t(), out=logits_CV)

    def _rows_that_fit(self, num_rows: int) -> int:
        """Rows per chunk, at least 1: chunks of nearly equal size, rounded up to a multiple of 128 where that fits."""
        fit = CHUNK_BYTES // self.weight_VD.dtype.itemsize // max(1, len(self.weight_VD))
        fit = tiles.ROWS if self._in_tiles else max(1, fit)
        even = -(-num_rows // max(1, -(-num_rows // fit)))
        return min(fit, -(-even // 128) * 128)


def _rows_of(
    hidden_TD: torch.Tensor,
    rows: torch.Tensor | None,
    lens_MD: torch.Tensor | None,
    num_labelled: int,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Rows start to stop of the labelled rows followed by the lens rows."""
    parts = []
    if start < num_labelled:
        end = min(stop, num_labelled)
        parts.append(hidden_TD[start:end] if rows is None else hidden_TD.index_select(0, rows[start:end]))
    if lens_MD is not None and stop > num_labelled:
        parts.append(lens_MD[max(0, start - num_labelled) : stop - num_labelled])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# ---- from rows to the result -----------------------------------------------------------------


def _take(values_T: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return values_T.contiguous() if rows is None else values_T.index_select(0, rows)


def _put(values_L: torch.Tensor | None, rows: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor | None:
    """The values in the shape of the labels, 0 at tokens outside of `rows`."""
    if values_L is None or rows is None:
        return None if values_L is None else values_L.view(labels.shape)
    return values_L.new_zeros(labels.numel()).index_copy_(0, rows, values_L).view(labels.shape)


def _reduce(
    losses_L: torch.Tensor, labels_L: torch.Tensor, weights_L: torch.Tensor | None, options: Options
) -> tuple[torch.Tensor, float | torch.Tensor]:
    """(loss, the factor on the sum of losses that gives it)."""
    total = losses_L.sum()
    if options.reduction == "sum":
        return total, 1.0
    divisor = options.num_items
    if divisor is None:
        labelled_L = labels_L != options.ignore_index
        divisor = labelled_L.sum() if weights_L is None else weights_L.to(total.dtype).mul(labelled_L).sum()
    elif not isinstance(divisor, torch.Tensor):
        return total / divisor, 1.0 / divisor
    divisor = divisor.to(total.dtype)
    scale = torch.where(divisor == 0, 0.0, divisor.reciprocal())
    return total * scale, scale


class _Precomputed(torch.autograd.Function):
    """A loss whose gradient by its source is already computed, up to a factor."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, made: tuple) -> torch.Tensor:
        loss, gradient_LD, rows, ctx.scale = made
        ctx.save_for_backward(gradient_LD, rows)
        ctx.shape = source.shape
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (dloss,) = grad_outputs
        refuse_second_order("cross entropy")
        gradient_LD, rows = ctx.saved_tensors
        # In fp32: in half precision a factor such as 1 / num_items would lose digits or underflow.
        scaled_LD = (gradient_LD.to(dloss.dtype) * (dloss * ctx.scale)).to(gradient_LD.dtype)
        if rows is None:
            return scaled_LD.view(ctx.shape), None
        dsource = gradient_LD.new_zeros(ctx.shape).view(-1, gradient_LD.shape[1])
        return dsource.index_copy_(0, rows, scaled_LD).view(ctx.shape), None
