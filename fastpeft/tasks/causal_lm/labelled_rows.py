"""Rows for a language model in which some tokens have labels, and their batches.

Shapes: N rows, L tokens of the longest row of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from fastpeft.data.batches import IGNORE, Batch, TokenRows, fill_up, flat_places, inputs_of, move


@dataclass(frozen=True, kw_only=True)
class LabelledRows(TokenRows, ABC):
    """Rows in which some tokens have a label and are predicted from the tokens before them. The others are context."""

    positions: np.ndarray | None = None
    """Position of each token within its own text, if rows hold several texts; else None."""
    notes: tuple[str, ...] = ()
    """Messages about omitted or cut rows."""

    def text_lengths(self, rows: np.ndarray) -> np.ndarray:
        if self.positions is None:
            return self.lengths[rows]
        positions = self.positions[flat_places(self, rows)]
        return np.diff(np.append(np.flatnonzero(positions == 0), len(positions)))

    @property
    @abstractmethod
    def num_labelled(self) -> np.ndarray:
        """Number of labelled tokens of each row."""

    @abstractmethod
    def places(self, row: int) -> np.ndarray:
        """Indices of the row's labelled tokens, ascending. Never contains 0, the first token."""


def collate_labelled(encoded: LabelledRows, rows: np.ndarray, device: torch.device) -> Batch:
    """Pad `rows` on the right to the longest row, or pack them, and move them to `device` without synchronization.

    labels[i, t] is the token after position t of row i, if that token has a label: the last position of a prompt
    predicts the first token of its answer. Padded rows have no attention mask, because causal attention never reads
    later tokens.
    """
    if encoded.varlen:
        return _one_behind_another(encoded, rows, device)
    width = int(encoded.widths[rows].max())
    tokens = np.full((len(rows), width), encoded.pad_token, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE, dtype=np.int64)
    for i, row in enumerate(rows):
        own, places = encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]], encoded.places(row)
        tokens[i, : len(own)] = own
        labels[i, places - 1] = own[places]
    inputs = {"input_ids": move(tokens, device)}
    if encoded.positions is not None:
        inputs["position_ids"] = move(_positions(encoded, encoded.positions, rows, width), device)
    labelled = np.flatnonzero(labels != IGNORE)
    return Batch(inputs, move(labels, device), int(encoded.lengths[rows].sum()), move(labelled, device))


def _one_behind_another(encoded: LabelledRows, rows: np.ndarray, device: torch.device) -> Batch:
    """Pack the rows; each text of a row becomes its own sequence."""
    starts = np.concatenate([[0], np.cumsum(encoded.lengths[rows])])
    tokens, labels = encoded.tokens[flat_places(encoded, rows)], np.full(starts[-1], IGNORE, dtype=np.int64)
    for start, row in zip(starts, rows):
        places = start + encoded.places(row)
        labels[places - 1] = tokens[places]
    inputs = inputs_of(encoded, rows, device)
    sequences = inputs.pop("attention_mask")
    labelled = move(np.flatnonzero(labels != IGNORE), device)
    labels = fill_up(labels, encoded, rows, IGNORE)
    return Batch(inputs, move(labels[None], device), len(tokens), labelled, sequences)


def _positions(encoded: LabelledRows, positions: np.ndarray, rows: np.ndarray, width: int) -> np.ndarray:
    """(N, L) int64 positions; padding forms a text of its own."""
    found = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        own = positions[encoded.offsets[row] : encoded.offsets[row + 1]]
        found[i, : len(own)], found[i, len(own) :] = own, np.arange(width - len(own))
    return found
