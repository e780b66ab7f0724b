"""lora_linear's dropout, measures, grouped form and 4-bit weights, as PyTorch computes them."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.kernels import LoraMeasures, dropout_mask, lora_linear, lora_linear_grouped
from fastpeft.kernels.ops.lora_linear import compute, split
from fastpeft.kernels.ops.lora_linear.reference import lora_linear_reference, philox_keep
from tests.support.lora_linear_inputs import make_inputs, relative, run

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def a_seed(value):
    return torch.tensor([value])


# ---- dropout ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dropout", "seed"), [((), 0.5, a_seed(1)), ((3,), 1.0, a_seed(1)), ((3,), 0.5, torch.ones(1))]
)
def test_a_mask_that_cannot_be(shape, dropout, seed):
    with pytest.raises(ValueError, match="dropout_mask: shape"):
        dropout_mask(shape, dropout, seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_is_that_of_the_mask_that_can_be_asked_for(seed, dtype):
    inputs = make_inputs(torch.Generator().manual_seed(seed), (3, 21), 96, 40, 8)
    low = [tensor.to(dtype) for tensor in inputs]
    keep = dropout_mask((3, 21, 96), 0.3, a_seed(seed))
    assert keep.dtype == torch.bool
    got = run(lora_linear, *low, 2.0, dropout=0.3, seed=a_seed(seed))
    want = run(lora_linear_reference, *(t.double() for t in low), 2.0, dropout=0.3, keep=keep)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for mine, theirs in zip(got, want):
        assert relative(mine, theirs) <= limit


def test_no_dropout_is_the_same_bits_as_none(seed):
    inputs = [t.float() for t in make_inputs(torch.Generator().manual_seed(seed), (33,), 40, 24, 4)]
    plain = run(lora_linear, *inputs, 2.0)
    for mine, theirs in zip(run(lora_linear, *inputs, 2.0, dropout=0.0, seed=a_seed(seed)), plain):
        assert torch.equal(mine, theirs)


def test_dropout_by_seed(seed):
    """One seed, one mask; none drawn by the caller: torch's generator decides."""
    x, weight, bias, a, b, _ = make_inputs(torch.Generator().manual_seed(seed), (33,), 40, 24, 4)

    def y(**options):
        return lora_linear(x, weight, bias, a, b, 2.0, dropout=0.5, **options)

    assert torch.equal(y(seed=a_seed(seed)), y(seed=a_seed(seed)))
    assert not torch.equal(y(seed=a_seed(seed)), y(seed=a_seed(seed + 1)))
    torch.manual_seed(seed)
    first, second = y(), y()
    torch.manual_seed(seed)
    assert torch.equal(y(), first)
    assert not torch.equal(first, second)


def test_dropout_keeps_the_expectation(seed):
    x, weight, bias, a, b, _ = make_inputs(torch.Generator().manual_seed(seed), (2,), 512, 6, 4)
    plain = lora_linear(x, weight, bias, a, b, 2.0)
    draws = torch.stack([lora_linear(x, weight, bias, a, b, 2.0, dropout=0.25, seed=a_seed(i)) for i in range(2000)])
    error = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - plain).abs() <= 6 * error).all()
    assert draws.std(0).min() > 1e-3


def test_philox_keeps_as_many_as_asked():
    keep = philox_keep(1000, 1001, 0.1, a_seed(2**62 + 12345))
    assert abs(float(keep.double().mean()) - 0.9) < 6 * (0.09 / 1_001_000) ** 0.5
    for axis in (0, 1):
        share = keep.double().mean(axis)
        assert (share - 0.9).abs().max() < 0.06
    shifted = (keep[1:] == keep[:-1]).double().mean(), (keep[:, 1:] == keep[:, :-1]).double().mean()
    assert all(abs(float(same) - 0.82) < 0.003 for same in shifted)
    assert not torch.equal(keep, philox_keep(1000, 1001, 0.1, a_seed(12345)))


def test_philox_of_a_known_counter():
    """Random123's own vector for philox4x32-7: counter and key all zero."""
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    numbers = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for dropout in (0.1, 0.25, 0.31, 0.5, 0.75, 0.9):
        want = [number >= round(65536 * dropout) for number in numbers]
        assert philox_keep(1, 8, dropout, a_seed(0)).tolist() == [want]


def test_gradcheck_with_dropout(seed):
    x, weight, bias, a, b, _ = make_inputs(torch.Generator().manual_seed(seed), (2, 3), 5, 4, 2)
    leaves = [tensor.requires_grad_(True) for tensor in (x, a, b)]

    def dropped(x, a, b):
        return lora_linear(x, weight, bias, a, b, 0.7, dropout=0.4, seed=a_seed(seed))

    assert torch.autograd.gradcheck(dropped, leaves)


# ---- launches on a GPU -------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """What was computed; views and fresh memory are nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and not func.is_view and "empty" not in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_a_gradient_of_a_factor_is_one_launch(wanted):
    with FakeTensorMode(), Operations() as operations:
        x, dy, s = (torch.empty(64, size, dtype=torch.bfloat16, device="cuda") for size in (24, 40, 8))
        da, db = split.a_gradient(s, x, wanted), split.b_gradient(dy, s, wanted)
    assert len(operations.names) == 2, operations.names
    assert all("mm" in name for name in operations.names)
    assert (da.shape, da.dtype) == ((8, 24), wanted)
    assert (db.shape, db.dtype) == ((40, 8), wanted)
    assert da.is_contiguous()
    assert db.is_contiguous()


# ---- measures --------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_measures(seed, dropout):
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(generator, (4, 9), 12, 10, 3)
    mask = torch.rand(36, generator=generator) < 0.4
    options = {"dropout": dropout, "seed": a_seed(seed)}
    measures = LoraMeasures()
    got = run(lora_linear, *inputs, 2.0, **options, row_mask=mask, measures=measures)
    plain = run(lora_linear, *inputs, 2.0, **options)
    for mine, theirs in zip(got, plain):
        torch.testing.assert_close(mine, theirs, **EXACT)
    x, weight, bias, a, b, dy = inputs
    torch.testing.assert_close(measures.db_square, plain[3].square().sum(), **EXACT)
    answers = dy * mask.view(4, 9, 1)
    masked = run(lora_linear, x, weight, bias, a, b, answers, 2.0, **options)[3]
    torch.testing.assert_close(measures.db_square_masked, masked.square().sum(), **EXACT)
    assert not any(value.requires_grad for value in vars(measures).values())


def test_measures_of_half_precision_are_fp32_and_a_later_call_overwrites(seed):
    x, weight, bias, a, b, dy = make_inputs(torch.Generator().manual_seed(seed), (30,), 12, 10, 3)
    low = [t.bfloat16() for t in (x, weight, bias, a, b)]
    measures = LoraMeasures()
    mask = torch.ones(30, dtype=torch.bool)
    run(lora_linear, *low, dy.bfloat16(), 2.0, measures=measures, row_mask=mask)
    assert all(value.dtype == torch.float32 for value in vars(measures).values())
    torch.testing.assert_close(measures.db_square_masked, measures.db_square, rtol=1e-2, atol=0)
    with torch.no_grad():
        lora_linear(*low, 2.0, measures=measures)
    assert measures.db_square is None
    assert measures.db_square_masked is None


# ---- grouped ---------------------------------------------------------------------------------


def group_inputs(seed, outs=(12, 7, 9), ranks=(4, 2, 3), num_in=10, lead=(3, 5)):
    generator = torch.Generator().manual_seed(seed)
    each = [make_inputs(generator, lead, num_in, out, rank, bias=out != 7) for out, rank in zip(outs, ranks)]
    x = each[0][0]
    weights, biases, lora_as, lora_bs, dys = ([one[i] for one in each] for i in range(1, 6))
    return x, weights, biases, lora_as, lora_bs, dys


@pytest.mark.parametrize("scales", [(2.0, 2.0, 2.0), (2.0, 0.5, 1.0)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_group_is_its_members(seed, scales, dropout):
    x, weights, biases, lora_as, lora_bs, dys = group_inputs(seed)
    seeds = [a_seed(seed + i) for i in range(3)]
    x.requires_grad_(True)
    factors = [f.requires_grad_(True) for pair in zip(lora_as, lora_bs) for f in pair]
    measures = [LoraMeasures() for _ in range(3)]
    ys = lora_linear_grouped(
        x, weights, biases, lora_as, lora_bs, scales, dropout=dropout, seeds=seeds, measures=measures
    )
    got = torch.autograd.grad(ys, [x, *factors], dys)
    singles = [
        lora_linear(x, *each, dropout=dropout, seed=one)
        for *each, one in zip(weights, biases, lora_as, lora_bs, scales, seeds)
    ]
    want = torch.autograd.grad(singles, [x, *factors], dys)
    for mine, theirs in zip((*ys, *got), (*singles, *want)):
        torch.testing.assert_close(mine, theirs, **EXACT)
    for one, db in zip(measures, want[2::2]):
        torch.testing.assert_close(one.db_square, db.square().sum(), **EXACT)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck_of_a_group(seed, dropout):
    x, weights, biases, lora_as, lora_bs, _ = group_inputs(seed, outs=(3, 2), ranks=(2, 1), num_in=4, lead=(3,))
    leaves = [tensor.requires_grad_(True) for tensor in (x, *lora_as, *lora_bs)]
    seeds = [a_seed(seed), a_seed(seed + 1)]

    def group(x, a0, a1, b0, b1):
        return lora_linear_grouped(x, weights, biases, (a0, a1), (b0, b1), (0.7, 1.5), dropout=dropout, seeds=seeds)

    assert torch.autograd.gradcheck(group, leaves)


def test_a_group_with_an_output_that_nobody_uses(seed):
    x, weights, biases, lora_as, lora_bs, dys = group_inputs(seed)
    for factor in (*lora_as, *lora_bs):
        factor.requires_grad_(True)
    ys = lora_linear_grouped(x, weights, biases, lora_as, lora_bs, (2.0,) * 3)
    ys[1].backward(dys[1])
    want = run(lora_linear_reference, x, weights[1], biases[1], lora_as[1], lora_bs[1], dys[1], 2.0)
    torch.testing.assert_close(lora_as[1].grad, want[2], **EXACT)
    torch.testing.assert_close(lora_bs[1].grad, want[3], **EXACT)
    assert lora_as[0].grad is lora_bs[2].grad is None, "as autograd leaves them: an optimizer passes them over"


def test_a_group_of_unequal_lists():
    x, w, a, b = torch.zeros(5, 8), torch.zeros(9, 8), torch.zeros(3, 8), torch.zeros(9, 3)
    with pytest.raises(ValueError, match=r"one entry for each projection, got 2 weights, 2 biases, 1 lora_as"):
        lora_linear_grouped(x, [w, w], [None, None], [a], [b, b], [1.0, 1.0])
    with pytest.raises(ValueError, match="0 weights"):
        lora_linear_grouped(x, [], [], [], [], [])


@given(
    num_tokens=st.sampled_from([0, 1, 2, 17]),
    num_in=st.sampled_from([1, 3, 16, 65]),
    outs=st.lists(st.sampled_from([1, 2, 17, 64]), min_size=1, max_size=4),
    rank=st.integers(1, 20),
    dropout=st.sampled_from([0.0, 0.5]),
    draw=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_groups_of_any_shape(num_tokens, num_in, outs, rank, dropout, draw):
    ranks = [rank + i for i in range(len(outs))]
    x, weights, biases, lora_as, lora_bs, dys = group_inputs(draw, outs, ranks, num_in, (num_tokens,))
    leaves = [t.requires_grad_(True) for t in (x, *lora_as, *lora_bs)]
    seeds = [a_seed(draw + i) for i in range(len(outs))]
    scales = [0.5 + i for i in range(len(outs))]
    got = lora_linear_grouped(x, weights, biases, lora_as, lora_bs, scales, dropout=dropout, seeds=seeds)
    want = [
        lora_linear_reference(x, *each, dropout=dropout, keep=dropout_mask(x.shape, dropout, one) if dropout else None)
        for *each, one in zip(weights, biases, lora_as, lora_bs, scales, seeds)
    ]
    pairs = zip((*got, *torch.autograd.grad(got, leaves, dys)), (*want, *torch.autograd.grad(want, leaves, dys)))
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, **EXACT)


# ---- 4-bit weights ---------------------------------------------------------------------------


def test_a_4_bit_weight_is_dequantised_twice_and_not_kept(seed, monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    inputs = make_inputs(torch.Generator().manual_seed(seed), (7, 9), 128, 64, 8)
    x, weight, bias, a, b, dy = (tensor.float() for tensor in inputs)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    parameter = torch.nn.Parameter(packed, requires_grad=False)
    parameter.quant_state = state
    dense = functional.dequantize_4bit(packed, state)
    assert 0.01 < relative(dense, weight.double()) < 0.2
    calls = []
    original = compute.dequantised
    monkeypatch.setattr(compute, "dequantised", lambda *args: calls.append(1) or original(*args))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        got = run(lora_linear, x, parameter, bias, a, b, dy, 2.0)
    assert len(calls) == 2
    assert (64, 128) not in saved
    want = run(lora_linear_reference, *(t.double() for t in (x, dense, bias, a, b, dy)), 2.0)
    for mine, theirs in zip(got, want):
        assert relative(mine, theirs) <= 1e-5


def test_a_4_bit_weight_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    weight = torch.nn.Parameter(torch.zeros(36, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = type("State", (), {"shape": torch.Size((9, 8))})()
    with pytest.raises(ImportError, match=r"4-bit.*pip install bitsandbytes"):
        lora_linear(torch.zeros(5, 8), weight, None, torch.zeros(3, 8), torch.zeros(9, 3), 1.0)
