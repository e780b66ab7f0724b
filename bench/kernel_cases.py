"""What bench/kernels.py compares: each operation at some shapes, beside what else computes the same.

`flops` and `num_bytes` are the least that the operation needs: every multiplication once, every input read once and
every output written once. The time that they take at the measured ceilings is the floor.

Shape suffixes: T tokens, I in, O out, R rank, V classes, K matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastpeft.kernels import dispatch, gradient_norm, lora_linear, tune
from fastpeft.kernels.dispatch import Choice
from fastpeft.kernels.lora_linear import configs


@dataclass
class Case:
    operation: str
    shape: dict[str, Any]
    ours: str
    """The rival that fastpeft itself would take here."""
    rivals: dict[str, Callable[[], object]]
    base: str
    """The rival that `ratio` compares with."""
    flops: float
    num_bytes: float


@dataclass(frozen=True)
class Setting:
    device: torch.device
    dtype: torch.dtype
    small: bool
    """Shapes that a CPU manages."""
    compiled: bool
    """torch.compile is a rival."""

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
        if setting.compiled and i < 6:  # each shape is compiled anew: only those of the first T
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
    """What peft.tuners.lora.Linear.forward computes without dropout."""
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
    """Forward, dx, and the factors' gradients, each by itself and in each form, at its default tiles."""
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


PARTS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "lora": lora,
    "lora_parts": lora_parts,
    "sensitivity": sensitivity,
}
