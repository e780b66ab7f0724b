"""What torch has for rows one behind another: asked for the right thing, equal to the reference, and refused with the
reason. No GPU has run it: FlexAttention's own eager form stands in for what its compiler makes, and torch's varlen
attention is given tensors without data."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as flex_module

from fastpeft.kernels.ops.varlen_attention import op, torch_attention
from fastpeft.kernels.ops.varlen_attention.masked import by_mask
from fastpeft.kernels.ops.varlen_attention.op import FLEX, KERNEL, MASK, RUNS, VARLEN, choose_way, varlen_attention
from fastpeft.kernels.ops.varlen_attention.reference import varlen_attention_reference
from fastpeft.kernels.ops.varlen_attention.seen import BLOCK, seen_by
from fastpeft.kernels.ops.varlen_attention.torch_attention import block_mask, flex, flex_fault, try_flex, varlen_fault
from fastpeft.kernels.sequences import Sequences
from tests.support.row_lengths import DRAWN, draw_lengths
from tests.support.step_recorder import record

SCALE = 0.4
ALL = {"causal": False, "window": None, "first_only": False}
MASKS: dict[str, dict[str, Any]] = {
    "all": ALL,
    "causal": ALL | {"causal": True},
    "a window": ALL | {"causal": True, "window": 5},
    "a window of one": ALL | {"causal": True, "window": 1},
    "first tokens": ALL | {"first_only": True},
}
LONG = [1, 150, 3, 129, 128, 70, 1]
"""Rows that begin and end within blocks, and some that are longer than one."""


def of_a_bucket(lengths: list[int]) -> Sequences:
    """As a captured step has them: the lengths are the device's alone."""
    known = Sequences.of(lengths)
    return Sequences(known.cu_seqlens, known.num_tokens, known.longest + 3, known.num_rows)


def draw(lengths, mask, heads=4, groups=2, width=16, dtype=torch.float64):
    """Query, key and value, and what of them the reference is given."""
    q, k, v = (torch.randn(sum(lengths), n, width, dtype=dtype, requires_grad=True) for n in (heads, groups, groups))
    return (q[Sequences.of(lengths).starts] if mask["first_only"] else q), (q, k, v)


def expected_of(tensors, lengths, mask):
    y = varlen_attention_reference(*tensors, lengths, SCALE, causal=mask["causal"], window=mask["window"])
    return y[Sequences.of(lengths).starts] if mask["first_only"] else y


def compare(tensors, found, expected, bound=1e-10):
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    dy = torch.randn_like(expected)
    got, want = (torch.autograd.grad(y, tensors, dy) for y in (found, expected))
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


# ---- what is seen ------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", [*DRAWN, "long"])
def test_which_tokens_are_seen(kind, mask, fresh_seed):
    """Token by token, and by blocks: those of a BlockMask are neither too few nor too many."""
    lengths = LONG if kind == "long" else draw_lengths(kind, random.Random(fresh_seed))
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    asking = Sequences.of(lengths).starts if mask["first_only"] else place
    wanted = row[asking][:, None] == row
    if mask["causal"]:
        distance = asking[:, None] - place
        wanted &= (distance >= 0) & (distance < (mask["window"] or len(place)))
    seen = seen_by(of_a_bucket(lengths), **mask)
    assert torch.equal(seen.mask(len(place)), wanted)
    num_blocks, blocks = seen.blocks(len(place))
    padded = torch.nn.functional.pad(wanted, (0, -len(place) % BLOCK, 0, -len(asking) % BLOCK))
    any_of = padded.view(-(-len(asking) // BLOCK), BLOCK, -1, BLOCK).any(3).any(1)
    for queries in range(len(any_of)):
        found = blocks[queries, : num_blocks[queries]].tolist()
        assert found == any_of[queries].nonzero()[:, 0].tolist()
        assert sorted(blocks[queries].tolist()) == list(range(any_of.shape[1])), "each of them once"


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_under_a_mask(mask, groups, seed):
    torch.manual_seed(seed)
    lengths = [3, 1, 9, 9, 2]
    query, tensors = draw(lengths, mask, groups=groups)
    found = varlen_attention(query, *tensors[1:], of_a_bucket(lengths), SCALE, **mask)
    assert found.is_contiguous()
    compare(tensors, found, expected_of(tensors, lengths, mask))


@pytest.mark.parametrize("mask", [MASKS["all"], MASKS["a window"], MASKS["first tokens"]])
def test_dropout_under_a_mask_keeps_the_mean(mask, seed):
    torch.manual_seed(seed)
    lengths = [3, 5]
    query, tensors = draw(lengths, mask, width=4)
    query, (_, key, value) = query.detach(), (x.detach() for x in tensors)
    sequences = of_a_bucket(lengths)
    drawn = torch.stack(
        [varlen_attention(query, key, value, sequences, SCALE, **mask, dropout=0.25) for _ in range(2000)]
    )
    error = drawn.std(0) / len(drawn) ** 0.5
    expected = expected_of([x.detach() for x in tensors], lengths, mask)
    assert ((drawn.mean(0) - expected).abs() <= 6 * error + 1e-12).all()
    assert (drawn.std(0) > 0).any()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_nothing_is_asked_of_the_device(mask):
    """Of the mask, and of FlexAttention's blocks."""
    sequences = of_a_bucket(LONG)
    operations, _ = record(lambda: block_mask(seen_by(sequences, **mask), sequences.num_tokens))
    assert operations
    small = of_a_bucket([3, 1, 9])
    query, (_, key, value) = draw([3, 1, 9], mask)
    operations, _ = record(lambda: varlen_attention(query, key, value, small, SCALE, **mask).sum().backward())
    assert operations


# ---- FlexAttention -----------------------------------------------------------------------------


@pytest.fixture
def eager_flex(monkeypatch):
    """What is compiled on a GPU, as torch computes it where it is not; its check that a CPU has no gradients is off."""
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_attention, "_compiled", lambda: flex_module.flex_attention)
    try_flex.cache_clear()
    yield
    try_flex.cache_clear()


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("lengths", [[3, 1, 9, 9, 2], LONG], ids=["short", "long"])
def test_flex_attention_with_our_blocks(lengths, mask, groups, eager_flex, seed):
    torch.manual_seed(seed)
    query, tensors = draw(lengths, mask, groups=groups)
    found = flex(query, *tensors[1:], of_a_bucket(lengths), SCALE, **mask)
    assert found.is_contiguous()
    compare(tensors, found, expected_of(tensors, lengths, mask))


def test_the_blocks_are_those_that_torch_finds():
    """By looking at every pair of tokens."""
    sequences = of_a_bucket(LONG)
    for mask in MASKS.values():
        seen = seen_by(sequences, **mask)
        ours = block_mask(seen, sequences.num_tokens)
        theirs = flex_module.create_block_mask(
            ours.mask_mod, None, None, len(seen.first_Q), sequences.num_tokens, device="cpu", BLOCK_SIZE=BLOCK
        )
        partial = theirs.to_dense() != 0
        assert torch.equal(ours.to_dense() != 0, partial)


def test_blocks_are_made_once_for_all_layers(eager_flex, monkeypatch):
    made = []
    original = torch_attention.block_mask
    monkeypatch.setattr(torch_attention, "block_mask", lambda *given: made.append(1) or original(*given))
    sequences = of_a_bucket([3, 9])
    for mask in (MASKS["causal"], MASKS["a window"], MASKS["causal"], MASKS["a window"]):
        query, tensors = draw([3, 9], mask)
        flex(query, *tensors[1:], sequences, SCALE, **mask)
    assert len(made) == 2


HEADS = 4, 2, 16, torch.float32, torch.device("cpu")


def test_the_trial_lets_what_is_right_through(eager_flex):
    assert try_flex(*HEADS) is None


def test_the_trial_tells_what_is_wrong(eager_flex, monkeypatch):
    real = flex_module.flex_attention
    monkeypatch.setattr(torch_attention, "_compiled", lambda: lambda *given, **more: real(*given, **more) * 1.05)
    fault = try_flex(*HEADS)
    assert fault is not None
    assert fault.startswith("it is wrong by 5.0e-02")


def test_the_trial_tells_what_cannot_be_compiled(eager_flex, monkeypatch):
    def fails(*given, **more):
        raise RuntimeError("No valid triton configs. OutOfResources\nmore")

    monkeypatch.setattr(torch_attention, "_compiled", lambda: fails)
    assert try_flex(*HEADS) == "compiling it failed: RuntimeError: No valid triton configs. OutOfResources"


# ---- torch.nn.attention.varlen -----------------------------------------------------------------


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_installed_torch_takes_what_its_varlen_attention_is_given(mask, groups, monkeypatch):
    """Forward and backward, by shapes and arguments alone."""
    lengths = [3, 1, 9]
    sequences = Sequences.of(lengths, "meta")
    query, key, value = (
        torch.empty(13, n, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in (4, groups, groups)
    )
    asked = query[:3] if mask["first_only"] else query
    monkeypatch.setattr(op, "varlen_fault", lambda query, dropout: None)
    found = varlen_attention(asked, key, value, sequences, SCALE, **mask)
    assert found.shape == asked.shape
    gradients = torch.autograd.grad(found, (query, key, value), torch.empty_like(found))
    assert [g.shape for g in gradients] == [query.shape, key.shape, value.shape]


# ---- which way, and why ------------------------------------------------------------------------


def given(dtype=torch.bfloat16, width=64, heads=4, device="cuda:0") -> Any:
    """What is looked at of a query on a GPU that is not there."""
    return SimpleNamespace(is_cuda=device != "cpu", dtype=dtype, shape=(0, heads, width), device=torch.device(device))


@pytest.fixture
def gpu(monkeypatch):
    """With FlexAttention that compiles; returns what sets the compute capability."""
    monkeypatch.setattr(torch_attention, "try_flex", lambda *kind: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    return lambda *capability: monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)


FP32, FP64, FP16 = torch.float32, torch.float64, torch.float16
WAYS = [  # query, causal, dropout, way, why
    ({}, True, 0.0, VARLEN, ""),
    ({}, False, 0.0, VARLEN, ""),
    ({"width": 256, "dtype": FP16}, True, 0.0, VARLEN, ""),
    ({}, False, 0.1, KERNEL, f"{VARLEN}: it has no dropout"),
    ({"dtype": FP32}, False, 0.1, KERNEL, f"{VARLEN}: it has no dropout"),
    ({"dtype": FP32}, False, 0.0, KERNEL, f"{VARLEN}: it is for half precision, and this is float32"),
    ({"dtype": FP32}, True, 0.0, FLEX, f"{KERNEL}: decoders are none of its"),
    ({"dtype": FP32, "width": 128}, False, 0.0, FLEX, f"{KERNEL}: it takes heads of up to 64 features, not in fp64"),
    ({"width": 100}, True, 0.0, FLEX, "it takes heads of up to 256 features in multiples of 8, and these have 100"),
    ({}, True, 0.1, RUNS, f"{FLEX}: it has no dropout"),
    ({"dtype": FP64}, True, 0.0, RUNS, f"{FLEX}: it is not for float64"),
    ({"width": 512}, True, 0.0, RUNS, f"{FLEX}: it takes heads of 16 to 256 features, and these have 512"),
    ({"device": "cpu"}, True, 0.0, RUNS, ""),
    ({"device": "cpu"}, False, 0.1, RUNS, ""),
]


@pytest.mark.parametrize(("query", "causal", "dropout", "way", "why"), WAYS)
def test_which_way(query, causal, dropout, way, why, gpu):
    found = choose_way(given(**query), 4, causal, dropout)
    assert found.name == way
    assert why in found.why
    assert bool(found.why) == bool(why)
    captured = choose_way(given(**query), 4, causal, dropout, knows_lengths=False)
    assert captured.name == (MASK if way == RUNS else way)


def test_grouped_heads_are_none_of_the_kernels(gpu):
    assert choose_way(given(dtype=FP32), 2, False, 0.0).name == FLEX


def test_an_old_gpu_is_told(gpu):
    gpu(7, 5)
    assert varlen_fault(given(dtype=FP16), 0.0) == "it needs a GPU of compute capability 8.0"


def test_an_old_torch_is_told(gpu, monkeypatch):
    monkeypatch.setattr(torch_attention, "varlen_arguments", lambda: None)
    monkeypatch.setattr(torch_attention, "_flex_is_known", lambda: False)
    assert varlen_fault(given(), 0.0) == f"torch {torch.__version__} has none with a scale and a window"
    told = f"torch {torch.__version__} has none that takes blocks, grouped heads and a scale"
    assert flex_fault(given(), 4, 0.0) == told


def test_a_machine_without_triton_is_told(gpu, monkeypatch):
    monkeypatch.setattr(torch_attention, "has_triton", lambda: False)
    assert flex_fault(given(), 4, 0.0) == "it is compiled by Triton, which is not installed"


def test_the_installed_torch_is_known():
    assert torch_attention.varlen_arguments() is not None
    assert torch_attention._flex_is_known()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_on_a_gpu(mask, dtype, seed):
    """Whichever way the device takes, and FlexAttention where it is not the one."""
    torch.manual_seed(seed)
    known = Sequences.of(LONG, "cuda")
    sequences = Sequences(known.cu_seqlens, known.num_tokens, known.longest, known.num_rows)
    query, key, value = (torch.randn(sum(LONG), n, 64, device="cuda", requires_grad=True) for n in (4, 2, 2))
    halves = [x.to(dtype) for x in (query, key, value)]
    asked = halves[0][known.starts] if mask["first_only"] else halves[0]
    expected = by_mask(asked.double(), *(x.double() for x in halves[1:]), sequences, SCALE, **mask)
    dy = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (query, key, value), dy)
    for attend in (varlen_attention, flex):
        found = attend(asked, *halves[1:], sequences, SCALE, **mask)
        bound = 2e-2 if dtype == torch.bfloat16 else 5e-3
        assert float((found - expected).norm() / expected.norm()) < bound
        got = torch.autograd.grad(found, (query, key, value), dy.to(dtype), retain_graph=True)
        for a, b in zip(got, wanted):
            assert float((a - b).norm() / b.norm()) < bound
