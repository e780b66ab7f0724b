"""The task head of a host. It is trained together with the adapter, but stored in a separate file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone

HEAD_FILE = "head.safetensors"


def head_of(model: nn.Module, head: list[str]) -> dict[str, nn.Parameter]:
    """Parameters of the head by their names in the model; `head` as in Backbone."""
    return {f"{top}.{name}": p for top in head for name, p in model.get_submodule(top).named_parameters()}


def save_head(head: Mapping[str, nn.Parameter], folder: Path) -> None:
    if head:
        tensors = {name: p.detach().cpu().contiguous().clone() for name, p in head.items()}
        save_file(tensors, folder / HEAD_FILE, metadata={"format": "pt"})


def load_head(head: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Raises UserError if the folder has no head of this shape."""
    if not head:
        return
    try:
        stored = load_file(folder / HEAD_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / HEAD_FILE}: cannot be read: {error}") from None
    if {n: p.shape for n, p in head.items()} != {n: t.shape for n, t in stored.items()}:
        raise UserError(f"{folder / HEAD_FILE}: is of another head than this model's: {', '.join(sorted(stored))}")
    for name, parameter in head.items():
        parameter.data.copy_(stored[name])


def refuse_new_tokens(backbone: Backbone) -> None:
    """Raises UserError if the tokenizer has more tokens than the model, because these methods train no embeddings."""
    if backbone.new_tokens:
        raise UserError(
            f"model.name {backbone.model.name_or_path}: its tokenizer has tokens that the model has no embedding for, "
            "and this method trains none; take method lora"
        )
