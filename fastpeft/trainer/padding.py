"""Chooses between padded batches and packed ones (varlen), by the setting or by the share of padding.

Batches grouped by length have little padding to save, random batches much.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fastpeft.adapters import Adapter
from fastpeft.config.schema import RunConfig
from fastpeft.data.batches import Batches, micro_batches
from fastpeft.device_memory import free_memory, is_out_of_memory
from fastpeft.models.backbone import Backbone
from fastpeft.models.varlen import attention_way, use_varlen
from fastpeft.tasks import Task
from fastpeft.trainer.memory_plan import FEWEST

PAYS_ABOVE = {"cpu": 0.1}
"""Share of padding, by device, above which varlen batches are faster. On a CPU, the difference below it is within the
noise (bench/LOG.md). On devices without a measurement, `auto` pads."""
LOOKED_AT = 64
"""Batches, evenly spaced over an epoch, whose padding is counted."""


def lay_out(run: RunConfig, task: Task, adapter: Adapter, backbone: Backbone, device: torch.device) -> list[str]:
    """Choose the layout: may set `task.train.varlen` and prepare the model for it. Returns notes for the user."""
    setting = run.training.padding
    if setting == "padded" or run.training.cache_prefix:
        return []
    if setting == "auto":
        share = padding_share(make_batches(run, task))
        if share <= PAYS_ABOVE.get(device.type, 1.0):
            return []
    fault = use_varlen(backbone.model) or (_fault(task, adapter, backbone) if run.model.check else None)
    if fault is not None:
        return [f"training.padding {setting}: {fault}, so that rows are padded"]
    task.train = replace(task.train, varlen=True)
    return ["the rows of a batch lie one behind another, without padding", *_way(backbone, device)]


def _way(backbone: Backbone, device: torch.device) -> list[str]:
    """A note on the attention kernel. A CPU has only one."""
    way = attention_way(backbone.model) if device.type == "cuda" else None
    if way is None:
        return []
    return [f"attention within rows: {way.name}" + (f" ({way.why})" if way.why else "")]


def make_batches(run: RunConfig, task: Task) -> Batches:
    training = run.training
    return Batches(task.train, training.batch_size, training.seed, grouped=training.sampling == "group_by_length")


def padding_share(batches: Batches) -> float:
    """Padding's share of the tokens, in micro-batches of the smallest planned size. Larger ones have no less."""
    order, encoded = batches.epoch(0), batches.encoded
    chosen = np.unique(np.linspace(0, len(order) - 1, LOOKED_AT).astype(int))
    parts = [part for i in chosen for part in micro_batches(encoded, order[i], FEWEST)]
    padded = sum(rows * width for rows, width in map(encoded.shape, parts))
    return 1 - sum(int(encoded.lengths[part].sum()) for part in parts) / padded


def _fault(task: Task, adapter: Adapter, backbone: Backbone) -> str | None:
    try:
        return task.check_varlen(adapter.model, backbone)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_memory()  # outside of the handler, whose traceback holds the outputs
    return "the memory is too short to check it"
