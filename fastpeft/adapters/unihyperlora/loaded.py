"""Attach the file of an adapter to a model of the user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fastpeft.adapters.unihyperlora import file_format
from fastpeft.adapters.unihyperlora.attach import overhead, projections
from fastpeft.adapters.unihyperlora.dictionary import Dictionary
from fastpeft.adapters.unihyperlora.heads import HEAD_FILE, load_head
from fastpeft.adapters.unihyperlora.layer import Host
from fastpeft.adapters.unihyperlora.sites import find_sites
from fastpeft.errors import UserError, first_line
from fastpeft.models.lm_head import decoder_of, output_embeddings


@dataclass
class LoadedAdapter:
    """A model with an attached adapter; `detach()` removes the adapter."""

    host: Host
    num_bytes: int
    """Size of the file."""
    extra_flops: float
    """FLOPs of the adapter as a fraction of the model's own."""
    source: dict[str, Any]
    """Description of the host that the adapter was trained on."""
    notes: list[str]

    def detach(self) -> None:
        self.host.detach()

    def __str__(self) -> str:
        return (
            f"UniHyperLoRA adapter of {self.num_bytes / 2**20:.3f} MB on {len(self.host.sites)} matrices, "
            f"{self.extra_flops:.1%} extra FLOPs; trained on {self.source.get('name') or 'an unnamed host'}"
        )


def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    task: str | None = None,
    head: bool = True,
    quiet: bool = False,
) -> LoadedAdapter:
    """Attach the file of an adapter to a transformers model in place. Prints the adapter's size.

    The model need not be the one that the adapter was trained on.

    Args:
        model: a model of any width and depth, whose linear layers have known roles. Its weights are not changed.
        path: the file, or the run's folder that contains it.
        tokenizer: the model's tokenizer, for the projector `probe`; None loads it from the model's own path.
        task: name of the task whose embedding the router uses; None or an unknown name: the mean of all.
        head: also load the task head stored beside the file, if it has the shape of the model's.
        quiet: print nothing.

    Returns:
        The adapted model's handle, with the adapter's size, cost and source.

    Raises:
        UserError: the file is missing, damaged, truncated, of a newer version, or larger than its header says; the
            adapter does not fit the model.
    """
    path = Path(path).expanduser()
    path = path / file_format.FILE if path.is_dir() else path
    stored = file_format.decode(path)
    notes: list[str] = []
    roles = stored.host.get("roles") or []
    sites = [site for site in find_sites(model, [], "all-linear", notes) if not roles or site.role in roles]
    device = next(model.parameters()).device
    dictionary = Dictionary(stored.shape).to(device)
    file_format.restore(dictionary, stored)
    dictionary.requires_grad_(False)
    if stored.shape.projector == "probe" and tokenizer is None:
        tokenizer = _tokenizer_of(model)
    fixed = projections(model, tokenizer, sites, stored.shape, stored.codes)
    number = stored.shape.tasks.index(task) if task in stored.shape.tasks else None
    entry_points = [model, *([decoder_of(model)] if output_embeddings(model) is not None else [])]  # type: ignore[arg-type]
    host = Host(model, entry_points, sites, dictionary, fixed, number, getattr(tokenizer, "pad_token_id", None))
    notes.append(_take_head(model, path.parent) if head else "the head is the model's own")
    loaded = LoadedAdapter(host, stored.num_bytes, overhead(model, sites, stored.shape), stored.host, notes)
    if not quiet:
        print("\n".join([str(loaded), *notes]))
    return loaded


def _take_head(model: nn.Module, folder: Path) -> str:
    """Load the head beside the file; returns a note on what was done."""
    path = folder / HEAD_FILE
    if not path.is_file():
        return "no head lies beside the adapter: the model's own is used"
    own = dict(model.named_parameters())
    stored = load_file(path)
    if any(name not in own or own[name].shape != tensor.shape for name, tensor in stored.items()):
        return f"{path} is of another host: the model's own head is used"
    with torch.no_grad():
        load_head({name: own[name] for name in stored}, folder)
    return f"the head is that of {path}"


def _tokenizer_of(model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the error, the user has to pass a tokenizer
        raise UserError(
            f"projector probe: reads words with the model's tokenizer, and none is found at {name!r} "
            f"({first_line(error)}); give tokenizer="
        ) from None
