"""Validation of the arguments of the cross entropies. Every function here raises ValueError."""

from __future__ import annotations

import torch

from fastpeft.kernels.ops.linear_cross_entropy.per_row import Options


def check_head(
    options: Options,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor | None,
    lens_hidden: torch.Tensor | None,
    chunk_rows: int | None,
) -> None:
    name = options.name
    if hidden.ndim == 0 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or not len(weight):
        raise ValueError(
            f"{name}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit; "
            "expected hidden (..., D) and weight (V, D)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias is {tuple(bias.shape)}; expected ({len(weight)},)")
    if lens_hidden is not None and (lens_hidden.ndim != 2 or lens_hidden.shape[1] != weight.shape[1]):
        raise ValueError(f"{name}: lens_hidden is {tuple(lens_hidden.shape)}; expected (M, {weight.shape[1]})")
    for argument, tensor in (("weight", weight), ("bias", bias), ("lens_hidden", lens_hidden)):
        if tensor is not None and (tensor.dtype != hidden.dtype or tensor.device != hidden.device):
            raise ValueError(
                f"{name}: {argument} is {tensor.dtype} on {tensor.device} but hidden is {hidden.dtype} on "
                f"{hidden.device}; expected the same"
            )
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {argument} requires a gradient, but the head is taken as frozen; set requires_grad to "
                "False, or give the output of a trained head to logits_cross_entropy"
            )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{name}: chunk_rows is {chunk_rows}; expected at least 1")
    if rows is not None:
        _check_rows(name, rows, hidden)


def _check_rows(name: str, rows: torch.Tensor, hidden: torch.Tensor) -> None:
    if rows.ndim != 1 or rows.dtype != torch.int64 or rows.device != hidden.device:
        raise ValueError(
            f"{name}: rows is {rows.dtype} {tuple(rows.shape)} on {rows.device}; expected int64 (L,) on {hidden.device}"
        )
    num_tokens = hidden.shape[:-1].numel()
    if rows.is_cpu and len(rows):
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= num_tokens:
            raise ValueError(f"{name}: rows has {low if low < 0 else high}; expected 0 to {num_tokens - 1}")


def check_labels(
    options: Options, source_name: str, source: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> None:
    name = options.name
    if not source.is_floating_point() or source.ndim == 0 or not source.shape[-1]:
        raise ValueError(
            f"{name}: {source_name} is {source.dtype} {tuple(source.shape)}; expected floating, the last axis not empty"
        )
    for argument, tensor in (("labels", labels), ("token_weights", weights)):
        if tensor is not None and (tensor.shape != source.shape[:-1] or tensor.device != source.device):
            raise ValueError(
                f"{name}: {argument} is {tuple(tensor.shape)} on {tensor.device} but {source_name} is "
                f"{tuple(source.shape)} on {source.device}; expected {tuple(source.shape[:-1])} there"
            )
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: labels are {labels.dtype}; expected torch.int64")
    if weights is not None and (not weights.is_floating_point() or weights.requires_grad):
        raise ValueError(f"{name}: token_weights are {weights.dtype}; expected floating and without a gradient")


def check_classes(options: Options, labels_T: torch.Tensor, vocab: int) -> None:
    """Check that every label is a class or ignore_index. It reads the labels, which would stall the host on a GPU."""
    wrong_T = (labels_T != options.ignore_index) & ((labels_T < 0) | (labels_T >= vocab))
    if bool(wrong_T.any()):
        raise ValueError(
            f"{options.name}: labels has {int(labels_T[wrong_T][0])}; expected 0 to {vocab - 1}, "
            f"or ignore_index {options.ignore_index}"
        )
