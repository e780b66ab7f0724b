"""Whether a checkpoint's head fits the task, decided by the names of its labels, never by their order.

An equal number of labels is no evidence: a checkpoint with two classes would fit every task with two. Generic names
such as LABEL_0 or a bare number never match. Only the output layer, which has a row per label, is judged; the layers of
the head before it compute features and are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

_SAYS_NOTHING = re.compile(r"(?:LABEL_)?-?\d+", re.IGNORECASE)
_NUM_NAMED = 6
"""Largest number of labels listed in a message."""


def fit_head(
    model: nn.Module, stored: Any, settings: Mapping[str, Any], info: Mapping[str, Any]
) -> tuple[str | None, bool, tuple[str, ...]]:
    """Permute the rows of a pretrained output layer to the task's order, or draw the layer from torch's RNG.

    Args:
        stored: the checkpoint's own config.
        settings: the task's config values: num_labels; id2label if its labels have names, else problem_type regression.
        info: transformers' loading info. Weights that it reports as missing or mismatched are already drawn.

    Returns:
        The layer's name, or None without such a layer; whether its weights are the checkpoint's; messages for the user,
        empty for a checkpoint without a head.
    """
    name = _output_layer(model, settings["num_labels"])
    if name is None:
        return None, False, ()
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    parameters = {f"{name}.{parameter}" for parameter, _ in layer.named_parameters()}
    if not parameters.isdisjoint(info["missing_keys"]):
        return name, False, ()
    other_shape = not parameters.isdisjoint(key for key, *_ in info.get("mismatched_keys", ()))
    fault = _fault(type(model).__name__, stored, settings) or ("it has another shape" if other_shape else "")
    if fault:
        if not other_shape:
            _draw(layer, stored)
        said = f"the output layer of the checkpoint's head is not used, and a new one is trained: {fault}"
        return name, False, (said,)
    return name, True, (f"the checkpoint's head is used: {_keep(layer, stored, settings)}",)


def _output_layer(model: nn.Module, num_outputs: int) -> str | None:
    """The last linear layer outside of the encoder with `num_outputs` outputs."""
    encoder = f"{getattr(model, 'base_model_prefix', '')}."
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_outputs and not name.startswith(encoder)
    ]
    return names[-1] if names else None


def _keep(layer: nn.Linear, stored: Any, settings: Mapping[str, Any]) -> str:
    """Permute the rows to the task's order; returns a message on it."""
    labels: Mapping[int, str] | None = settings.get("id2label")
    if labels is None:
        return "it tells a score, as the task does"
    rows = {_folded(label): row for row, label in stored.id2label.items()}
    order = [rows[_folded(labels[place])] for place in range(len(labels))]
    for parameter in layer.parameters():
        parameter.data = parameter.data[order]
    moved = "" if order == sorted(order) else ", its rows brought into this order"
    return f"its labels are the task's, {_listed(labels.values())}{moved}"


def _fault(kind: str, stored: Any, settings: Mapping[str, Any]) -> str:
    """Why a pretrained output layer does not fit the task; empty if it does."""
    architectures, problem = stored.architectures or [kind], getattr(stored, "problem_type", None)
    if kind not in architectures:
        return f"it is that of {', '.join(architectures)}"
    labels: Mapping[int, str] | None = settings.get("id2label")
    if (problem == "regression") != (labels is None):
        return f"its problem_type is {problem}" + (", not regression" if labels is None else "")
    if labels is None:
        return ""
    theirs, ours = (_listed(names.values()) for names in (stored.id2label, labels))
    if any(_SAYS_NOTHING.fullmatch(str(label)) for label in stored.id2label.values()):
        return f"its labels, {theirs}, do not say what they stand for"
    found, wanted = (sorted(map(_folded, names.values())) for names in (stored.id2label, labels))
    if found != wanted or len(set(found)) < len(found):
        return f"its labels are {theirs}, and the task's {ours}"
    return ""


def _folded(label: str) -> str:
    """The label for comparison, so that POSITIVE equals positive."""
    return label.casefold()


def _listed(labels: Iterable[str]) -> str:
    names = list(labels)
    return ", ".join(names[:_NUM_NAMED]) + (f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else "")


def _draw(layer: nn.Linear, stored: Any) -> None:
    """Initialise as transformers initialises a linear layer missing from a checkpoint."""
    with torch.no_grad():
        nn.init.normal_(layer.weight, std=getattr(stored, "initializer_range", None) or 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
