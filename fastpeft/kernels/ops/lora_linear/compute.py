"""Forward and backward of lora_linear, for one or several projections of one x, each part in the form chosen for it.

Shape suffixes: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from fastpeft.kernels import dispatch
from fastpeft.kernels.dropout import keep_mask
from fastpeft.kernels.ops.lora_linear import configs, split
from fastpeft.kernels.ops.lora_linear.quantised import dequantised, is_quantised

Pair = tuple[torch.Tensor, torch.Tensor]

MERGE_FROM = 2
"""merges() is true from this ratio on: the elements of x and y over those of W."""


@dataclass(eq=False)
class LoraMeasures:
    """Statistics that lora_linear computes in backward. A call fills in the object passed to it; a later call
    overwrites it.

    All are at least fp32 (fp64 where the factors are) and carry no gradient.
    """

    db_square: torch.Tensor | None = None
    """||dL/dB||_F^2, a scalar tensor, after backward; None where lora_b needs no gradient."""
    db_square_masked: torch.Tensor | None = None
    """The same for the part of dL/dB that comes from the rows in `row_mask`; None without a mask."""


@dataclass(frozen=True)
class Part:
    """One projection without its factors A and B."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    seed: torch.Tensor | None
    measures: LoraMeasures | None


@dataclass(frozen=True)
class Call:
    parts: list[Part]
    dropout: float
    row_mask_T: torch.Tensor | None


def _fused() -> ModuleType:
    from fastpeft.kernels.ops.lora_linear import fused

    return fused


def _choose(operation: str, x: torch.Tensor, a_RI: torch.Tensor, num_out: int) -> dispatch.Choice:
    if not dispatch.runs_triton(x):
        return dispatch.Choice("split")
    return dispatch.choose(operation, x, a_RI.shape[1], num_out, a_RI.shape[0], x.shape[0])


def _kept(x_TI: torch.Tensor, seed: torch.Tensor | None, dropout: float) -> split.Kept:
    assert seed is not None, "dropout has a seed"
    num_rows, num_columns = x_TI.shape
    return split.Kept(keep_mask(num_rows, num_columns, dropout, seed, x_TI.dtype), 1 / (1 - dropout))


# ---- forward ---------------------------------------------------------------------------------


def merges(x_TI: torch.Tensor, call: Call, factors: list[Pair]) -> bool:
    """Whether x is multiplied by W + s B A in one product, on a CPU without dropout.

    Forward and backward each form the sum, which pays off from a few hundred rows on. It is never used in half
    precision, where adding a small update to W would round it away.
    """
    if x_TI.is_cuda or dispatch.runs_triton(x_TI) or call.dropout or x_TI.dtype.itemsize < 4:
        return False
    if any(is_quantised(part.weight) for part in call.parts):
        return False
    outs, num_in = [b.shape[0] for _, b in factors], x_TI.shape[1]
    return x_TI.shape[0] * (sum(outs) + num_in) >= MERGE_FROM * sum(outs) * num_in


def forward(
    x_TI: torch.Tensor, call: Call, factors: list[Pair]
) -> tuple[list[torch.Tensor], Sequence[torch.Tensor | None]]:
    """y and s D(x) A^T of each projection, the latter None if backward recomputes it. `factors` have the dtype of x."""
    if merges(x_TI, call, factors):
        for part in call.parts:
            _forget_measures(part)
        ys = [
            torch.nn.functional.linear(x_TI, split.merged(part.weight, *pair, part.scale), part.bias)
            for part, pair in zip(call.parts, factors)
        ]
        return ys, [None] * len(ys)
    choices = [_choose("lora_forward", x_TI, a, b.shape[0]) for a, b in factors]
    inline = [
        configs.inline(choice.form, a.shape[0], call.dropout, a.dtype) for choice, (a, _) in zip(choices, factors)
    ]
    shared = None
    if len(factors) > 1 and not call.dropout and not all(inline):
        shared = _shared_products(x_TI, [a for a, _ in factors], call, choices[0])
    ys, products = [], []
    for i, (part, choice, (a, b)) in enumerate(zip(call.parts, choices, factors)):
        weight = dequantised(part.weight, x_TI.dtype)
        s = shared[i] if shared else None
        if s is None and not inline[i]:
            s = _product(x_TI, a, part, call.dropout, choice)
        if choice.form == "split":
            assert s is not None, "split is never inline"
            y = split.forward(x_TI, weight, part.bias, s, b)
        else:
            y, s = _fused().matmul(x_TI, weight, part.bias, a, b, s, part.scale, choice.config, forward=True)
        _forget_measures(part)
        ys.append(y)
        products.append(s)
    return ys, products


def _forget_measures(part: Part) -> None:
    if part.measures:
        part.measures.db_square = part.measures.db_square_masked = None


def _product(
    x_TI: torch.Tensor, a_RI: torch.Tensor, part: Part, dropout: float, choice: dispatch.Choice
) -> torch.Tensor:
    """s D(x) A^T of one projection."""
    if choice.form != "split":
        dropped = _fused().Dropout(dropout, part.seed) if dropout else None
        return _fused().skinny(x_TI, a_RI, part.scale, forward=True, dropout=dropped)
    if not dropout:
        return split.skinny(x_TI, a_RI, part.scale)
    kept = _kept(x_TI, part.seed, dropout)
    return split.skinny(kept.mask_TI.mul_(x_TI), a_RI, part.scale * kept.factor)


def _shared_products(
    x_TI: torch.Tensor, a_RI: list[torch.Tensor], call: Call, choice: dispatch.Choice
) -> list[torch.Tensor]:
    """s x A^T of each projection, views of one product."""
    scales = [part.scale for part in call.parts]
    alike = len(set(scales)) == 1
    stacked, scale = torch.cat(a_RI), scales[0] if alike else 1.0
    if choice.form == "split":
        s_all = split.skinny(x_TI, stacked, scale)
    else:
        s_all = _fused().skinny(x_TI, stacked, scale, forward=True)
    products = list(s_all.split([a.shape[0] for a in a_RI], dim=1))
    return products if alike else [s.mul_(scale) for s, scale in zip(products, scales)]


# ---- backward --------------------------------------------------------------------------------


def backward(
    dys_TO: list[torch.Tensor],
    x_TI: torch.Tensor,
    call: Call,
    s_TR: Sequence[torch.Tensor | None],
    factors: list[Pair],
    needs_x: bool,
    needs: list[bool],
    dtypes: list[torch.dtype],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """dx, and dA, dB of each projection in turn. `needs` and `dtypes` are in the order of dA, dB too."""
    if s_TR[0] is None:
        return _merged_backward(dys_TO, x_TI, call, factors, needs_x, needs, dtypes)
    choice = _choose("lora_backward", dys_TO[0], factors[0][0], factors[0][1].shape[0])
    in_one_kernel = needs_x and len(factors) == 1 and choice.form != "split"
    dx_TI = ds_all = None
    if in_one_kernel:
        dx_TI, ds_all = _fused_dx(dys_TO[0], call, factors[0], choice)
    elif needs_x or any(needs[::2]):
        ds_all = _shared_gradients(dys_TO, factors, call, choice)
    if ds_all is not None and needs_x and not in_one_kernel and not call.dropout:
        dx_TI = ds_all @ (factors[0][0] if len(factors) == 1 else torch.cat([a for a, _ in factors]))
    ranks = [a.shape[0] for a, _ in factors]
    ds_TR: Sequence[torch.Tensor | None] = [None] * len(ranks) if ds_all is None else ds_all.split(ranks, dim=1)
    ways = [_choose("lora_factors", x_TI, a, b.shape[0]) for a, b in factors]
    das = [None] * len(ranks)
    if ds_all is not None and not call.dropout and all(way.form == "split" for way in ways) and any(needs[::2]):
        das = split.a_gradient(ds_all, x_TI, dtypes[0]).split(ranks)
    gradients: list[torch.Tensor | None] = []
    for i, (part, way, (a, _)) in enumerate(zip(call.parts, ways, factors)):
        adds_dx = bool(call.dropout) and needs_x and not in_one_kernel
        needed = needs[2 * i : 2 * i + 2]
        kept = None
        if adds_dx or (call.dropout and way.form == "split" and needed[0]):
            kept = _kept(x_TI, part.seed, call.dropout)
        if adds_dx and kept is not None:
            ds = ds_TR[i]
            assert ds is not None
            update = torch.empty_like(kept.mask_TI).addmm_(ds, a, beta=0, alpha=kept.factor).mul_(kept.mask_TI)
            dx_TI = update if dx_TI is None else dx_TI.add_(update)
        if dx_TI is not None and not in_one_kernel:
            dx_TI.addmm_(dys_TO[i], dequantised(part.weight, x_TI.dtype))
        one = _Factors(x_TI, ds_TR[i], dys_TO[i], s_TR[i], dtypes[2 * i : 2 * i + 2], needed, part, call)
        gradients += one.split(das[i], kept) if way.form == "split" else one.fused(way)
    return dx_TI, gradients


def _merged_backward(
    dys_TO: list[torch.Tensor],
    x_TI: torch.Tensor,
    call: Call,
    factors: list[Pair],
    needs_x: bool,
    needs: list[bool],
    dtypes: list[torch.dtype],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    ranks, split_choice = [a.shape[0] for a, _ in factors], dispatch.Choice("split")
    s_TR = ds_TR = das = [None] * len(ranks)
    if any(needs[1::2]):
        s_TR = _shared_products(x_TI, [a for a, _ in factors], call, split_choice)
    if any(needs[::2]):
        ds_all = _shared_gradients(dys_TO, factors, call, split_choice)
        ds_TR, das = ds_all.split(ranks, dim=1), split.a_gradient(ds_all, x_TI, dtypes[0]).split(ranks)
    dx_TI = None
    gradients: list[torch.Tensor | None] = []
    for i, (part, pair) in enumerate(zip(call.parts, factors)):
        if needs_x:
            weight = split.merged(part.weight, *pair, part.scale)
            dx_TI = dys_TO[i] @ weight if dx_TI is None else dx_TI.addmm_(dys_TO[i], weight)
        needed = needs[2 * i : 2 * i + 2]
        one = _Factors(x_TI, ds_TR[i], dys_TO[i], s_TR[i], dtypes[2 * i : 2 * i + 2], needed, part, call)
        gradients += one.split(das[i], None)
    return dx_TI, gradients


def _fused_dx(dy_TO: torch.Tensor, call: Call, pair: Pair, choice: dispatch.Choice) -> Pair:
    (part,), (a, b) = call.parts, pair
    weight = dequantised(part.weight, dy_TO.dtype)
    ds_TR = dropped = None
    if call.dropout:
        dropped = _fused().Dropout(call.dropout, part.seed)
    if not configs.inline(choice.form, a.shape[0], call.dropout, a.dtype):
        ds_TR = _fused().skinny(dy_TO, b, part.scale, forward=False)
    return _fused().matmul(dy_TO, weight, None, a, b, ds_TR, part.scale, choice.config, forward=False, dropout=dropped)


def _shared_gradients(
    dys_TO: list[torch.Tensor], factors: list[Pair], call: Call, choice: dispatch.Choice
) -> torch.Tensor:
    """dS = s dY B of all projections, concatenated along the rank: (T, sum of R)."""
    ranks = [a.shape[0] for a, _ in factors]
    ds_all = split.skinny_buffer(dys_TO[0], sum(ranks))
    for dy, (_, b), ds, part in zip(dys_TO, factors, ds_all.split(ranks, dim=1), call.parts):
        if choice.form == "split":
            split.skinny(dy, b.t(), part.scale, out_TR=ds)
        else:
            _fused().skinny(dy, b, part.scale, forward=False, out_TR=ds)
    return ds_all


@dataclass(frozen=True)
class _Factors:
    """dA = dS^T D(x) and dB = dY^T s of one projection."""

    x_TI: torch.Tensor
    ds_TR: torch.Tensor | None
    dy_TO: torch.Tensor
    s_TR: torch.Tensor | None
    """None where dB is not needed."""
    dtypes: list[torch.dtype]
    needed: list[bool]
    part: Part
    call: Call

    @property
    def wanted_rows(self) -> torch.Tensor | None:
        """The row mask, (T,), if db_square_masked is requested."""
        if self.part.measures is None or self.call.row_mask_T is None:
            return None
        return self.call.row_mask_T.reshape(-1)

    def split(self, da_RI: torch.Tensor | None, kept: split.Kept | None) -> list[torch.Tensor | None]:
        """[dA, dB] by PyTorch. `da_RI`: dA, if it is already computed."""
        db_OR = None
        if not self.needed[0]:
            da_RI = None
        elif kept is not None:
            assert self.ds_TR is not None
            da_RI = split.a_gradient(self.ds_TR, kept.mask_TI.mul_(self.x_TI), self.dtypes[0], kept.factor)
        elif da_RI is None:
            assert self.ds_TR is not None
            da_RI = split.a_gradient(self.ds_TR, self.x_TI, self.dtypes[0])
        if self.needed[1]:
            assert self.s_TR is not None
            measures = self.part.measures
            if measures is None or self.wanted_rows is None:
                db_OR = split.b_gradient(self.dy_TO, self.s_TR, self.dtypes[1])
            else:
                db_OR, masked = split.db_with_masked(self.dy_TO, self.s_TR, self.wanted_rows, self.dtypes[1])
                measures.db_square_masked = split.square_sum(masked)
            if measures:
                measures.db_square = split.square_sum(db_OR)
        return [None if da_RI is None else da_RI.to(self.dtypes[0]), db_OR]

    def fused(self, way: dispatch.Choice) -> list[torch.Tensor | None]:
        """[dA, dB] by Triton."""
        if not any(self.needed):
            return [None, None]
        dropped = _fused().Dropout(self.call.dropout, self.part.seed) if self.call.dropout else None
        measured = self.part.measures is not None and self.needed[1]
        da_RI, db_OR, squares = _fused().factors(
            self.x_TI, self.s_TR if self.ds_TR is None else self.ds_TR, self.dy_TO, self.s_TR, self.dtypes, self.needed,
            way.config, dropout=dropped, row_mask_T=self.wanted_rows if measured else None, measured=measured,
        )  # fmt: skip
        if measured and self.part.measures is not None and squares is not None:
            self.part.measures.db_square = squares[0]
            self.part.measures.db_square_masked = None if self.wanted_rows is None else squares[1]
        return [da_RI, db_OR]
