"""The trained model as the trainer has it, the exported one as anybody loads it, and what each answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from fastpeft.config.schema import ModelConfig
from fastpeft.data import Encoded
from fastpeft.data.batches import collate
from fastpeft.errors import first_line
from fastpeft.export.plan import CheckError, ExportError
from fastpeft.models.backbone import Backbone, load_backbone, quiet_transformers
from fastpeft.models.layers import LoraLinear
from fastpeft.models.resolve import embedded_path

_TRAINED_SEED, _LOADED_SEED = 1, 2
"""A head that an export lacks is drawn anew: from different seeds, so that its answers differ."""

_BATCH_ROWS = 16


def base_name(config: ModelConfig) -> tuple[str, bool]:
    """What loads the base model from any folder of this machine, and whether it is a hub's name."""
    shipped = embedded_path(config.name)
    local = Path(config.name).expanduser()
    if shipped is None and not local.is_dir():
        return config.name, True
    return str((shipped or local).resolve()), False


def load_base(config: ModelConfig, labels: tuple[str, ...], device: torch.device) -> Backbone:
    with _seeded(_TRAINED_SEED):
        return load_backbone(config, labels, torch.float32, device)


def trained_model(backbone: Backbone, folder: Path) -> nn.Module:
    """A PeftModel with the trainer's own layers and the weights in `folder`, in fp32, in eval mode."""
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, peft.LoraConfig):
            raise ExportError(f"the adapter is of type {config.peft_type}; only LORA can be exported")
        config._register_custom_module({nn.Linear: LoraLinear})
        with quiet_transformers(), _seeded(_TRAINED_SEED):
            model = peft.PeftModel.from_pretrained(backbone.model, str(folder), config=config)
    except ExportError:
        raise
    except Exception as error:  # a damaged file: PEFT, safetensors and torch have classes of their own
        reason = first_line(error) or type(error).__name__
        raise ExportError(
            f"the run's adapter cannot be loaded: {reason}. Export its other weights: --best or --last"
        ) from error
    return model.eval()


def load_exported(folder: Path, merged: bool, num_labels: int, device: torch.device) -> tuple[nn.Module, Any]:
    """Model and tokenizer as a user loads them, with transformers and PEFT alone.

    Raises:
        CheckError: they do not load.
    """
    import transformers

    try:
        with quiet_transformers(), _seeded(_LOADED_SEED):
            load = _load_merged if merged else _load_adapter
            model = load(folder, num_labels)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # whatever it is, a user would meet it too
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckError(f"what was exported cannot be loaded, so nothing was written: {reason}") from error
    return model.to(device).eval(), tokenizer


def _load_merged(folder: Path, num_labels: int) -> nn.Module:
    import transformers

    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(str(folder), trust_remote_code=False, dtype=torch.float32)


def _load_adapter(folder: Path, num_labels: int) -> nn.Module:
    import transformers

    config = peft.PeftConfig.from_pretrained(str(folder))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        config.base_model_name_or_path,
        revision=config.revision or "main",
        num_labels=num_labels,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
        dtype=torch.float32,
    )
    return peft.PeftModel.from_pretrained(base, str(folder))


def save_merged(model: nn.Module, folder: Path) -> None:
    """Add every update to its weight and save the whole model in fp32."""
    with quiet_transformers():
        model.merge_and_unload().save_pretrained(str(folder))


@torch.inference_mode()
def logits(model: nn.Module, encoded: Encoded, device: torch.device) -> torch.Tensor:
    """N x labels, on the CPU, in the rows' order."""
    import numpy as np

    rows = np.array_split(np.arange(len(encoded)), -(-len(encoded) // _BATCH_ROWS))
    return torch.cat([model(**collate(encoded, part, device).inputs).logits.float().cpu() for part in rows])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
