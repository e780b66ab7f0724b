"""Fits a head in closed form on a frozen model's features of the training rows, without optimizer steps.

Ridge regression on the input of the head's output layer. The head's layers below it stay as they were loaded.

Shape suffixes: R answers (rows, or labelled tokens), D features, C outputs.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import nn

from fastpeft.data.batches import IGNORE, micro_batches
from fastpeft.trainer.build import Job
from fastpeft.trainer.head_layer import output_layer

RIDGE = 1e-2
"""Ridge strength, as a share of the mean eigenvalue of the features' Gram matrix."""


@torch.no_grad()
def fit_head(job: Job, num_rows: int = 2048) -> int:
    """Set the output layer of `job.adapter.model` by ridge regression on at most `num_rows` training rows, evenly
    spaced over the split. Returns how many answers it was fitted to; 0 for a model that keeps its own head.

    The target is 1 for the true class and -1 for the others, so that a logit's sign decides, as with several labels.

    Raises:
        UserError: the head has no linear output layer.
    """
    model, task = job.adapter.model, job.task
    if not job.backbone.head or job.backbone.has_own_head:
        return 0
    layer = output_layer(model, job.backbone.head, task.num_outputs)
    total = len(task.train)
    rows = np.unique(np.linspace(0, total - 1, min(num_rows, total)).astype(np.int64))
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    training = model.training
    model.eval()
    gram = cross = None
    count = 0
    try:
        for part in micro_batches(task.train, rows, job.limits.training):
            batch = task.collate(part, job.device)
            seen.clear()
            model(**batch.inputs)
            x_RD, y_RC = _answers(seen[0], batch.labels, task.num_outputs)
            x_RD = torch.cat([x_RD, x_RD.new_ones(len(x_RD), 1)], dim=1).double()
            gram = x_RD.t() @ x_RD if gram is None else gram + x_RD.t() @ x_RD
            cross = x_RD.t() @ y_RC.double() if cross is None else cross + x_RD.t() @ y_RC.double()
            count += len(x_RD)
    finally:
        model.train(training)
        hook.remove()
    assert gram is not None
    ridge = RIDGE * gram.diagonal()[:-1].mean().clamp_min(1e-12)
    penalty = torch.full((len(gram),), float(ridge), dtype=gram.dtype, device=gram.device)
    penalty[-1] = 0  # the bias
    solved = torch.linalg.solve(gram + torch.diag(penalty), cast(torch.Tensor, cross))
    layer.weight.copy_(solved[:-1].t())
    if layer.bias is not None:
        layer.bias.copy_(solved[-1])
    return count


def _answers(features: torch.Tensor, labels: torch.Tensor, num_outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (R x D) and targets (R x C)."""
    if labels.ndim == features.ndim - 1 and labels.shape == features.shape[:-1] and not labels.is_floating_point():
        x, y = features.reshape(-1, features.shape[-1]), labels.reshape(-1)
        there = y != IGNORE
        return x[there], 2.0 * nn.functional.one_hot(y[there], num_outputs) - 1
    x = features.reshape(len(labels), -1)
    if labels.ndim == 1 and not labels.is_floating_point():
        return x, 2.0 * nn.functional.one_hot(labels, num_outputs) - 1
    if labels.ndim == 2:
        return x, 2.0 * labels.to(x.dtype) - 1
    return x, labels.to(x.dtype)[:, None]
