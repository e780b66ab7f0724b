"""Parts of bench/gpu_check.py without a script of their own: correctness, determinism, tuning.

    python bench/gpu_parts.py PART --json OUT [--dry-run]

`--dry-run`: in miniature on a CPU, with interpreted kernels.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it on import

import torch

from bench.interleave import host_timer
from bench.report import write_json
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
from fastpeft.kernels.launch import LAUNCHES
from fastpeft.kernels.ops.adamw.reference import adamw
from fastpeft.kernels.ops.frobenius.reference import weighted_frobenius as frobenius_reference
from fastpeft.kernels.ops.lora_linear import configs
from fastpeft.kernels.ops.lora_linear.reference import lora_linear_reference
from fastpeft.kernels.ops.secant.reference import secant_sums as secant_reference

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative L2 distance from float64, by dtype."""

Outputs = list[torch.Tensor]
Run = Callable[[], Outputs]


def operations(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[tuple[str, Run, Outputs]]:
    """(name, operation on random tensors, expected outputs in float64)."""
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    num_tokens, num_in, num_out, rank = (33, 24, 40, 4) if small else (1000, 768, 3072, 8)
    x_TI, dy_TO = random(num_tokens, num_in), random(num_tokens, num_out)
    weight_OI, bias_O = random(num_out, num_in) / num_in**0.5, random(num_out)
    a_RI = random(rank, num_in, dtype=torch.float32) / num_in**0.5
    b_OR = random(num_out, rank, dtype=torch.float32) / rank**0.5

    def lora(function: Callable, *tensors: torch.Tensor) -> Outputs:
        x, weight, bias, a, b = (tensor.detach() for tensor in tensors[:5])
        wanted = [tensor.requires_grad_() for tensor in (x, a, b)]
        y = function(x, weight, bias, a, b, 2.0)
        return [y.detach(), *torch.autograd.grad(y, wanted, tensors[5])]

    tensors = (x_TI, weight_OI, bias_O, a_RI, b_OR, dy_TO)
    want = lora(lora_linear_reference, *(tensor.double() for tensor in tensors))
    for form in configs.FORMS["lora_forward"]:
        factors = "split" if form == "split" else "fused_factors"

        def one_form(form: str = form, factors: str = factors) -> Outputs:
            with (
                dispatch.forced(Choice(form), "lora_forward", "lora_backward"),
                dispatch.forced(Choice(factors), "lora_factors"),
            ):
                return lora(lora_linear, *tensors)

        yield f"lora_linear {form}", one_form, want
    exact = [torch.linalg.matrix_norm(dy_TO.double().t() @ x_TI.double())]
    for form in ("split", "fused"):

        def norm(form: str = form) -> Outputs:
            with dispatch.forced(Choice(form), "gradient_norm"):
                return [gradient_norm(x_TI, dy_TO)]

        yield f"gradient_norm {form}", norm, exact


def flat_operations(device: torch.device, small: bool) -> Iterator[tuple[str, Run, Outputs]]:
    """Operations on fp32 buffers: the penalty, the optimizer's step and the secants' sums."""
    generator = torch.Generator(device).manual_seed(2)
    rank, width, count = (4, 24, 2) if small else (8, 768, 24)
    layout = FlatLayout([MatrixGroup(tuple(range(count)), rank, width, 2 * width, 2.0, 0)], head=[77], device=device)
    buffers = [torch.randn(layout.num_total, generator=generator, device=device) for _ in range(4)]
    buffers[3].square_()
    weight_K = torch.rand(count, generator=generator, device=device)
    wide, step = [buffer.double() for buffer in buffers], torch.full((), 3.0, device=device)
    options = AdamWOptions(max_norm=1.0, weight_decay=0.01, head_weight_decay=0.01)
    reference_layout = FlatLayout(layout.groups, head=[77], device=device)
    value_K, gradient = frobenius_reference(wide[0], reference_layout, weight_K.double())

    def penalty() -> Outputs:
        grad = buffers[1].clone()
        result = weighted_frobenius(buffers[0], grad, layout, weight_K)
        return [grad, result.penalty]

    def step_once() -> Outputs:
        data, grad, mean, mean_sq = (buffer.clone() for buffer in buffers)
        adamw_step(data, grad, mean, mean_sq, step.clone(), layout, lr=1e-2, norm=grad.norm(), options=options)
        return [data - buffers[0], mean, mean_sq]

    clipped = wide[1] / wide[1].norm().clamp_min(1.0)
    rates = torch.full_like(clipped, 1e-2), torch.full_like(clipped, 0.01)
    after = adamw(wide[0], clipped, wide[2], wide[3], step + 1, *rates, options)
    yield "weighted_frobenius", penalty, [wide[1] + gradient, value_K.sum()]
    yield "adamw_step", step_once, [after[0] - wide[0], *after[1:]]
    divisor = torch.tensor(0.25, dtype=torch.float64, device=device)
    older = torch.randn(layout.num_total, generator=generator, device=device)

    def secants() -> Outputs:
        previous, before = buffers[2].clone(), older.clone()
        sums = secant_sums(buffers[0], buffers[1], previous, before, buffers[3], divisor, layout)
        return [*sums, before]

    sums = secant_reference(*wide[:3], older.double(), wide[3], divisor, layout)
    yield "secant_sums", secants, [*sums, wide[0] - wide[2]]


def head_operations(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[tuple[str, Run, Outputs]]:
    """Cross entropy through a frozen head, with labels for half of the tokens."""
    generator = torch.Generator(device).manual_seed(3)
    num_tokens, width, vocab = (20, 16, 50) if small else (500, 256, 32000)
    hidden_TD = torch.randn(num_tokens, width, generator=generator, device=device, dtype=dtype)
    weight_VD = torch.randn(vocab, width, generator=generator, device=device, dtype=dtype) / width**0.5
    labels_T = torch.randint(vocab, (num_tokens,), generator=generator, device=device)
    labels_T[::2] = -100

    def run(hidden: torch.Tensor, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> Outputs:
        hidden = hidden.detach().requires_grad_()
        loss = loss_of(hidden)
        return [loss.detach(), *torch.autograd.grad(loss, hidden)]

    rows_L = torch.arange(1, num_tokens, 2, device=device)
    exact = run(hidden_TD.double(), lambda h: torch.nn.functional.cross_entropy(h @ weight_VD.double().t(), labels_T))
    yield (
        "linear_cross_entropy",
        lambda: run(hidden_TD, lambda h: linear_cross_entropy(h, weight_VD, labels_T, rows=rows_L).loss),
        exact,
    )


def each(device: torch.device, small: bool) -> Iterator[tuple[str, torch.dtype, Run, Outputs]]:
    for name, run, want in flat_operations(device, small):
        yield name, torch.float32, run, want
    for dtype in (torch.float32,) if small else tuple(BOUNDS):
        for made in (operations, head_operations):
            for name, run, want in made(device, dtype, small):
                yield name, dtype, run, want


def correctness(device: torch.device, small: bool) -> dict[str, Any]:
    """Distance of every operation from float64, against its bound."""
    errors, bad = {}, []
    for name, dtype, run, want in each(device, small):
        worst = max(float((got.double() - exact).norm() / exact.norm()) for got, exact in zip(run(), want, strict=True))
        errors[f"{name} {str(dtype).removeprefix('torch.')}"] = worst
        if not worst <= BOUNDS[dtype]:  # NaN fails
            bad.append(f"{name} {dtype}: {worst:.2e}")
    return {"relative_errors": errors, "bad": bad}


def determinism(device: torch.device, small: bool) -> dict[str, Any]:
    """Whether every operation gives the same bits five times."""
    bad, checked = [], 0
    for name, dtype, run, _ in each(device, small):
        first, checked = run(), checked + 1
        again = [run() for _ in range(4)]
        if not all(torch.equal(a, b) for other in again for a, b in zip(first, other, strict=True)):
            bad.append(f"{name} {dtype}")
    return {"checked": checked, "bad": bad}


def tuning(device: torch.device, small: bool) -> dict[str, Any]:
    """Measure the table for a few shapes and write it where `dispatch` reads it, so that later parts use it."""
    from rich.console import Console

    from fastpeft.doctor.tuning import about, run_tuning

    if small:
        shapes, ranks, buckets, dtype = [(16, 16)], (4,), (16,), torch.float32
        seconds = host_timer(device)
        options = {"measure": lambda run: seconds(run) * 1e6, "repeats": 1}
    else:
        shapes, ranks, buckets, dtype = tune.MODELS["deberta-v3-base"], (8,), (2048, 8192), torch.bfloat16
        options = {}
    gpu = "dry run" if small else dispatch.gpu_name(0)
    todo = tune.problems(shapes, ranks, buckets, dtype)
    path = dispatch.table_path(gpu)
    run_tuning(todo, device, path, about(gpu), 0.5 if small else 1.1, Console(), **options)
    rows = dispatch.read_table(path)
    listed = [{"key": key, **asdict(choice)} for key, choice in rows.items()]
    return {"table": str(path), "wanted": len(todo), "rows": listed, "bad": [] if rows else ["nothing was measured"]}


PARTS = {"correctness": correctness, "determinism": determinism, "tuning": tuning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    device = torch.device("cpu" if args.dry_run else "cuda")
    result = PARTS[args.part](device, args.dry_run) | {"launches": sum(LAUNCHES.values())}
    write_json(args.json, result)
    print(f"{args.part}: {len(result['bad'])} bad, {result['launches']} launches of Triton kernels")
    for line in result["bad"]:
        print(f"  {line}")
    if not result["launches"]:
        raise SystemExit("no Triton kernel was launched, so nothing was checked")
    raise SystemExit(1 if result["bad"] else 0)


if __name__ == "__main__":
    main()
