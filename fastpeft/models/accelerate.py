"""Swap fastpeft's LoRA layers into a PEFT model in place, for any trainer, and undo it."""

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
    """The changes of one accelerate() call. `undo()`, or the end of a `with` block, restores PEFT's layers."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        """LoRA layers that were not swapped: name and reason."""
        self.already: list[str] = []
        """LoRA layers that an earlier call had swapped."""
        self._swapped: dict[str, tuple[nn.Module, type]] = {}
        self._hooks: list[RemovableHandle] = []

    @property
    def swapped(self) -> list[str]:
        """Names of the layers that this call swapped."""
        return list(self._swapped)

    def undo(self) -> None:
        """Restore the layers' own classes. A second call has no effect."""
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
    """Compute the LoRA layers of a PEFT model by fastpeft.kernels. Changes the layers' classes in place, nothing else.

    Losses and gradients equal PEFT's up to rounding; with LoRA dropout the masks use other random numbers. PEFT's own
    forward computes a layer while it is merged, disabled, a LoRA variant, or has several active adapters. Parameters,
    their names, saving, merging and switching adapters stay PEFT's.

        with fastpeft.accelerate(model):
            trainer.train()

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers in it.

    Returns:
        An Accelerated, with the names of swapped layers and the reasons for the others. It can undo the swap.

    Raises:
        UserError: the model has no LoRA layer of PEFT.
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
