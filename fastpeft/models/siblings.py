"""Projections that are given the very same x, such as query, key and value, are computed in one go.

A model calls them one by one. While their parent is running, the first call computes those that follow as well, and
they take their results. Which ones follow is learnt from earlier runs of the parent. A result is handed out once, only
to the layer that it was computed for, only for the same tensor in the same version, with the same weights in the same
versions, in the same gradient mode, within the same run of the parent; in any other case the layer computes its own.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastpeft.kernels import lora_linear_grouped
from fastpeft.models.layers import Call, is_fused

_LESSONS = 3
"""So many runs of the parent are looked at; one whose calls vary is left alone after that."""


class _Result(NamedTuple):
    name: str
    call: Call
    versions: tuple[int, ...]
    y: torch.Tensor


class _Run:
    """One run of the parent."""

    def __init__(self, parent: nn.Module) -> None:
        self.parent = parent
        self.calls: list[str] = []
        self.starts: list[int] = []
        """Numbers of the calls whose x is not that of the call before."""
        self.last_x: weakref.ref | None = None
        self.x: torch.Tensor | None = None
        self.x_version = 0
        self.with_grad = False
        self.waiting: list[_Result] = []

    def note(self, name: str, x: torch.Tensor) -> int:
        """Number of this call."""
        number = len(self.calls)
        if self.last_x is None or self.last_x() is not x:
            self.starts.append(number)
            self.last_x = weakref.ref(x)
        self.calls.append(name)
        return number

    def drop(self) -> None:
        self.x = None
        self.waiting.clear()


class _ThisThread(threading.local):
    run: _Run | None = None


class Siblings:
    """The layers of one parent, by their names in it."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.lessons = 0
        self.groups: dict[int, tuple[str, ...]] = {}
        """Number of a call within a run of the parent: the layers that are called with that x, from this one on."""
        self._now = _ThisThread()

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "lessons": self.lessons, "groups": self.groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._now = _ThisThread()

    # ---- hooks of the parent ----

    def enter(self, parent: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._now.run = _Run(parent)

    def leave(self, parent: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        run, self._now.run = self._now.run, None
        if run is None or run.parent is not parent:
            return
        if run.waiting:
            self._forget(run)
        elif not self.groups and run.calls and self.lessons < _LESSONS:
            self._learn(run)

    def _learn(self, run: _Run) -> None:
        self.lessons += 1
        for start, end in zip(run.starts, [*run.starts[1:], len(run.calls)]):
            names = tuple(run.calls[start:end])
            if len(names) > 1 and len(set(names)) == len(names):
                self.groups[start] = names

    def _forget(self, run: _Run) -> None:
        """What was foreseen did not come."""
        run.drop()
        self.groups = {}

    # ---- calls of the layers ----

    def compute(self, layer: nn.Module, x: torch.Tensor, call: Call) -> torch.Tensor:
        run = self._now.run
        name = None if run is None else self._name(layer, run)
        if name is None:
            return call(x)
        number = run.note(name, x)
        if run.waiting:
            y = self._take(run, name, x, call)
            if y is not None:
                return y
            self._forget(run)
        group = self.groups.get(number, ())
        if group[:1] != (name,) or not _may_group(x, call):
            return call(x)
        return self._compute_group(run, group, x, call)

    def _name(self, layer: nn.Module, run: _Run) -> str | None:
        there = run.parent._modules
        return next((name for name in self.names if there.get(name) is layer), None)

    def _take(self, run: _Run, name: str, x: torch.Tensor, call: Call) -> torch.Tensor | None:
        first = run.waiting[0]
        fits = (
            first.name == name
            and run.x is x
            and run.x_version == x._version
            and run.with_grad == torch.is_grad_enabled()
            and _same(first.call, call)
            and first.versions == _versions(call)
        )
        if not fits:
            return None
        run.waiting.pop(0)
        if not run.waiting:
            run.drop()
        return first.y

    def _compute_group(self, run: _Run, names: tuple[str, ...], x: torch.Tensor, call: Call) -> torch.Tensor:
        layers = [run.parent._modules[name] for name in names[1:]]
        calls = [call, *(layer.plain_call(x) for layer in layers)]
        alike = all(c is not None and c[-3:] == call[-3:] for c in calls)
        if not alike or any(_is_inference(tensor) for c in calls for tensor in c[:4]):
            return call(x)
        low = x.to(call.x_dtype)
        ys = lora_linear_grouped(
            low,
            [c.weight for c in calls],
            [None if c.bias is None else c.bias.to(call.x_dtype) for c in calls],
            [c.lora_a for c in calls],
            [c.lora_b for c in calls],
            [c.scale for c in calls],
            dropout=call.dropout,
        )
        y, *rest = (y.to(call.y_dtype) for y in ys)
        run.x, run.x_version, run.with_grad = x, x._version, torch.is_grad_enabled()
        run.waiting = [_Result(n, c, _versions(c), r) for n, c, r in zip(names[1:], calls[1:], rest)]
        return y


def join(model: nn.Module) -> list[RemovableHandle]:
    """Let the layers of each parent be computed together. Returns the parents' hooks; without them each is alone."""
    hooks = []
    for parent in list(model.modules()):
        layers = {name: child for name, child in parent.named_children() if is_fused(child)}
        if len(layers) < 2 or all(layer.siblings is not None for layer in layers.values()):
            continue
        siblings = Siblings(list(layers))
        for layer in layers.values():
            layer.siblings = siblings
        hooks.append(parent.register_forward_pre_hook(siblings.enter))
        hooks.append(parent.register_forward_hook(siblings.leave, always_call=True))
    return hooks


def _may_group(x: torch.Tensor, call: Call) -> bool:
    """Not where a forward pass may be repeated otherwise than it was: checkpointing counts what is saved, and draws."""
    if x.is_inference() or torch.is_inference_mode_enabled():
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    repeats = not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1
    return not (call.dropout and repeats)


def _is_inference(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_inference()


def _versions(call: Call) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in call[:4] if tensor is not None)


def _same(one: Call, other: Call) -> bool:
    return all(a is b for a, b in zip(one[:4], other[:4])) and one[4:] == other[4:]
