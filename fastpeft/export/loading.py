"""The trained model as the trainer has it, the exported one as anybody loads it, and what each answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import peft
import torch
from safetensors.torch import load_file
from torch import nn

from fastpeft.adapters.adapter import read_weights
from fastpeft.config.schema import ModelConfig
from fastpeft.errors import first_line
from fastpeft.export.plan import CheckError, ExportError
from fastpeft.kernels.ops.lora_linear.quantised import dequantised, is_quantised
from fastpeft.models.backbone import GROW, PAD, Backbone, quiet_transformers
from fastpeft.models.layers import LoraLinear
from fastpeft.models.nf4 import never_repack, nf4_arguments
from fastpeft.runs.store import read_json
from fastpeft.standins import embedded_path
from fastpeft.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IMPORTS = ("megatron_config", "auto_mapping")
"""Keys of an adapter_config.json by which PEFT imports a module that the file names."""
_TRAINED_SEED, _LOADED_SEED = 1, 2
"""A head that an export lacks is drawn anew: from different seeds, so that its answers differ."""


def base_name(config: ModelConfig) -> tuple[str, bool]:
    """What loads the base model from any folder of this machine, and whether it is a hub's name."""
    shipped = embedded_path(config.name)
    local = Path(config.name).expanduser()
    if shipped is None and not local.is_dir():
        return config.name, True
    return str((shipped or local).resolve()), False


def load_base(config: ModelConfig, task: Task, device: torch.device) -> Backbone:
    """In fp32. What training held in 4 bits comes as the plain weights that those stand for."""
    with _seeded(_TRAINED_SEED):
        backbone = task.load_model(replace(config, quantisation="none"), torch.float32, device)
        if config.quantisation != "none":
            for name, module in task.load_model(config, torch.float32, device).model.named_modules():
                weight = getattr(module, "weight", None)
                if weight is not None and is_quantised(weight):
                    backbone.model.get_parameter(f"{name}.weight").data.copy_(dequantised(weight, torch.float32))
        return backbone


def load_whole(folder: Path, task: Task, device: torch.device) -> Backbone:
    """A fully fine-tuned model in fp32, with its own head: `load_base` takes none whose labels' names say nothing, but
    these are the run's."""
    backbone = load_base(ModelConfig(name=str(folder)), task, device)
    stored = read_weights(folder) if backbone.head else {}
    for module in backbone.head:
        for name, parameter in backbone.model.get_submodule(module).named_parameters(prefix=module):
            parameter.data.copy_(stored[name])
    return backbone


def trained_model(backbone: Backbone, folder: Path) -> nn.Module:
    """A PeftModel with the trainer's own layers and the weights in `folder`, in fp32, in eval mode."""
    with _seeded(_TRAINED_SEED):
        return load_adapter(backbone.model, folder, {nn.Linear: LoraLinear}).eval()


def load_adapter(base: nn.Module, folder: Path, layers: dict[type, type] | None = None) -> peft.PeftModel:
    """A run's LoRA on its base model, by PEFT. Safetensors are read and no pickle, and no module is imported by a name
    that stands in the folder.

    Args:
        layers: of the base -> the class that computes its update; PEFT's own when absent.

    Raises:
        ExportError: an adapter that is damaged, no LoRA, or asks for more.
    """
    settings = read_json(folder / "adapter_config.json") or {}
    asked = next((key for key in _IMPORTS if settings.get(key)), None)
    if asked is not None:
        raise ExportError(
            f"{folder}: its adapter_config.json has {asked}, which imports a module by its name; no run of fastpeft "
            "writes that, and it is not done. Remove the key if you know where the adapter is from"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ExportError(f"{folder} has no adapter_model.safetensors, and no other file of weights is opened")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, peft.LoraConfig):
            raise ExportError(f"the adapter is of type {config.peft_type}; only LORA can be exported")
        if layers:
            config._register_custom_module(layers)
        with quiet_transformers():
            return peft.PeftModel.from_pretrained(cast("PreTrainedModel", base), str(folder), config=config)
    except ExportError:
        raise
    except Exception as error:  # a damaged file: PEFT, safetensors and torch have classes of their own
        reason = first_line(error) or type(error).__name__
        raise ExportError(
            f"the run's adapter {folder} cannot be loaded: {reason}. Take its other weights: --best or --last"
        ) from error


def load_exported(
    folder: Path, merged: bool, config: ModelConfig, task: Task, fitting: list[str], device: torch.device
) -> tuple[nn.Module, Any]:
    """Model and tokenizer as a user loads them, with transformers and PEFT alone.

    Args:
        fitting: as in Backbone.

    Raises:
        CheckError: they do not load.
    """
    import transformers

    auto = getattr(transformers, task.auto_class)
    common: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32}
    try:
        with quiet_transformers(), _seeded(_LOADED_SEED):
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            if merged:
                return auto.from_pretrained(str(folder), **common).to(device).eval(), tokenizer
            common |= task.load_arguments()
            if config.quantisation != "none":
                common |= nf4_arguments(torch.float32, device)
            adapter = peft.PeftConfig.from_pretrained(str(folder))
            revision = adapter.revision or "main"
            base = auto.from_pretrained(adapter.base_model_name_or_path, revision=revision, **common)
            if GROW in fitting:
                base.resize_token_embeddings(len(tokenizer))
            if PAD in fitting:
                base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
            model = peft.PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # whatever it is, a user would meet it too
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckError(f"what was exported cannot be loaded, so nothing was written: {reason}") from error
    if config.quantisation == "none":
        model.to(device)
    never_repack(model)  # which would not be as exact as the comparison
    return model.eval(), tokenizer


def load_mlx(folder: Path, config: ModelConfig, task: Task, device: torch.device) -> tuple[nn.Module, Any]:
    """Model and tokenizer by mlx-lm's rule: each module named by the file computes W + scale (lora_a lora_b)^T.

    Raises:
        CheckError: a tensor that is of no module, or not of the config's rank.
    """
    import transformers

    settings = read_json(folder / "adapter_config.json") or {}
    rank, scale = (settings["lora_parameters"][key] for key in ("rank", "scale"))
    tensors = load_file(folder / "adapters.safetensors")
    backbone = load_base(config, task, device)
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        a_IR, b_RO = (tensors[f"{name}.lora_{letter}"].to(device) for letter in "ab")
        weight = backbone.model.get_submodule(name).get_parameter("weight")
        if (weight.shape, rank) != ((b_RO.shape[1], a_IR.shape[0]), a_IR.shape[1]):
            raise CheckError(f"what was exported for {name} has another shape than the model's; nothing was written")
        weight.data.add_((a_IR @ b_RO).t(), alpha=scale)
    with quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    return backbone.model.eval(), tokenizer


def save_merged(model: nn.Module, folder: Path) -> None:
    """Add every update to its weight and save the whole model in fp32."""
    with quiet_transformers():
        cast(peft.PeftModel, model).merge_and_unload().save_pretrained(str(folder))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
