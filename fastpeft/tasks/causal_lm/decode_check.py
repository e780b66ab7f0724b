"""Choice of the decoding method: each is compared with the model's own forward pass over whole rows.

Recurrent and convolutional layers, sliding windows, and model-specific caches can each be decoded wrongly, and wrong
answers of this kind look like a model that learns badly.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import nn

from fastpeft.device_memory import is_out_of_memory
from fastpeft.errors import UserError, first_line
from fastpeft.models.backbone import Backbone
from fastpeft.models.lm_head import bare_model
from fastpeft.tasks.causal_lm.decode_batches import BATCHES, STATIC, Caching, DecodeMethod, fastest_method
from fastpeft.tasks.causal_lm.prompts import EncodedPrompts
from fastpeft.tasks.self_check import apart, longest_row, spread_rows, tolerance, trying

_NUM_TOKENS = 3

OwnLogits = tuple[list[int], torch.Tensor]
"""Tokens of a row (L), and the logits (L x V) that the model's own forward pass has for it."""

_METHODS = (
    STATIC,
    DecodeMethod(Caching.GROWING),
    DecodeMethod(Caching.GROWING, padded=False),
    DecodeMethod(Caching.NONE),
    DecodeMethod(Caching.NONE, padded=False),
)
"""From the fastest on, behind that of families that are known."""


def find_decode_method(
    model: nn.Module, backbone: Backbone, encoded: EncodedPrompts, max_new_tokens: int, read: Sequence[OwnLogits] = ()
) -> tuple[DecodeMethod, list[str]]:
    """The fastest exact method, and messages for the user.

    Args:
        model: the model to decode with.
        encoded: prompts to continue; caches have the size that the longest of them needs.
        read: rows of different lengths, used instead of `encoded` if they are long enough.

    Raises:
        UserError: no method is exact.
    """
    core, most = bare_model(model), int(encoded.prompt_lengths.max()) + max_new_tokens
    failures: list[str] = []
    with trying(model):
        rows = _cut_rows(read) or [_continue(core, prompt) for prompt in _prompts(core, encoded)]
        for method in dict.fromkeys((fastest_method(core), *_METHODS)):
            fault = _fault(core, backbone, method, rows, most)
            if fault is None:
                return method, _notes(backbone, method, failures)
            failures.append(f"with {method}, {fault}")
    raise UserError(
        f"model {backbone.model.name_or_path}: {type(backbone.model).__name__} cannot be decoded as its own forward "
        f"pass would: {'; '.join(failures)}. Choose another model; model.check=off decodes it all the same"
    )


def _notes(backbone: Backbone, method: DecodeMethod, failures: list[str]) -> list[str]:
    if not failures:
        return []
    return [f"{type(backbone.model).__name__} is decoded with {method}, which is exact and slower: {failures[0]}"]


def _prompts(model: nn.Module, encoded: EncodedPrompts) -> list[list[int]]:
    """Of unequal lengths."""
    rows = spread_rows(model, encoded.prompt_lengths)
    longest = min(longest_row(model), int(encoded.prompt_lengths.max()))
    return [encoded.prompt(row)[: max(1, longest * (i + 1) // len(rows))].tolist() for i, row in enumerate(rows)]


class _Row(NamedTuple):
    prompt: list[int]
    tokens: list[int]
    """The _NUM_TOKENS tokens after the prompt."""
    logits: torch.Tensor
    """(_NUM_TOKENS, V), the logits that predict each of them."""


def _cut_rows(read: Sequence[OwnLogits]) -> list[_Row]:
    """Empty unless a prompt is left of each, and they are of unequal lengths."""
    num = _NUM_TOKENS
    lengths = {len(tokens) for tokens, _ in read}
    if len(lengths) < 2 or min(lengths) <= num:
        return []
    return [_Row(tokens[:-num], tokens[-num:], logits_LV[-num - 1 : -1]) for tokens, logits_LV in read]


def _continue(model: nn.Module, prompt: list[int]) -> _Row:
    """By its own tokens once more, in one pass over the row."""
    device, tokens = next(model.parameters()).device, [*islice(cycle(prompt), _NUM_TOKENS)]
    row = torch.tensor([[*prompt, *tokens[:-1]]], device=device)
    return _Row(prompt, tokens, model(input_ids=row, use_cache=False).logits[0, -_NUM_TOKENS:].float())


def _fault(
    model: nn.Module,
    backbone: Backbone,
    method: DecodeMethod,
    rows: Sequence[_Row],
    most: int,
) -> str | None:
    """Why the method is not exact; None if it is."""
    groups = [rows] if method.padded else [[row, row] for row in rows]
    try:
        largest = max(_largest_difference(model, backbone, method, group, most) for group in groups)
    except Exception as error:  # models reject unsupported inputs with various errors
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    return None if largest <= tolerance(backbone) else f"logits differ by {largest:.2g} of their size"


def _largest_difference(
    model: nn.Module,
    backbone: Backbone,
    method: DecodeMethod,
    rows: Sequence[_Row],
    most: int,
) -> float:
    """Largest difference of the logits after each token, with the same continuation in all methods."""
    device = next(model.parameters()).device
    none_E = torch.empty(0, dtype=torch.int64, device=device)
    batch = BATCHES[method.caching](model, [row.prompt for row in rows], most, backbone.tokenizer.pad_token_id, device)
    largest = 0.0
    for step in range(_NUM_TOKENS):
        logits_BV = batch.forward().float()
        wanted_BV = torch.stack([row.logits[step] for row in rows])
        centred = (logits - logits.mean(-1, keepdim=True) for logits in (logits_BV, wanted_BV))
        largest = max(largest, apart(*centred))
        batch.append(torch.tensor([row.tokens[step] for row in rows], device=device), none_E, step)
    return largest
