"""Joint computation of projections of the same input tensor, such as query, key and value.

A model calls them one by one. During a forward pass of their parent, the first call computes the whole group, and the
following calls return the stored results. The groups are learnt from earlier forward passes of the parent. A result is
used once, only by the layer that it was computed for, only for the same tensor and weights in the same versions, in the
same gradient mode, within the same forward pass of the parent. In any other case the layer computes its own.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastpeft.kernels import lora_linear_grouped
from fastpeft.models.layers import Call, FusedLayer, RowMask, SvdLinear, is_fused

_LESSONS = 3
"""Forward passes observed before grouping is decided. A module whose call order varies is never grouped."""


class _Result(NamedTuple):
    """A result stored for the layer that it was computed for."""

    name: str
    y: torch.Tensor
    basis: tuple
    kept: tuple
    """The tensors of `basis`, kept alive so that their ids are not reused."""


class _Run:
    """One forward pass of the parent."""

    def __init__(self, parent: nn.Module) -> None:
        self.parent = parent
        self.calls: list[list[str]] = []
        """The called layers in order; consecutive layers with the same x form one list."""
        self.waiting: list[_Result] = []
        self._last_x: weakref.ref | None = None

    def note(self, name: str, x: torch.Tensor) -> None:
        if self._last_x is None or self._last_x() is not x:
            self.calls.append([])
            self._last_x = weakref.ref(x)
        self.calls[-1].append(name)

    def take(self, name: str, x: torch.Tensor, call: Call) -> torch.Tensor | None:
        """The next stored result if it equals `call(x)`; else None."""
        first = self.waiting[0]
        return self.waiting.pop(0).y if first.name == name and first.basis == _basis(x, call) else None


class _ThisThread(threading.local):
    run: _Run | None = None


class Siblings:
    """The layers of one parent, by their names in it."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.lessons = 0
        self.groups: dict[int, list[str]] = {}
        """Index of an input within a forward pass of the parent, from 0 -> the layers called with it."""
        self.settled = False
        """The groups are final."""
        self._now = _ThisThread()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_now"}

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
        elif not self.groups and run.calls and not self.settled and self.lessons < _LESSONS:
            self.lessons += 1
            together = {i: names for i, names in enumerate(run.calls) if len(names) > 1}
            self.groups = {i: names for i, names in together.items() if len(set(names)) == len(names)}

    def _forget(self, run: _Run) -> None:
        """Called when the expected calls did not follow."""
        run.waiting.clear()
        if not self.settled:
            self.groups = {}

    # ---- calls of the layers ----

    def compute(self, layer: FusedLayer, x: torch.Tensor, call: Call) -> torch.Tensor:
        run = self._now.run
        name = None if run is None else self._name(layer, run)
        if run is None or name is None:
            return call(x)
        run.note(name, x)
        if run.waiting:
            y = run.take(name, x, call)
            if y is not None:
                return y
            self._forget(run)
        group = self.groups.get(len(run.calls) - 1)
        if group is None or run.calls[-1] != group[:1] or not _may_group(x, call):
            return call(x)
        return _compute_group(run, group, x, call)

    def _name(self, layer: nn.Module, run: _Run) -> str | None:
        there = run.parent._modules
        return next((name for name in self.names if there.get(name) is layer), None)


def _compute_group(run: _Run, names: list[str], x: torch.Tensor, call: Call) -> torch.Tensor:
    """Compute all of `names`; returns y of the first and stores the others."""
    others = [run.parent._modules.get(name) for name in names[1:]]
    plain = [layer.plain_call(x) if is_fused(layer) else None for layer in others]
    calls = [call, *(c for c in plain if c is not None and c[-3:] == call[-3:] and _rows(c) is _rows(call))]
    if len(calls) < len(names) or any(tensor.is_inference() for c in calls for tensor in _tensors(c)):
        return call(x)
    rows = _rows(call)
    ys = lora_linear_grouped(
        x.to(call.x_dtype),
        [c.weight for c in calls],
        [None if c.bias is None else c.bias.to(call.x_dtype) for c in calls],
        [c.lora_a for c in calls],
        [c.lora_b for c in calls],
        [c.scale for c in calls],
        dropout=call.dropout,
        row_mask=None if rows is None else rows.mask_T,
        measures=None if rows is None else [c.watch.measures for c in calls if c.watch is not None],
    )
    y, *rest = (y.to(call.y_dtype) for y in ys)
    run.waiting = [_Result(n, r, _basis(x, c), (x, c)) for n, c, r in zip(names[1:], calls[1:], rest)]
    return y


def _rows(call: Call) -> RowMask | None:
    """The RowMask over which the layer measures its gradient."""
    return None if call.watch is None else call.watch.rows


def _basis(x: torch.Tensor, call: Call) -> tuple:
    """Everything that `call(x)` depends on: tensors and their versions, numbers, gradient mode."""
    tensors = ((id(t), None if t.is_inference() else t._version) for t in (x, *_tensors(call)))
    return *tensors, *call[4:], torch.is_grad_enabled()


def _tensors(call: Call) -> list[torch.Tensor]:
    return [tensor for tensor in call[:4] if tensor is not None]


def _may_group(x: torch.Tensor, call: Call) -> bool:
    """False where a forward pass may be recomputed: gradient checkpointing compares saved tensors and random draws."""
    if x.is_inference() or torch.is_inference_mode_enabled():
        return False
    try:
        autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue] (a submodule that torch has loaded)
        saves_elsewhere = autograd._top_saved_tensors_default_hooks(True) is not None
        in_backward = torch._C._current_graph_task_id() != -1
    except (AttributeError, TypeError):
        return False  # this torch lacks the query
    return not saves_elsewhere and not (call.dropout and (in_backward or not torch.is_grad_enabled()))


# ---- whole models ----------------------------------------------------------------------------


def join(model: nn.Module) -> list[RemovableHandle]:
    """Enable joint computation of the layers of each parent. Returns the parents' hooks; removing them disables it."""
    hooks = []
    for parent in list(model.modules()):
        layers = {name: child for name, child in parent.named_children() if _can_join(child)}
        if len(layers) < 2 or all(layer.siblings is not None for layer in layers.values()):
            continue
        siblings = Siblings(list(layers))
        for layer in layers.values():
            layer.siblings = siblings
        hooks.append(parent.register_forward_pre_hook(siblings.enter))
        hooks.append(parent.register_forward_hook(siblings.leave, always_call=True))
    return hooks


def _can_join(layer: nn.Module) -> TypeGuard[FusedLayer]:
    """False for SvdLinear, which builds a new A in each call, so that a stored result could never be matched."""
    return is_fused(layer) and not isinstance(layer, SvdLinear)


def join_settled(model: nn.Module, **inputs: torch.Tensor) -> None:
    """`join`, with the groups learnt at once from a forward pass on `inputs`, and fixed afterwards.

    The result of a forward pass then does not depend on earlier passes: a resumed run, or a batch repeated after an
    error, has the same rounding as an uninterrupted run. Training modes and random number generators keep their state.
    If the forward pass fails, the layers for which it learnt no group are computed one by one.
    """
    join(model)
    modes = [(module, module.training) for module in model.modules()]
    devices = {tensor.device for tensor in inputs.values() if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()(**inputs)
    except Exception:  # models raise different types for inputs that they do not support
        pass
    finally:
        for module, training in modes:
            module.training = training
    for module in model.modules():
        if is_fused(module) and module.siblings is not None:
            module.siblings.settled = True
