"""How long a row a model takes, told by what it looks up and not by its name.

Families number positions in their own ways: BERT from 0, RoBERTa and MPNet from behind the padding token's number,
OPT and BART from 2. What a config says of the table does not tell how many rows of it are for positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PROBE_LENGTH = 6


class _Lookups(TorchDispatchMode):
    """Notes (rows of the table, indices) of each embedding lookup."""

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
    """The longest row that a model takes; None if nothing bounds it.

    The model reads one token several times over: a table that is asked for numbers that rise by 1 holds positions, and
    has as many as stand behind the first of them. A model without such a table has its config's
    max_position_embeddings, the length that it was trained at, where that is positive.

    Args:
        settings: the model's config.
        token: any number that is no padding token's.
        run: the model, of 1 x L token numbers. Where it raises, the config decides.
    """
    ids_1L = torch.full((1, _PROBE_LENGTH), token, dtype=torch.int64, device=device)
    try:
        with _Lookups() as lookups:
            run(ids_1L)
    except Exception:  # whatever it is, the check of the rows meets it again and names it
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
