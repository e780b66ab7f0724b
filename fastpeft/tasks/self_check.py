"""Check, on a few rows before training, that a model's outputs for a batch equal those for each row alone.

A model whose rows change with their padding trains on the padding. Nothing but its numbers shows that.

Shapes: N rows, L tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fastpeft.data.batches import TokenRows, concatenate, inputs_of
from fastpeft.device_memory import is_out_of_memory
from fastpeft.errors import UserError, first_line
from fastpeft.models.backbone import Backbone, quiet_transformers
from fastpeft.models.lm_head import fewer_logits

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.15}
"""Largest difference of two outputs that ought to be equal, as a share of the outputs' size. With Gemma 3 of 18 layers
rounding gives 6e-6 in fp32 and 0.05 in bf16, 13 units roundoff (bench/LOG.md); a GPU's products in TF32 add to the
former. What was wrong with a model gave 0.3 and more."""

_FOUR_BITS = 1e-2
"""At least, where weights are held in 4 bits: one row is multiplied by other code than several."""

_NUM_ROWS, _SHORTEST, _LONGEST = 3, 8, 64
_OPERATIONS = {"cpu": 1e10, "cuda": 1e12}
"""Of a forward pass over the rows, for the check to take less than a second."""

Outputs = Callable[[nn.Module, dict[str, Any], Sequence[int]], list[torch.Tensor]]
"""(model, inputs, lengths) -> of each row what the model makes of it, without its padding: ... x C. Rows may lie one
behind another, as by_row tells."""


@dataclass(frozen=True, kw_only=True)
class SampleRows(TokenRows):
    """A few rows, cut."""

    segments: np.ndarray | None = None

    def row(self, i: int) -> SampleRows:
        """One of them, unpadded."""
        places = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return replace(
            self,
            tokens=self.tokens[places],
            offsets=np.array([0, places.stop - places.start]),
            segments=None if self.segments is None else self.segments[places],
            padded=False,
        )


def check_tokens(backbone: Backbone, splits: Mapping[str, TokenRows]) -> None:
    """Every token has an embedding, and every row its positions.

    Raises:
        UserError: how many rows do not.
    """
    name, num_rows = backbone.model.name_or_path, backbone.num_embeddings
    for split, encoded in splits.items():
        if not len(encoded):
            continue
        largest = np.maximum.reduceat(encoded.tokens, encoded.offsets[:-1])
        if num_rows is not None and (largest >= num_rows).any():
            token = int(largest.max())
            raise UserError(
                f"model {name}: {int((largest >= num_rows).sum()):,} of {len(encoded):,} {split} rows hold tokens that "
                f"it has no embedding for, such as {backbone.tokenizer.convert_ids_to_tokens(token)!r}, number "
                f"{token:,}: it has {num_rows:,}. Take the tokenizer that the model was trained with"
            )
        longest = int(encoded.lengths.max())
        if backbone.max_positions is not None and longest > backbone.max_positions:
            raise UserError(
                f"model {name}: {int((encoded.lengths > backbone.max_positions).sum()):,} of {len(encoded):,} {split} "
                f"rows are longer than the {backbone.max_positions:,} tokens that it has positions for; the longest "
                f"has {longest:,}. Set dataset.max_length={backbone.max_positions}"
            )


def check_batches(
    model: nn.Module, backbone: Backbone, encoded: TokenRows, together: Outputs, alone: Outputs | None = None
) -> tuple[bool, list[str]]:
    """Whether rows of unequal lengths may share a batch, and what to tell the user.

    Args:
        model: the one that is trained.
        encoded: training rows.
        together: of a batch, computed as training does.
        alone: of one row, by the model's own forward pass; `together` when absent.

    Raises:
        UserError: rows cannot even be read side by side where they are of one length.
    """
    rows, kind = sample_rows(model, encoded), type(backbone.model).__name__

    def outputs(of: Outputs, some: SampleRows) -> list[torch.Tensor]:
        return of(model, *_inputs(some, backbone))

    with trying(model):
        each = [rows.row(i) for i in range(len(rows))]
        wanted = [_read(lambda row=row: outputs(alone or together, row)[0], row, backbone) for row in each]
        padded = _difference(lambda: outputs(together, rows), wanted)
        if padded.value <= tolerance(backbone):
            return True, []
        twice = [
            _difference(lambda row=row: outputs(together, _twice(row)), [own, own]) for row, own in zip(each, wanted)
        ]
    unpadded = max(twice, key=lambda difference: difference.value)
    if unpadded.value <= tolerance(backbone):
        return False, [
            f"{kind} computes other outputs for a row in a padded batch ({padded}): only rows of one length share a "
            "batch, which is exact and slower"
        ]
    raise UserError(
        f"model {backbone.model.name_or_path}: {kind} computes other outputs for a row in a batch than for the row by "
        f"itself: {padded} where it is padded, {unpadded} beside a row of its own length. It cannot be trained in "
        "batches; choose another model. model.check=off trains it all the same"
    )


def varlen_fault(model: nn.Module, backbone: Backbone, encoded: TokenRows, outputs: Outputs) -> str | None:
    """What is wrong where rows lie one behind another, in words; None where each has the outputs that it has alone.

    Args:
        model, encoded: as check_batches has them.
        outputs: of a batch, computed as training does.
    """
    rows = sample_rows(model, encoded)
    with trying(model):
        wanted = [outputs(model, *_inputs(rows.row(i), backbone))[0] for i in range(len(rows))]
        found = _difference(lambda: outputs(model, *_inputs(replace(rows, varlen=True), backbone)), wanted)
    if found.value <= tolerance(backbone):
        return None
    return f"{type(backbone.model).__name__} computes other outputs for rows in one piece: {found}"


def by_row(x: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """L x C of each row, without padding, of N x L x C or of 1 x T x C."""
    if len(x) == len(lengths):
        return [row[:length] for row, length in zip(x, lengths)]
    return list(x[0].split(list(lengths)))


def tolerance(backbone: Backbone) -> float:
    """Largest share by which outputs that ought to be equal may differ."""
    quantised = getattr(backbone.model.config, "quantization_config", None) is not None
    return max(TOLERANCE[backbone.dtype], _FOUR_BITS if quantised else 0.0)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference of two ... x C, as a share of the largest of `wanted`; infinite where one is not finite."""
    if found.shape != wanted.shape:
        return float("inf")
    size = float(wanted.float().norm(dim=-1).max())
    difference = float((found.float() - wanted.float()).norm(dim=-1).max()) / max(size, 1e-30)
    return difference if difference == difference else float("inf")


@contextmanager
def trying(model: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients, of a few tokens' logits; modes and random numbers are left as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices), fewer_logits(model), torch.inference_mode(), quiet_transformers():
            yield
    finally:
        for module, training in modes:
            module.training = training


def longest_row(model: nn.Module) -> int:
    """Tokens of the longest row that is tried."""
    return int(min(max(_affordable(model) / _NUM_ROWS, _SHORTEST), _LONGEST))


def spread_rows(model: nn.Module, lengths: np.ndarray) -> list[int]:
    """A short, a middling and a long row; of a model that is slow here a short and a long one."""
    count = _NUM_ROWS if _affordable(model) >= _NUM_ROWS * _SHORTEST else 2
    order = np.argsort(lengths, kind="stable")
    return [int(order[round(i * (len(order) - 1) / (count - 1))]) for i in range(count)]


def _affordable(model: nn.Module) -> float:
    """Tokens of a forward pass over all rows."""
    device = next(model.parameters()).device.type
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    return _OPERATIONS.get(device, _OPERATIONS["cpu"]) / (2 * num_weights)


def sample_rows(model: nn.Module, encoded: TokenRows) -> SampleRows:
    """As spread_rows has them. What is too long for a quick check is cut before its last token."""
    longest, rows = min(longest_row(model), int(encoded.lengths.max())), spread_rows(model, encoded.lengths)
    tokens, segments, lengths = [], [], []
    for i, row in enumerate(rows):
        start, end = int(encoded.offsets[row]), int(encoded.offsets[row + 1])
        length = min(end - start, max(1, longest * (i + 1) // len(rows)))
        places = [*range(start, start + length - 1), end - 1]
        lengths.append(length)
        tokens.append(encoded.tokens[places].tolist())
        if getattr(encoded, "segments", None) is not None:
            segments.append(encoded.segments[places].tolist())  # pyright: ignore[reportAttributeAccessIssue]
    return SampleRows(
        tokens=concatenate(tokens, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_token=encoded.pad_token,
        max_length=encoded.max_length,
        segments=concatenate(segments, np.uint8) if segments else None,
    )


@dataclass(frozen=True)
class _Difference:
    value: float
    error: str = ""

    def __str__(self) -> str:
        return self.error or f"they differ by {self.value:.2g} of their size"


def _difference(compute: Callable[[], list[torch.Tensor]], wanted: list[torch.Tensor]) -> _Difference:
    try:
        return _Difference(max(apart(row, one) for row, one in zip(compute(), wanted, strict=True)))
    except Exception as error:  # models refuse what they cannot take in ways of their own
        if is_out_of_memory(error):
            raise
        return _Difference(float("inf"), f"{type(error).__name__}: {first_line(error)}")


def _read(compute: Callable[[], torch.Tensor], row: SampleRows, backbone: Backbone) -> torch.Tensor:
    try:
        return compute()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"model {backbone.model.name_or_path}: {type(backbone.model).__name__} cannot read a row of "
            f"{len(row.tokens)} tokens: {type(error).__name__}: {first_line(error)}"
        ) from error


def _inputs(rows: SampleRows, backbone: Backbone) -> tuple[dict[str, Any], list[int]]:
    device = next(backbone.model.parameters()).device
    return inputs_of(rows, np.arange(len(rows)), device, rows.segments), rows.lengths.tolist()


def _twice(row: SampleRows) -> SampleRows:
    twice: Any = {
        name: np.tile(value, 2) for name in ("tokens", "segments") if (value := getattr(row, name)) is not None
    }
    return replace(row, offsets=np.array([0, 1, 2]) * row.offsets[1], **twice)
