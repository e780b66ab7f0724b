"""The interface of a fine-tuning method, and the lookup of a method by its name."""

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
"""Parts of a parameter's name in a PeftModel that PEFT's file leaves out."""


def method_class(name: str) -> type[Adapter]:
    """The class of the named method, imported on first use."""
    return METHODS.load(name)


@dataclass(frozen=True)
class Importance:
    """Importance of each block, as parallel lists in the order of the adapter's blocks."""

    names: list[str]
    layer: list[int]
    projection: list[str]
    sensitivity: list[float]
    """s_k: mean ||dL/dW_k||_F."""
    weights: list[float]
    """w_k: the sensitivities, normalised."""
    ranks: list[int] | None = None
    """Number of unpruned ranks; None for methods that do not prune."""


class Adapter(ABC):
    """A method, attached to a model. The loop calls every hook in every step; a hook does nothing by default."""

    model: nn.Module
    flat: FlatParameters
    blocks: Sequence[Block] = ()
    """Groups of parameters to which a schedule may give separate learning rates. Parameters in no block, such as the
    head's, use the common learning rate."""
    saved_as: str = "adapter"
    """Folder for `save` in a run's folder; the best checkpoint goes to `<saved_as>_best`."""
    export_format: str = "own"
    """Format that `save` writes: `peft`, an adapter that PEFT loads; `transformers`, a whole model; or another word for
    a format that only this method's `load` reads."""
    routes: bool = False
    """True if the update depends on the token, so that neither a LoRA nor merged weights can represent it."""
    weight_files: str = "*.safetensors"
    """Pattern of the files of `save` that hold weights. The adapter's size is their total size."""
    trains_backbone: bool = False
    """True if the backbone's own weights are trained, which then have to be fp32."""
    needs_one_rank: str = ""
    """Why several ranks cannot train this method together; empty if they can."""
    calibration_batches: int = 0
    """Number of batches that the method reads before training, without updates."""
    importance_version: int = 0
    """Incremented whenever the importances change."""

    @classmethod
    @abstractmethod
    def build(cls, config: AdapterConfig, own: Any, backbone: Backbone) -> Self:
        """Attach the method to `backbone.model`, which is changed in place.

        Args:
            config: the section `adapter`, which all methods share.
            own: the method's own section; None for methods without one.
        """

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Context of the calibration batches. On exit every parameter has its former value."""
        yield

    def before_calibration_batch(self) -> None: ...

    def after_calibration_batch(self, loss_scale: float) -> bool:
        """Called with the gradients of one whole batch in the flat buffer, unscaled. Gradients kept by the method's
        own layers are still multiplied by `loss_scale`. Returns False on overflow: retry with a smaller scale."""
        return True

    def discard_pass(self) -> None:
        """Called when a batch ran out of memory and is repeated: discard what the layers kept of it."""

    def finish_calibration(self) -> None:
        """Called after the last calibration batch."""

    def after_backward(self, signals: Signals, progress: float) -> None:
        """Add the method's own gradient, and its measurements to `signals`."""

    def after_step(self, signals: Signals, rates: Rates, progress: float) -> None:
        """Called after the parameters are updated, before the gradients are cleared."""

    def host_work(self) -> str | None:
        """Why a step needs the host, so that it cannot be captured in a CUDA graph; None if it can be captured.
        The hooks of a captured step read no values from the device and not `progress`, write their buffers in place,
        and run the same operations each time. Methods with hooks count as needing the host unless they override this.
        """
        own, base = type(self), Adapter
        if (own.after_backward, own.after_step) == (base.after_backward, base.after_step):
            return None
        return "its hooks are not known to leave the host alone"

    @property
    def adapted(self) -> list[str]:
        """Names of the adapted modules."""
        return [block.name for block in self.blocks]

    def facts(self) -> dict[str, float]:
        """Entries about the adapter in result.json, besides its size. Synchronizes with the device."""
        return {}

    def importance(self) -> Importance | None:
        """The current importances; None before there are any. Synchronizes with the device."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """State for a resume, besides the flat parameters: tensors and JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the trained weights in `export_format` into an existing empty folder."""

    def load(self, folder: Path) -> None:
        """Load the weights that `save` wrote into `folder` into the same buffers, bit for bit.

        This implementation reads files with the parameter names of PEFT or transformers. A method with its own format
        overrides it.
        """
        stored = read_weights(folder)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(stored[NOT_SAVED.sub("", name)])

    def describe(self) -> list[str]:
        """Lines for the user: which modules were matched and what is trained."""
        return []


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files."""
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    return stored


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters other than LoRA factors, in the model's order."""
    return [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]


def to_json(importance: Importance, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(importance).items() if value is not None} | more
