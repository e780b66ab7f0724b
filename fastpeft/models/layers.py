"""PEFT's adapter layers, computed by fastpeft.kernels in plain cases and by PEFT in all others.

They differ from PEFT's classes in `forward` only and have no state of their own. A layer is therefore swapped, and
swapped back, by its __class__; saving, merging and loading stay PEFT's. Needs only torch, peft and the kernels.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar

import torch
from peft.tuners.adalora import SVDLinear as PeftSvdLinear
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn

from fastpeft.kernels import LoraMeasures, lora_linear
from fastpeft.kernels.ops.lora_linear.op import DTYPES, LARGEST_RANK


class RowMask:
    """The rows of the input over which layers measure their gradients. Shared by these layers."""

    def __init__(self) -> None:
        self.mask_T: torch.Tensor | None = None
        """(T,) bool; None: nothing is measured now."""

    def fits(self, x: torch.Tensor) -> bool:
        """Whether x holds the mask's tokens. A tensor with more than two dimensions before its features does not, such
        as DeBERTa's position table, which may have as many rows as there are tokens."""
        return self.mask_T is not None and x.ndim <= 3 and self.mask_T.numel() == x.shape[:-1].numel()


class Watch:
    """Makes a layer measure ||dL/dB||^2 in backward: `measures.db_square_masked` over `rows`, `db_square` over all."""

    def __init__(self, rows: RowMask) -> None:
        self.rows = rows
        self.measures = LoraMeasures()


class Call(NamedTuple):
    """The arguments of lora_linear besides x."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    watch: Watch | None
    scale: float
    dropout: float
    x_dtype: torch.dtype
    """Dtype that x and the bias are cast to."""
    y_dtype: torch.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.x_dtype)
        x = x.to(self.x_dtype)
        mask, measures = (None, None) if self.watch is None else (self.watch.rows.mask_T, self.watch.measures)
        y = lora_linear(
            x, self.weight, bias, self.lora_a, self.lora_b, self.scale, dropout=self.dropout, row_mask=mask,
            measures=measures,
        )  # fmt: skip
        return y.to(self.y_dtype)


class Together(Protocol):
    """Computes the layers of one parent in one call if they have the same x."""

    settled: bool

    def compute(self, layer: FusedLayer, x: torch.Tensor, call: Call) -> torch.Tensor: ...


class FusedLayer(nn.Module):
    """Base class placed before a layer class of PEFT's, which provides the attributes declared here."""

    base_layer: Any
    """nn.Linear, or bitsandbytes' Linear4bit."""
    lora_A: Any
    lora_B: Any
    """By adapter name: nn.Linear, in AdaLoRA's layers nn.Parameter."""
    lora_dropout: nn.ModuleDict
    lora_variant: dict[str, Any]
    scaling: dict[str, float]
    r: dict[str, int]
    in_features: int
    out_features: int
    cast_input_dtype_enabled: bool

    siblings: Together | None = None
    """The projections that may be computed together with this one."""
    probe: Any = None
    """During calibration: called as probe(x, weight, bias) instead of the layer."""
    watch: Watch | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.probe is not None:
            return self.probe(x, self.base_layer.weight, self.base_layer.bias)
        call = None if args or kwargs else self.plain_call(x)
        if call is None:
            return super().forward(x, *args, **kwargs)
        if self.siblings is None or torch.compiler.is_compiling():
            return call(x)
        return self.siblings.compute(self, x, call)

    def plain_call(self, x: torch.Tensor) -> Call | None:
        """The call that equals PEFT's forward and gradients up to rounding; None if PEFT's forward has to compute it.

        The conditions tested here must not change between a forward pass and its recomputation under gradient
        checkpointing.
        """
        name = active_adapter(self)
        if name is None or not (type(x) is torch.Tensor and x.dtype in DTYPES):
            return None
        weight, bias = self.base_layer.weight, self.base_layer.bias
        factors, dropout = self.factors(name), _dropout(self.lora_dropout[name])
        if factors is None or dropout is None:
            return None
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return None  # lora_linear assumes that they are frozen
        lora_a, lora_b, scale = factors
        if lora_a.shape[0] > LARGEST_RANK or not _PLAIN.issuperset((type(lora_a), type(lora_b))):
            return None
        if _transforms_active():
            return None
        dtypes = self._dtypes(x, lora_a, dropout)
        watch = self.watch if self.watch is not None and self.watch.rows.fits(x) else None
        return None if dtypes is None else Call(weight, bias, lora_a, lora_b, watch, scale, dropout, *dtypes)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A, B and s if the update is exactly s B A x; else None."""
        a, b = self.lora_A[name], self.lora_B[name]
        if not (is_bare(a, nn.Linear) and is_bare(b, nn.Linear)) or a.bias is not None or b.bias is not None:
            return None
        return None if name in self.lora_variant else (a.weight, b.weight, self.scaling[name])

    def _dtypes(self, x: torch.Tensor, lora_a: torch.Tensor, dropout: float) -> tuple[torch.dtype, torch.dtype] | None:
        """Dtypes of x in the computation and of y; None if the base layer is not plain."""
        base = self.base_layer
        weight, bias = base.weight, base.bias
        if not is_bare(base, nn.Linear) or type(weight) not in _PLAIN:
            return None
        if _autocasts(x):
            if torch.float64 in (x.dtype, weight.dtype, lora_a.dtype):
                return None  # autocast does not cast these
            return x.dtype, torch.get_autocast_dtype(x.device.type)
        if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
            return None
        return (x.dtype, x.dtype) if lora_a.dtype == x.dtype or self.cast_input_dtype_enabled else None


class LoraLinear(FusedLayer, PeftLoraLinear):
    """PEFT's LoRA layer over nn.Linear."""


class SvdLinear(FusedLayer, PeftSvdLinear):
    """PEFT's AdaLoRA layer, W x + s B diag(E) A x."""

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        return self.lora_A[name] * self.lora_E[name], self.lora_B[name], svd_scale(self, name)


def svd_scale(layer: FusedLayer, name: str) -> float:
    """PEFT's factor on B diag(E) A; `ranknum` stays the initial rank."""
    return layer.scaling[name] / (layer.r[name] + 1e-5)


class _Fused4bit(FusedLayer):
    """A LoRA layer over a 4-bit base, computed in the base's compute dtype."""

    def _dtypes(self, x: torch.Tensor, lora_a: torch.Tensor, dropout: float) -> tuple[torch.dtype, torch.dtype] | None:
        base, state = self.base_layer, getattr(self.base_layer.weight, "quant_state", None)
        if has_hooks(base) or type(base).forward is not sys.modules["bitsandbytes"].nn.Linear4bit.forward:
            return None
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return None
        if tuple(state.shape) != (self.out_features, self.in_features) or x.dtype == torch.float64:
            return None
        if not torch.is_grad_enabled() and not dropout:
            return None  # bitsandbytes' kernels that multiply without dequantising have no gradient
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True
        if _autocasts(x):
            return x.dtype, torch.promote_types(x.dtype, torch.get_autocast_dtype(x.device.type))
        if lora_a.dtype != x.dtype and not self.cast_input_dtype_enabled:
            return None
        return base.compute_dtype or x.dtype, x.dtype


def fused_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class that computes this layer by fastpeft.kernels; None if there is none."""
    if type(layer) is PeftLoraLinear:
        return LoraLinear
    bnb = sys.modules.get("peft.tuners.lora.bnb")  # loaded wherever a layer of it exists
    four_bit = getattr(bnb, "Linear4bit", None)
    return _fused_4bit(four_bit) if four_bit is not None and type(layer) is four_bit else None


@cache
def _fused_4bit(theirs: type[nn.Module]) -> type[nn.Module]:
    return type("LoraLinear4bit", (_Fused4bit, theirs), {"__doc__": "PEFT's LoRA layer over bitsandbytes' Linear4bit."})


def is_fused(layer: object) -> TypeGuard[FusedLayer]:
    return isinstance(layer, FusedLayer)


def never_plain(layer: Any) -> str | None:
    """Why PEFT has to compute a LoRA layer with any active adapter; None if the class of fused_class can."""
    kind, base = fused_class(layer), layer.base_layer
    if kind is None:
        return f"the layer is PEFT's {type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
    if kind is LoraLinear and type(base) is not nn.Linear:
        return f"the base layer is {type(base).__name__}, not nn.Linear"
    if has_hooks(base) or "forward" in layer.__dict__:
        return "the base layer has hooks, or its forward is wrapped"
    reasons = [_never_plain_adapter(layer, name) for name in layer.lora_A]
    told = {reason for reason in reasons if reason is not None}
    return None if None in reasons else ", ".join(sorted(told)) or "the layer has no adapter"


def _never_plain_adapter(layer: Any, name: str) -> str | None:
    if name in layer.lora_variant:
        return type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
    if layer.lora_B[name].bias is not None:
        return "lora_bias"
    rank = layer.lora_A[name].weight.shape[0]
    return f"rank {rank} is above {LARGEST_RANK}" if rank > LARGEST_RANK else None


# ---- what makes a layer plain ----------------------------------------------------------------

_Module = TypeVar("_Module", bound=nn.Module)
_PLAIN = {nn.Parameter, torch.Tensor}
# Without this function torch itself refuses lora_linear under vmap and other transforms.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_bare(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether the module is exactly of this class, and calling it runs only the class's forward."""
    return type(module) is kind and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # set by offloading
    )


def _autocasts(x: torch.Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # a meta tensor has none


def active_adapter(layer: Any) -> str | None:
    """The adapter that is added to the base layer's output; None unless there is exactly one."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return names[0] if len(names) == 1 else None


def _dropout(module: nn.Module) -> float | None:
    """Probability that an element is dropped in the current mode; None for modules other than nn.Dropout."""
    if is_bare(module, nn.Identity):
        return 0.0
    if not is_bare(module, nn.Dropout) or module.inplace or module.p >= 1:
        return None
    return module.p if module.training else 0.0
