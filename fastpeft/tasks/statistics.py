"""Statistics of a batch's predictions that schedules read."""

from __future__ import annotations

from collections.abc import Collection

import torch

from fastpeft.signals import Need
from fastpeft.tasks.base import Count


def class_statistics(
    logits_NC: torch.Tensor, labels_N: torch.Tensor, num_items: Count, needs: Collection[Need]
) -> dict[str, torch.Tensor]:
    """Of one class out of C an item, as shares of the mean over `num_items`, where Need.TOKENS asks for them.

    entropy: of the prediction, in nats. answer_fisher: |p - onehot|^2, the squared gradient of the item's loss.
    """
    if Need.TOKENS not in needs:
        return {}
    probability = logits_NC.softmax(1)
    entropy = torch.special.entr(probability).sum() / num_items
    error = probability.scatter_(1, labels_N[:, None], -1, reduce="add")
    return {"entropy": entropy, "answer_fisher": error.square_().sum() / num_items}
