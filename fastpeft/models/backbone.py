"""Load a pretrained encoder with a classification head. No code from a repository is ever run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft.config.schema import ModelConfig
from fastpeft.errors import UnavailableError, first_line
from fastpeft.models.files import fetch_model
from fastpeft.models.resolve import embedded_path

_HEAD_NAMES = ("classifier", "score")


@dataclass
class Backbone:
    model: nn.Module
    """A transformers sequence classifier, in eval mode, head in fp32."""
    tokenizer: Any
    head: list[str]
    """Top-level modules that are trained whole: the classifier and whatever has no pretrained weights."""
    reads_segments: bool
    """Whether the model has token type embeddings."""
    max_positions: int | None
    """Longest sequence that the model can take; None if unbounded."""
    dtype: torch.dtype
    """That the model computes in."""


def load_backbone(
    config: ModelConfig,
    label_names: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device,
    trained: bool = False,
) -> Backbone:
    """Load weights, tokenizer and a head for `label_names`; a missing head is initialised from torch's RNG.

    The weights are cast to `dtype`, but stay fp32 if they are to be `trained`.

    Raises:
        UnavailableError: a folder or repository that holds no usable model.
    """
    import transformers

    local = embedded_path(config.name) or Path(config.name).expanduser()
    from_hub = not local.is_dir()
    folder = fetch_model(config.name, config.revision) if from_hub else local
    common = {"local_files_only": True, "trust_remote_code": False}
    labels = dict(enumerate(label_names))
    try:
        with quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **common)
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=len(labels),
                id2label=labels,
                label2id={label: i for i, label in labels.items()},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=torch.float32,
                **common,
            )
    except Exception as error:  # a damaged file: each library that reads one has its own classes
        reason = first_line(error) or type(error).__name__
        raise UnavailableError(f"model.name {config.name}: cannot be loaded as a classifier: {reason}") from error
    if from_hub:
        model.name_or_path = model.config._name_or_path = config.name  # what the adapter names as its base
    if tokenizer.pad_token_id is None:
        raise UnavailableError(f"model.name {config.name}: its tokenizer has no padding token")
    head = _head_modules(model, info, config.name)
    freeze(model, head, torch.float32 if trained else dtype, device)
    settings = model.config
    positions = getattr(settings, "max_position_embeddings", None)
    if settings.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= 2  # its positions start after the padding index
    bounded = positions and getattr(settings, "position_biased_input", True)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        head=head,
        reads_segments=getattr(settings, "type_vocab_size", 0) > 1,
        max_positions=positions if bounded else None,
        dtype=dtype,
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers on the user's screen, and no warnings of PEFT about it."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a property that transformers renames
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of frozen weights and activations. `auto` is bf16 where it is native and faster, else fp32."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        return named[precision]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = can.get("amx_bf16", False) or can.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def freeze(model: nn.Module, head: list[str], dtype: torch.dtype, device: torch.device) -> None:
    """Move the model to `device` in `dtype`, its head in fp32, with no parameter that asks for a gradient."""
    model.requires_grad_(False)
    model.to(device=device, dtype=dtype)
    for module in head:
        _keep_fp32(model.get_submodule(module))


def _head_modules(model: nn.Module, info: dict[str, Any], name: str) -> list[str]:
    """The classifier, and modules beside the encoder that the checkpoint has no weights for."""
    children = dict(model.named_children())
    lacking = set(info["missing_keys"]) | {key for key, *_ in info.get("mismatched_keys", ())}
    fresh = {key.split(".")[0] for key in lacking}
    encoder = getattr(model, "base_model_prefix", "")
    if encoder in fresh:
        inner = sorted(k for k in lacking if k.startswith(f"{encoder}.") and ".pooler." not in k)
        if inner:
            raise UnavailableError(
                f"model.name {name}: the checkpoint lacks {len(inner)} weights of the encoder, such as {inner[0]}"
            )
        fresh = (fresh - {encoder}) | {f"{encoder}.pooler"}
    return [n for n in children if n in fresh or n in _HEAD_NAMES] + sorted(n for n in fresh if "." in n)


def _keep_fp32(module: nn.Module) -> None:
    """Hold a head in fp32 whatever dtype reaches it."""

    def widen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)

    module.float()
    module.register_forward_pre_hook(widen)
