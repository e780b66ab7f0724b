"""The specification of linear_cross_entropy and logits_cross_entropy: plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch
from torch.nn import functional


def cross_entropy_reference(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    ignore_index: int = -100,
    token_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, ||p - onehot(y)||^2 of each token, entropy of each token in nats); 0 where the label is ignored."""
    labelled_T = labels_T != ignore_index
    weights_T = labelled_T.to(logits_TV.dtype) * (1 if token_weights is None else token_weights)
    losses_T = functional.cross_entropy(
        logits_TV, labels_T, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    loss = torch.where(labelled_T, losses_T * weights_T, 0).sum()
    if reduction == "mean":
        divisor = weights_T.sum() if num_items is None else num_items
        loss = loss / divisor if divisor > 0 else loss * 0
    p_TV = logits_TV.detach().softmax(1)
    onehot_TV = functional.one_hot(labels_T.where(labelled_T, 0), logits_TV.shape[1])
    fisher_T = (p_TV - onehot_TV).square().sum(1) * labelled_T
    return loss, fisher_T, entropy_reference(logits_TV) * labelled_T


def entropy_reference(logits_TV: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax(logits) in nats."""
    return torch.special.entr(logits_TV.detach().softmax(1)).sum(1)
