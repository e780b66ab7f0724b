"""The interface of a fine-tuning method, and how one is found by its name."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import nn

from fastpeft.adapters.blocks import Block
from fastpeft.adapters.flat import FlatParameters
from fastpeft.config.methods import METHODS, AdapterConfig
from fastpeft.models.backbone import Backbone
from fastpeft.models.inject import ADAPTER_NAME
from fastpeft.signals import Rates, Signals

NOT_SAVED = re.compile(rf"\.modules_to_save|\.{ADAPTER_NAME}(?=\.|$)")
"""Parts of a parameter's name in a PeftModel that its file does not have."""


def method_class(name: str) -> type[Adapter]:
    """The class of the method that a run names, imported now."""
    return METHODS.load(name)


@dataclass(frozen=True)
class Importance:
    """How much each block matters; parallel lists in the adapter's order."""

    names: list[str]
    layer: list[int]
    projection: list[str]
    sensitivity: list[float]
    """s_k: mean ||dL/dW_k||_F."""
    weights: list[float]
    """w_k: the sensitivities, normalised."""
    ranks: list[int] | None = None
    """Live ranks, where a method prunes them."""


class Adapter(ABC):
    """A method, attached to a model. The loop calls every hook at every step; they do nothing by default."""

    model: nn.Module
    flat: FlatParameters
    blocks: Sequence[Block] = ()
    """What a schedule may give learning rates of their own; parameters outside of them, as the head's, have the common
    one."""
    saved_as: str = "adapter"
    """Folder for `save` in a run's folder; the best one goes to `<saved_as>_best`."""
    export_format: str = "own"
    """What `save` writes: `peft`, an adapter that PEFT loads; `transformers`, a whole model; or another word: a format
    that only `load` of this method reads."""
    routes: bool = False
    """The update depends on the token, so that neither a LoRA nor merged weights hold it."""
    weight_files: str = "*.safetensors"
    """Pattern of the files of `save` that hold weights; their size is the adapter's."""
    trains_backbone: bool = False
    """The backbone's own weights are trained, so they have to be fp32."""
    needs_one_rank: str = ""
    """Why several ranks cannot train it together; empty where they can."""
    calibration_batches: int = 0
    """Batches that the method wants to see, without being updated, before training."""
    importance_version: int = 0
    """Counts up whenever the importances change."""

    @classmethod
    @abstractmethod
    def build(cls, config: AdapterConfig, own: Any, backbone: Backbone) -> Self:
        """Attach to `backbone.model`, which is changed in place.

        Args:
            config: the section `adapter`, which methods share.
            own: the method's own section; None where its entry has no Config.
        """

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Around the calibration batches; leaves every parameter as it was."""
        yield

    def before_calibration_batch(self) -> None: ...

    def after_calibration_batch(self, loss_scale: float) -> bool:
        """Gradients of one whole batch are in the flat buffer, unscaled; those that the method's own
        layers kept are still multiplied by `loss_scale`. False: it overflowed; try a smaller scale."""
        return True

    def discard_pass(self) -> None:
        """A batch ran out of memory midway and begins again: forget what layers kept of it."""

    def finish_calibration(self) -> None:
        """All calibration batches have been seen."""

    def after_backward(self, signals: Signals, progress: float) -> None:
        """Add the method's own gradient, and its measurements to `signals`."""

    def after_step(self, signals: Signals, rates: Rates, progress: float) -> None:
        """Parameters are updated, gradients still present."""

    def host_work(self) -> str | None:
        """What a step leaves to the host, so that it cannot be captured once and replayed; None where that is nothing.
        The hooks of such a step read neither the device nor `progress`, write their buffers in place, and do the same
        operations each time. A method with hooks is taken to be none of these unless it says so."""
        own, base = type(self), Adapter
        if (own.after_backward, own.after_step) == (base.after_backward, base.after_step):
            return None
        return "its hooks are not known to leave the host alone"

    @property
    def adapted(self) -> list[str]:
        """Names of the modules that are adapted."""
        return [block.name for block in self.blocks]

    def facts(self) -> dict[str, float]:
        """What result.json says of the adapter beside its size. Reads the device."""
        return {}

    def importance(self) -> Importance | None:
        """Reads the device. None while there is none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides the flat parameters: tensors and JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was trained, as `export_format` says, into an existing empty folder."""

    def load(self, folder: Path) -> None:
        """Take back the weights that `save` wrote into `folder`, into the same buffers, bit for bit.

        This reads files in which parameters bear the names that PEFT or transformers gives them. A format of a method's
        own needs its own `load`.
        """
        stored = read_weights(folder)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(stored[NOT_SAVED.sub("", name)])

    def describe(self) -> list[str]:
        """Lines that tell the user what was matched and what is trained."""
        return []


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files."""
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    return stored


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters that are no LoRA factors, in the model's order."""
    return [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]


def to_json(importance: Importance, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(importance).items() if value is not None} | more
