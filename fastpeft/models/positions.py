"""The longest sequence that a model supports, found from its embedding lookups.

Families number positions differently: BERT from 0, RoBERTa and MPNet from after the padding token's id, OPT and BART
from 2. The table's size in the config does not tell how many of its rows are usable positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PROBE_LENGTH = 6


class _Lookups(TorchDispatchMode):
    """Records (rows of the table, indices) of each embedding lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, torch.Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.found.append((args[0].shape[0], args[1].detach()))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def position_limit(settings: Any, token: int, device: torch.device, run: Callable[[torch.Tensor], Any]) -> int | None:
    """The longest sequence that a model supports, in tokens; None if unbounded.

    The model reads one token repeated several times. A table looked up with consecutive indices holds positions, as
    many as it has rows from the first index on. Without such a table the limit is the config's max_position_embeddings,
    the length in pretraining, if it is positive.

    Args:
        settings: the model's config.
        token: id of any token other than padding.
        run: runs the model on (1, L) token ids. If it raises, the config decides.
    """
    ids_1L = torch.full((1, _PROBE_LENGTH), token, dtype=torch.int64, device=device)
    try:
        with _Lookups() as lookups:
            run(ids_1L)
    except Exception:  # whatever the error, the check of the rows reports it
        return _from_config(settings)
    limits = []
    for num_rows, indices in lookups.found:
        first = indices.flatten()[:_PROBE_LENGTH].tolist()
        if len(first) == _PROBE_LENGTH and first == list(range(first[0], first[0] + _PROBE_LENGTH)):
            limits.append(num_rows - first[0])
    return min(limits) if limits else _from_config(settings)


def _from_config(settings: Any) -> int | None:
    positions = getattr(settings, "max_position_embeddings", None)
    is_bound = isinstance(positions, int) and positions > 0 and getattr(settings, "position_biased_input", True)
    return positions if is_bound else None
