"""Cases of bench/kernels.py: each operation at some shapes, with its rivals, other code for the same computation.

`flops` and `num_bytes` are the least that the operation needs: every multiplication once, every input read once and
every output written once. Their time at the measured ceilings is the floor.

Shape suffixes: T tokens, I in, O out, R rank, V classes, K matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fastpeft.kernels import (
    AdamWOptions,
    FlatLayout,
    MatrixGroup,
    adamw_step,
    dispatch,
    gradient_norm,
    linear_cross_entropy,
    lora_linear,
    secant_sums,
    tune,
    weighted_frobenius,
)
from fastpeft.kernels.dispatch import Choice
from fastpeft.kernels.ops.lora_linear import configs


@dataclass
class Case:
    operation: str
    shape: dict[str, Any]
    ours: str
    """The rival that fastpeft itself would use here."""
    rivals: dict[str, Callable[[], object]]
    base: str
    """The rival in the denominator of `ratio`."""
    flops: float
    num_bytes: float


@dataclass(frozen=True)
class Setting:
    device: torch.device
    dtype: torch.dtype
    small: bool
    """Shapes small enough for a CPU."""
    compiled: bool
    """Whether torch.compile is a rival."""

    @property
    def triton(self) -> bool:
        return self.device.type == "cuda" and dispatch.has_triton()

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)


# ---- lora_linear -----------------------------------------------------------------------------


def lora_shapes(setting: Setting) -> Iterator[tuple[int, int, int]]:
    """(d, r, T): the table of square layers."""
    widths, tokens = ((256,), (512,)) if setting.small else ((768, 1024, 4096), (8192, 16384))
    for num_tokens in tokens:
        for width in widths:
            for rank in (8, 64):
                yield width, rank, num_tokens


def lora(setting: Setting) -> Iterator[Case]:
    """Forward and backward of one layer, all gradients that training needs."""
    for i, (width, rank, num_tokens) in enumerate(lora_shapes(setting)):
        item = setting.dtype.itemsize
        x_TI, dy_TO = setting.random(num_tokens, width).requires_grad_(), setting.random(num_tokens, width)
        weight, bias = setting.random(width, width) / width**0.5, setting.random(width)
        a_RI = (setting.random(rank, width, dtype=torch.float32) / width**0.5).requires_grad_()
        b_OR = (setting.random(width, rank, dtype=torch.float32) / rank**0.5).requires_grad_()
        narrow = [factor.detach().to(setting.dtype).requires_grad_() for factor in (a_RI, b_OR)]

        def both(
            call: Callable, a=a_RI, b=b_OR, x=x_TI, w=weight, bias=bias, dy=dy_TO, frozen: bool = False
        ) -> Callable[[], object]:
            wanted = [x] if frozen else [x, a, b]
            return lambda: torch.autograd.grad(call(x, w, bias, a, b), wanted, dy)

        rivals = {
            "frozen": both(lambda x, w, bias, a, b: nn.functional.linear(x, w, bias), frozen=True),
            "peft": both(peft_expression),
            "peft, factors in the model's dtype": both(peft_expression, *narrow),
            "fastpeft": both(lambda x, w, bias, a, b: lora_linear(x, w, bias, a, b, 2.0)),
        }
        if setting.triton:
            rivals |= {f"fastpeft {form}": _with(form, rivals["fastpeft"]) for form in ("split", "fused", "fused_two")}
        if setting.compiled and i < 6 and rank == 8:  # each shape is compiled separately, which takes seconds
            rivals["peft compiled"] = both(torch.compile(peft_expression, dynamic=False))
            rivals["peft compiled, factors in the model's dtype"] = both(
                torch.compile(peft_expression, dynamic=False), *narrow
            )
        flops = 4 * num_tokens * width**2 + 12 * num_tokens * width * rank
        num_bytes = item * (5 * num_tokens * width + 2 * width**2 + 4 * num_tokens * rank)
        yield Case(
            "lora_linear", _shape(width, width, rank, num_tokens), "fastpeft", rivals, "frozen", flops, num_bytes
        )


def peft_expression(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """Same computation as peft.tuners.lora.Linear.forward without dropout."""
    result = nn.functional.linear(x, weight, bias)
    update = nn.functional.linear(nn.functional.linear(x.to(a.dtype), a), b)
    return (result + update * 2.0).to(x.dtype)


def _with(form: str, run: Callable[[], object]) -> Callable[[], object]:
    factors = "split" if form == "split" else "fused_factors"

    def forced() -> object:
        with (
            dispatch.forced(Choice(form), "lora_forward", "lora_backward"),
            dispatch.forced(Choice(factors), "lora_factors"),
        ):
            return run()

    return forced


def _shape(num_in: int, num_out: int, rank: int, num_tokens: int) -> dict[str, int]:
    return {"in": num_in, "out": num_out, "rank": rank, "T": num_tokens}


def lora_parts(setting: Setting) -> Iterator[Case]:
    """Forward pass, dx, and the factors' gradients, each timed alone and in each form, at its default tiles."""
    for width, rank, num_tokens in lora_shapes(setting):
        item, skinny = setting.dtype.itemsize, num_tokens * width * rank
        x_TI, weight = setting.random(num_tokens, width), setting.random(width, width) / width**0.5
        for operation, forms in configs.FORMS.items():
            problem = tune.Problem(operation, width, width, rank, num_tokens, setting.dtype)
            run = tune.build(problem, setting.device)
            rivals = {form: _forced(operation, form, run) for form in forms if setting.triton or form == "split"}
            rivals["fastpeft"] = run
            base = "split"
            flops, num_bytes = 6 * skinny, item * num_tokens * (2 * width + 2 * rank)
            if operation != "lora_factors":
                rivals["frozen"] = lambda x=x_TI, w=weight: x @ w
                base = "frozen"
                flops = 2 * num_tokens * width**2 + 4 * skinny
                num_bytes = item * (2 * num_tokens * width + width**2 + num_tokens * rank)
            yield Case(operation, _shape(width, width, rank, num_tokens), "fastpeft", rivals, base, flops, num_bytes)


def _forced(operation: str, form: str, run: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with dispatch.forced(Choice(form), operation):
            return run()

    return forced


# ---- sensitivity -----------------------------------------------------------------------------


def sensitivity(setting: Setting) -> Iterator[Case]:
    """||G^T X||_F: few tokens, where the Gram form has less to do, and many."""
    widths, tokens = ((256,), (64, 512)) if setting.small else ((768, 1024, 4096), (256, 2048, 8192))
    for width in widths:
        for num_tokens in tokens:
            x_TI, g_TO = setting.random(num_tokens, width), setting.random(num_tokens, width)
            rivals = {
                "fastpeft": lambda x=x_TI, g=g_TO: gradient_norm(x, g),
                "explicit product": lambda x=x_TI, g=g_TO: torch.linalg.matrix_norm((g.t() @ x).float()),
            }
            if setting.triton:
                rivals |= {form: _forced("gradient_norm", form, rivals["fastpeft"]) for form in ("split", "fused")}
            flops = min(2 * num_tokens * width**2, 2 * num_tokens**2 * width)  # half of each symmetric Gram matrix
            num_bytes = setting.dtype.itemsize * 2 * num_tokens * width
            shape = _shape(width, width, 0, num_tokens)
            yield Case("gradient_norm", shape, "fastpeft", rivals, "explicit product", flops, num_bytes)


# ---- flat buffers ----------------------------------------------------------------------------


def flat_layout(setting: Setting, rank: int) -> FlatLayout:
    """All linears of DeBERTa-v3-base and its head; a fraction of them where `small`."""
    layers, width = (2, 64) if setting.small else (12, 768)
    counts = {(width, width): 4 * layers, (width, 4 * width): layers, (4 * width, width): layers}
    groups, start, place = [], 0, 0
    for (num_in, num_out), count in counts.items():
        groups.append(MatrixGroup(tuple(range(start, start + count)), rank, num_in, num_out, 2.0, place))
        start, place = start + count, groups[-1].end
    return FlatLayout(groups, head=[width * width, 3 * width], device=setting.device)


def flat(setting: Setting) -> Iterator[Case]:
    """The penalty of a whole model with its gradient, the optimizer's step, and the sums for its curvature."""
    for rank in (8, 64):
        layout = flat_layout(setting, rank)
        data, grad, mean, mean_sq = (setting.random(layout.num_total, dtype=torch.float32) for _ in range(4))
        data, mean_sq = data / 32, mean_sq.square()
        weight_K = torch.rand(layout.num_matrices, device=setting.device)
        factors = [
            tuple(matrix.clone().requires_grad_() for matrix in pair)
            for group in layout.groups
            for pair in zip(group.stack_a(data), group.stack_b(data))
        ]
        loose = [factor for pair in factors for factor in pair]
        flops = 4 * rank**2 * sum(sum(factor.numel() for factor in pair) // rank for pair in factors)
        shape = {"matrices": layout.num_matrices, "rank": rank, "parameters": layout.num_total}
        rivals = {
            "fastpeft": partial(weighted_frobenius, data, grad, layout, weight_K),
            "loop over matrices, autograd": lambda f=factors, p=loose: torch.autograd.grad(loop_penalty(f), p),
        }
        if setting.compiled:
            compiled = torch.compile(loop_penalty, dynamic=False)
            rivals["loop over matrices, compiled"] = lambda c=compiled, f=factors, p=loose: torch.autograd.grad(c(f), p)
        base = "loop over matrices, autograd"
        yield Case("weighted_frobenius", shape, "fastpeft", rivals, base, flops, 12 * layout.num_factors)
        step = torch.zeros((), device=setting.device)
        norm, options = grad.norm(), AdamWOptions(max_norm=1.0, weight_decay=0.01)
        buffers = (data.clone(), grad.clone(), mean, mean_sq, step, layout)
        rivals = {
            "fastpeft": lambda b=buffers, n=norm, o=options: adamw_step(*b, lr=1e-4, norm=n, options=o),
            "clip, fused AdamW": clipped_adamw([nn.Parameter(factor.detach().clone()) for factor in loose]),
            "clip, fused AdamW, one flat tensor": clipped_adamw([nn.Parameter(data.clone())]),
        }
        yield Case("adamw_step", shape, "fastpeft", rivals, "clip, fused AdamW", 0, 32 * layout.num_total)
        buffers = (data, grad, data.clone(), mean.clone(), mean_sq)
        rivals = {
            "fastpeft": partial(secant_sums, *buffers, norm, layout),
            "a sum at a time": partial(plain_secants, *buffers, layout),
        }
        yield Case("secant_sums", shape, "fastpeft", rivals, "a sum at a time", 0, 28 * layout.num_total)


def plain_secants(data, grad, previous, older, second, layout: FlatLayout) -> list[torch.Tensor]:
    last = data - previous
    products = grad * last, grad * older, second.sqrt() * last * older
    older.copy_(last)
    previous.copy_(data)
    return [layout.unit_sums(product) for product in products]


def loop_penalty(factors: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    total = factors[0][0].new_zeros(())
    for lora_a, lora_b in factors:
        total = total + 1e-4 * (lora_b @ lora_a).pow(2).sum()
    return total


def clipped_adamw(parameters: list[nn.Parameter]) -> Callable[[], object]:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


# ---- cross entropy ---------------------------------------------------------------------------


def cross_entropy(setting: Setting) -> Iterator[Case]:
    """A frozen head over a vocabulary, with the gradient of the hidden states; some of the tokens have labels."""
    num_tokens, width, vocab = (256, 64, 4000) if setting.small else (8192, 1024, 151936)
    hidden_TD = (setting.random(num_tokens, width)).requires_grad_()
    weight_VD = setting.random(vocab, width) / width**0.5
    for share in (0.3, 1.0):
        labels_T = torch.randint(vocab, (num_tokens,), device=setting.device)
        labels_T[int(share * num_tokens) :] = -100
        rows_L = torch.arange(int(share * num_tokens), device=setting.device)

        def ours(labels=labels_T, rows=rows_L, **options: bool) -> object:
            loss = linear_cross_entropy(hidden_TD, weight_VD, labels, rows=rows, **options).loss
            return torch.autograd.grad(loss, hidden_TD)

        rivals = {
            "fastpeft": ours,
            "fastpeft, with statistics": lambda ours=ours: ours(statistics=True),
            "full logits": lambda labels=labels_T: torch.autograd.grad(
                full_logits(hidden_TD, weight_VD, labels), hidden_TD
            ),
        }
        if setting.compiled:
            compiled = torch.compile(full_logits, dynamic=False)
            rivals["full logits, compiled"] = gradient_of(compiled, hidden_TD, weight_VD, labels_T)
        shape = {"T": num_tokens, "labelled": len(rows_L), "D": width, "V": vocab}
        flops = 4 * len(rows_L) * width * vocab
        num_bytes = setting.dtype.itemsize * 2 * (vocab * width + num_tokens * width)
        yield Case("linear_cross_entropy", shape, "fastpeft", rivals, "full logits", flops, num_bytes)


def gradient_of(call: Callable, hidden_TD: torch.Tensor, *others: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call(hidden_TD, *others), hidden_TD)


def full_logits(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy((hidden_TD @ weight_VD.t()).float(), labels_T)


PARTS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "lora": lora,
    "lora_parts": lora_parts,
    "sensitivity": sensitivity,
    "flat": flat,
    "cross_entropy": cross_entropy,
}
