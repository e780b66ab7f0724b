"""Whether a batch's rows are padded to one length or lie one behind another: as asked for, or as measured to pay.

Batches hold rows of nearly one length, so that there is little padding to leave out.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fastpeft.adapters import Adapter
from fastpeft.config.schema import RunConfig
from fastpeft.data.batches import Batches
from fastpeft.device_memory import free_memory, is_out_of_memory
from fastpeft.models.backbone import Backbone
from fastpeft.models.varlen import use_varlen
from fastpeft.tasks import Task

PAYS_ABOVE = {"cpu": 0.1}
"""Share of padding, by device, above which rows without padding were measured to be no slower (bench/LOG.md). Where
nobody has measured it, `auto` pads."""


def lay_out(run: RunConfig, task: Task, adapter: Adapter, backbone: Backbone, device: torch.device) -> list[str]:
    """Set `task.train.varlen`, and have the model take such batches. Returns what to tell the user."""
    setting = run.training.padding
    if setting == "grouped" or run.training.cache_prefix:
        return []
    share = padding_share(Batches(task.train, run.training.batch_size, run.training.seed))
    if setting == "auto" and not share > PAYS_ABOVE.get(device.type, 1.0):
        return []
    fault = use_varlen(backbone.model) or (_fault(task, adapter, backbone) if run.model.check else None)
    if fault is not None:
        return [f"training.padding {setting}: {fault}, so that batches of rows of nearly one length are padded"]
    task.train = replace(task.train, varlen=True)
    return [f"the rows of a batch lie one behind another: {share:.1%} of padding is left out"]


def padding_share(batches: Batches) -> float:
    """Of the tokens of an epoch's batches, each padded to its longest row."""
    order = batches.epoch(0)
    widths, lengths = batches.encoded.widths, batches.encoded.lengths
    padded = sum(len(rows) * int(widths[rows].max()) for rows in order)
    return 1 - float(np.sum(lengths)) / padded


def _fault(task: Task, adapter: Adapter, backbone: Backbone) -> str | None:
    try:
        return task.check_varlen(adapter.model, backbone)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_memory()  # outside of the handler, whose frames hold the outputs
    return "the memory is too short to check it"
