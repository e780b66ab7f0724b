"""The chains between matrix products: against their references in float64, what they keep, and what is made again."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from fastpeft.kernels import dropout_mask, lora_linear
from fastpeft.kernels.ops.gated.op import gated
from fastpeft.kernels.ops.gated.reference import ACTIVATIONS, gated_reference
from fastpeft.kernels.ops.residual_norm.op import residual_norm
from fastpeft.kernels.ops.residual_norm.reference import residual_norm_reference
from fastpeft.kernels.ops.rms_norm.op import rms_norm
from fastpeft.kernels.ops.rms_norm.reference import rms_norm_reference
from fastpeft.kernels.ops.rotary.op import rotary
from fastpeft.kernels.ops.rotary.reference import rotary_reference
from fastpeft.kernels.recompute import source_of

WIDTH = 6
SEED = torch.tensor([12345])


def float64_rows(seed: int, *shape: int, count: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (2, 3, WIDTH)
    return [torch.randn(shape, generator=generator).double() for _ in range(count)]


def affine(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = float64_rows(seed + 1, WIDTH, count=2)
    return weight, bias


def cases(seed: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None):
    """name -> (operation, reference, inputs with a gradient), of the same numbers in any dtype."""
    seed_there = SEED.to(device)
    keep = dropout_mask((2, 3, WIDTH), 0.3, seed_there)

    def rows(*arguments: int, count: int = 1) -> list[torch.Tensor]:
        return [x.to(device, dtype) for x in float64_rows(*arguments, count=count)]

    weight, bias = (x.to(device, dtype) for x in affine(seed))
    norm = partial(residual_norm, weight=weight, eps=1e-5)
    norm_reference = partial(residual_norm_reference, weight=weight, eps=1e-5)
    two, one = rows(seed, count=2), rows(seed)
    cos, sin = rows(seed + 2, 2, 1, 3, WIDTH, count=2)
    found = {
        "residual_norm": (partial(norm, bias=bias), partial(norm_reference, bias=bias), two),
        "residual_norm, no bias": (partial(norm, bias=None), partial(norm_reference, bias=None), two),
        "residual_norm, dropout": (
            partial(norm, bias=bias, dropout=0.3, seed=seed_there),
            partial(norm_reference, bias=bias, dropout=0.3, keep=keep),
            two,
        ),
        "rms_norm": (
            partial(rms_norm, weight=weight, eps=1e-6),
            partial(rms_norm_reference, weight=weight, eps=1e-6),
            one,
        ),
        "rms_norm, offset": (
            partial(rms_norm, weight=weight, eps=1e-6, offset=1.0),
            partial(rms_norm_reference, weight=weight, eps=1e-6, offset=1.0),
            one,
        ),
        "rotary": (
            partial(rotary, cos=cos, sin=sin),
            partial(rotary_reference, cos=cos, sin=sin),
            rows(seed, 2, 4, 3, WIDTH),
        ),
    }
    for name in ACTIVATIONS:
        found[f"gated {name}"] = partial(gated, activation=name), partial(gated_reference, activation=name), two
    return found


CASES = list(cases(0))


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_in_float64(name, seed):
    operation, reference, inputs = cases(seed)[name]
    mine, theirs = ([x.clone().requires_grad_(True) for x in inputs] for _ in range(2))
    got, want = operation(*mine), reference(*theirs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(want)
    found, expected = torch.autograd.grad(got, mine, weights), torch.autograd.grad(want, theirs, weights)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(operation(*inputs), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_left_as_they_are(name, seed):
    operation, _, inputs = cases(seed)[name]
    before = [x.clone() for x in inputs]
    leaves = [x.requires_grad_(True) for x in inputs]
    torch.autograd.grad(operation(*leaves).sum(), leaves)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, before))


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused(name, seed):
    operation, _, inputs = cases(seed)[name]
    leaves = [x.requires_grad_(True) for x in inputs]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(operation(*leaves).sum(), leaves, create_graph=True)


@pytest.mark.parametrize("name", CASES)
def test_triton(name, seed, triton_device, poisoned):
    """In fp32, beside the reference in float64: values and gradients, and the values that are made again."""
    operation, _, inputs = cases(seed, torch.float32, triton_device)[name]
    _, reference, exact = cases(seed, torch.float64, triton_device)[name]
    mine, theirs = [x.requires_grad_(True) for x in inputs], [x.requires_grad_(True) for x in exact]
    got, want = operation(*mine), reference(*theirs)
    weights = torch.randn_like(got)
    found = torch.autograd.grad(got, mine, weights)
    expected = torch.autograd.grad(want, theirs, weights.double())
    for a, b in zip((got, *found), (want, *expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    source = source_of(got)
    if source is not None:
        with torch.no_grad():
            torch.testing.assert_close(source.make(*source.tensors), got, rtol=2e-6, atol=2e-6)
            assert torch.equal(operation(*inputs), got)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 40), (2, 300)])
def test_triton_takes_any_width(seed, shape, triton_device):
    """Rows that fill no tile, and tiles with rows to spare."""
    x, residual, weight, bias = (
        row.to(triton_device, torch.float32)
        for row in (*float64_rows(seed, *shape, count=2), *float64_rows(seed, shape[-1], count=2))
    )
    keep = dropout_mask(shape, 0.3, SEED.to(triton_device))
    got = residual_norm(x, residual, weight, bias, 1e-5, dropout=0.3, seed=SEED.to(triton_device))
    want = residual_norm_reference(*(t.double() for t in (x, residual, weight, bias)), 1e-5, dropout=0.3, keep=keep)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    got, want = rms_norm(x, weight, 1e-6), rms_norm_reference(x.double(), weight.double(), 1e-6)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    got, want = gated(x, residual, "gelu"), gated_reference(x.double(), residual.double(), "gelu")
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


def test_triton_rotates_wherever_the_rows_lie(seed, triton_device):
    """Heads that are views of a product's output; angles for each row, and one for all."""
    wide = float64_rows(seed, 2, 5, 3 * 4 * 8)[0].to(triton_device, torch.float32)
    x = wide.view(2, 5, 12, 8)[:, :, :4].transpose(1, 2)
    for rows in (2, 1):
        cos, sin = (a.to(triton_device, torch.float32) for a in float64_rows(seed + 1, rows, 1, 5, 8, count=2))
        got, want = rotary(x, cos, sin), rotary_reference(x.double(), cos.double(), sin.double())
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


# ---- what is made again ----------------------------------------------------------------------


def saved_by(call) -> set[int]:
    """Storages that backward of a call holds, parameters of modules among them."""
    kept: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return kept


@pytest.mark.parametrize("name", [name for name in CASES if name != "rotary"])
def test_lora_linear_keeps_what_x_was_made_of(name, seed):
    operation, reference, inputs = cases(seed)[name]
    weight, bias, a, b = (
        each[0]
        for each in (
            float64_rows(seed, 5, WIDTH),
            float64_rows(seed, 5),
            float64_rows(seed, 2, WIDTH),
            float64_rows(seed, 5, 2),
        )
    )

    def loss(chain, *leaves):
        return lora_linear(chain(*leaves[:-2]), weight, bias, *leaves[-2:], 0.5).square().sum()

    mine, theirs = ([x.clone().requires_grad_(True) for x in (*inputs, a, b)] for _ in range(2))
    got, want = loss(operation, *mine), loss(reference, *theirs)
    found, expected = torch.autograd.grad(got, mine), torch.autograd.grad(want, theirs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    made = operation(*mine[:-2])
    kept = saved_by(lambda: lora_linear(made, weight, bias, *mine[-2:], 0.5))
    assert source_of(made) is not None
    assert made.untyped_storage().data_ptr() not in kept


def test_what_was_changed_in_place_is_kept_itself(seed):
    gate, up = (x.requires_grad_(True) for x in float64_rows(seed, count=2))
    y = gated(gate, up, "silu")
    assert source_of(y) is not None
    with torch.no_grad():
        y.mul_(2)
    assert source_of(y) is None
    assert source_of(y.reshape(-1)) is None


# ---- merged products -------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 4, 300])  # few rows go through W and B A apart, many through their sum
def test_few_and_many_rows_have_the_same_gradients(num_rows, seed):
    shapes = (num_rows, 24), (16, 24), (16,)
    x, weight, bias = (float64_rows(seed + i, *shape)[0] for i, shape in enumerate(shapes))
    (a,), (b,) = float64_rows(seed + 3, 4, 24), float64_rows(seed + 4, 16, 4)
    mine, theirs = ([t.clone().requires_grad_(True) for t in (x, a, b)] for _ in range(2))
    plain = nn.functional.linear
    got = lora_linear(mine[0], weight, bias, mine[1], mine[2], 0.7)
    want = plain(theirs[0], weight, bias) + 0.7 * plain(plain(theirs[0], theirs[1]), theirs[2])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, mine, weights), torch.autograd.grad(want, theirs, weights), rtol=1e-11, atol=1e-11
    )


def test_an_unused_projection_of_many_rows_gets_no_gradient(seed):
    from fastpeft.kernels import lora_linear_grouped

    (x,) = float64_rows(seed, 300, 24)
    weights = float64_rows(seed + 1, 16, 24, count=2)
    lora_as, lora_bs = float64_rows(seed + 2, 4, 24, count=2), float64_rows(seed + 3, 16, 4, count=2)
    leaves = [t.requires_grad_(True) for t in (*lora_as, *lora_bs)]
    first, _ = lora_linear_grouped(x, weights, (None, None), leaves[:2], leaves[2:], (1.0, 1.0))
    found = torch.autograd.grad(first.sum(), leaves, allow_unused=True)
    assert found[1] is None
    assert found[3] is None
    assert found[0].abs().sum() > 0
