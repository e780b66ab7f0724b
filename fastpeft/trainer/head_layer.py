"""The output layer of a head that a run may fit before its first step, and whether it may."""

from __future__ import annotations

from torch import nn

from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone
from fastpeft.tasks import Task


def check_head(model: nn.Module, backbone: Backbone, task: Task) -> None:
    """Raise UserError for a run with training.fit_head whose head cannot, or should not, be fitted."""
    if backbone.has_own_head:
        raise UserError(
            "training.fit_head would fit the head anew that the checkpoint brings for these very labels: leave it out"
        )
    if not backbone.head:
        raise UserError("training.fit_head fits a classifier's head, and a language model keeps its own: leave it out")
    output_layer(model, backbone.head, task.num_outputs)


def output_layer(model: nn.Module, head: list[str], num_outputs: int) -> nn.Linear:
    """The last trained linear layer of the head. PEFT keeps a frozen copy of the head beside it, under other names.

    Raises:
        UserError: the head has no linear layer of `num_outputs` outputs.
    """
    inside = [m for name, m in model.named_modules() if any(f".{own}." in f".{name}." for own in head)]
    linears = [
        m for m in inside if isinstance(m, nn.Linear) and m.out_features == num_outputs and m.weight.requires_grad
    ]
    if not linears:
        raise UserError(f"{type(model).__name__}: its head has no linear layer of {num_outputs} outputs to be fitted")
    return linears[-1]
