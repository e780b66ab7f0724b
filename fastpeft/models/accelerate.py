"""fastpeft's LoRA layers in a model that PEFT has made, for any trainer: swapped in place, and undone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastpeft.errors import UserError
from fastpeft.models.fused_projections import join
from fastpeft.models.layers import fused_class, is_fused, never_plain


class Accelerated:
    """What accelerate() has changed; `undo()`, or the end of a `with` block, gives PEFT's own layers back."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        """LoRA layers that stay PEFT's: name and reason."""
        self.already: list[str] = []
        """LoRA layers that were fastpeft's before this call."""
        self._swapped: dict[str, tuple[nn.Module, type]] = {}
        self._hooks: list[RemovableHandle] = []

    @property
    def swapped(self) -> list[str]:
        """Names of the layers that this call has swapped."""
        return list(self._swapped)

    def undo(self) -> None:
        """Give the layers back their own class. A second call changes nothing."""
        for layer, theirs in self._swapped.values():
            if is_fused(layer):
                layer.__dict__.pop("siblings", None)
                layer.__class__ = theirs
        for hook in self._hooks:
            hook.remove()
        self._swapped, self._hooks = {}, []

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        parts = [f"{len(self._swapped)} LoRA layers swapped"]
        parts += [f"{len(self.already)} swapped before"] if self.already else []
        parts += [f"{count} kept: {reason}" for reason, count in Counter(self.kept.values()).items()]
        return f"Accelerated({'; '.join(parts)})"


def accelerate(model: nn.Module) -> Accelerated:
    """Compute the LoRA layers of a PEFT model by fastpeft.kernels, in place; nothing else of the model changes.

    Losses and gradients are PEFT's up to rounding; with LoRA dropout the masks come from other random numbers. A layer
    that is merged, disabled, of several adapters at a time, or a LoRA variant is computed by PEFT's own forward, for as
    long as it is that. Parameters, their names, saving, merging and switching adapters are PEFT's.

        with fastpeft.accelerate(model):
            trainer.train()

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers in it.

    Returns:
        What was swapped, and what was not and why; it can undo that.

    Raises:
        UserError: the model has no LoRA layer of PEFT's.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"accelerate: expected a model, got {type(model).__name__}")
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise UserError(
            f"accelerate: {type(model).__name__} has no LoRA layer of PEFT's; wrap it first, with "
            "peft.get_peft_model(model, peft.LoraConfig(...))"
        )
    done = Accelerated()
    for name, layer in layers.items():
        if is_fused(layer):
            done.already.append(name)
        elif (reason := never_plain(layer)) is not None:
            done.kept[name] = reason
        else:
            fused = fused_class(layer)
            assert fused is not None, "never_plain has said why not"
            done._swapped[name] = (layer, type(layer))
            layer.__class__ = fused
    done._hooks = join(model)
    return done
