"""The files of an adapter, as PEFT or another reader takes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastpeft.export.exported import Layout
from fastpeft.export.loading import base_name
from fastpeft.export.one_rank import (
    PREFIX,
    complete,
    mlx_config,
    mlx_tensors,
    peft_config,
    peft_tensors,
    read_updates,
    to_one_rank,
)
from fastpeft.export.plan import ExportError, Plan
from fastpeft.export.readers import Contents, Reader, check_adapter, fitting_rank
from fastpeft.export.rope_keys import missing_rope_keys
from fastpeft.export.trim import Trimmed, trimmed_config
from fastpeft.models.files import fetch_model
from fastpeft.models.lm_head import bare_model
from fastpeft.runs.store import read_json, write_json

CONFIG, WEIGHTS, MLX_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"


def check_source(reader: Reader, source: Path) -> None:
    """Refuse, before any model is loaded, an adapter that the reader cannot hold.

    Raises:
        UserError: what it cannot hold, or weights that cannot be read.
    """
    config = read_json(source / CONFIG)
    if config is None:
        raise ExportError(f"{source / CONFIG} cannot be read. Export the run's other weights: --best or --last")
    with safe_open(source / WEIGHTS, framework="pt") as file:
        whole = tuple(name for name in file.keys() if ".lora_" not in name)  # noqa: SIM118
    check_adapter(reader, Contents(config, whole))


def write_adapter(plan: Plan, model: nn.Module, source: Path, out: Path, trimmed: Trimmed | None) -> Layout | None:
    """Write config and weights into `out`. Returns the layout that a reader other than PEFT was given.

    Raises:
        UserError: the reader takes no rank as large.
    """
    config = _config(plan, source)
    if plan.reader is not None:
        return _write_for(plan.reader, model, config, source, out)
    if trimmed is None:
        shutil.copyfile(source / WEIGHTS, out / WEIGHTS)
    else:
        config = trimmed_config(config, trimmed)
        tensors = load_file(source / WEIGHTS)
        for module, cut in trimmed.factors.items():
            tensors[f"{PREFIX}{module}.lora_A.weight"] = cut.a_KI.float().contiguous()
            tensors[f"{PREFIX}{module}.lora_B.weight"] = cut.b_OK.float().contiguous()
        save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    write_json(out / CONFIG, config)
    return None


def _config(plan: Plan, source: Path) -> dict[str, Any]:
    """The run's adapter_config.json with a base that is found from any folder."""
    name, on_hub = base_name(plan.run.model)
    config = read_json(source / CONFIG)
    assert config is not None
    return config | {
        "base_model_name_or_path": name,
        "revision": plan.run.model.revision if on_hub else None,
        "modules_to_save": list(dict.fromkeys(config["modules_to_save"] or ())) or None,
    }


def _write_for(reader: Reader, model: nn.Module, config: dict[str, Any], source: Path, out: Path) -> Layout:
    updates = complete(read_updates(model), reader.stacked, model)
    largest = max(update.a_RI.shape[0] for update in updates.values())
    plain = to_one_rank(updates, fitting_rank(reader, largest))
    if reader.own_files:
        save_file(mlx_tensors(plain), out / MLX_WEIGHTS, metadata={"format": "mlx"})
        write_json(out / CONFIG, mlx_config(plain, bare_model(model).config.num_hidden_layers))
        return Layout(plain.rank, 1.0)
    heads = {name: tensor for name, tensor in load_file(source / WEIGHTS).items() if ".lora_" not in name}
    tensors: dict[str, torch.Tensor] = peft_tensors(plain) | heads
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    write_json(out / CONFIG, peft_config(config, plain))
    return Layout(plain.rank, plain.scale)


def reader_notes(plan: Plan) -> tuple[str, ...]:
    """What the reader makes of the base model's own folder, where that is wrong."""
    if plan.reader is None or not plan.reader.own_files or plan.merge:
        return ()
    name, on_hub = base_name(plan.run.model)
    folder = fetch_model(name, plan.run.model.revision) if on_hub else Path(name)
    missing = missing_rope_keys(read_json(folder / "config.json") or {})
    if not missing:
        return ()
    return (
        f"{plan.reader.name} looks for rotary settings at the top level of the base model's config.json, and {name} "
        f"has them in rope_parameters only, where transformers 5 writes them: add {json.dumps(missing)} there, or it "
        "takes its own default",
    )
