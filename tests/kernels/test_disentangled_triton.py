"""disentangled_attention's Triton kernels, interpreted where there is no GPU, beside the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastpeft.kernels.dropout import dropout_mask
from fastpeft.kernels.launch import LAUNCHES
from fastpeft.kernels.ops.disentangled_attention import launches
from fastpeft.kernels.ops.disentangled_attention.op import disentangled_attention
from tests.support.closeness import relative_error
from tests.support.disentangled_inputs import HEADS, LENGTHS, SCALE, Inputs, frozen_tables, gradients
from tests.support.tiers import some

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def small_tiles(monkeypatch):
    """So that short rows have several."""
    monkeypatch.setattr(launches, "block", lambda length, dtype: 16)


def compare(inputs: Inputs, dropout: float = 0.0) -> tuple[torch.Tensor, ...]:
    """Returns the output and the gradients."""
    seed = keep = None
    if dropout:
        device = inputs.query.device
        seed = torch.tensor([2**40 + 17], device=device)
        num_tokens, longest = len(inputs.query), max(inputs.lengths)
        keep = dropout_mask((num_tokens, HEADS, longest), dropout, seed)
    got, want = inputs.computed(dropout=dropout, seed=seed), inputs.expected(dropout=dropout, keep=keep)
    found, expected = gradients(inputs, got, want)
    for mine, theirs in zip((got, *found), (want, *expected), strict=True):
        assert mine.dtype == inputs.query.dtype
        assert (mine.double() - theirs).norm() <= BOUND[mine.dtype] * theirs.norm().clamp_min(1)  # some are 0
    return got, *found


@pytest.mark.parametrize("lengths", some(list(LENGTHS.values()), quick=(0, 3, 4)))
def test_output_and_gradients(lengths, triton_device, poisoned, small_tiles, seed):
    compare(Inputs.of(seed, lengths, buckets=8, dtype=torch.float32, device=triton_device))


@pytest.mark.parametrize("length", some([17, 63, 128, 300], quick=(0,)))
@pytest.mark.parametrize("dtype", BOUND)
def test_long_rows(dtype, length, triton_device, poisoned, seed):
    """In the tiles that a GPU would take."""
    compare(Inputs.of(seed, [length, length // 2], buckets=16, dtype=dtype, device=triton_device), 0.1)


@pytest.mark.parametrize(("keys", "queries"), some([(False, True), (True, False), (False, False)], unpack=True))
def test_a_part_of_the_positions(keys, queries, triton_device, poisoned, small_tiles, seed):
    before = LAUNCHES["position_gradients_kernel"]
    options = {"keys": keys, "queries": queries, "dtype": torch.float32, "device": triton_device}
    compare(Inputs.of(seed, [7, 19], **options))
    assert LAUNCHES["position_gradients_kernel"] - before == (keys or queries)


def test_dropout_keeps_what_is_specified(triton_device, poisoned, small_tiles, seed):
    """The same in forward and in each kernel of backward: by token and head, and the key's place in its row."""
    compare(Inputs.of(seed, [19, 5], dtype=torch.float32, device=triton_device), 0.3)


def test_padding_gets_no_gradient_and_gives_none(triton_device, poisoned, small_tiles, seed):
    """Rows of one length with tokens that take no part: at their ends, within, all of them."""
    places = torch.arange(18)
    mask = torch.stack([places < 5, places % 3 != 1, places < 0]).flatten()
    inputs = Inputs.of(seed, [18] * 3, mask=mask, dtype=torch.float32, device=triton_device)
    for x in compare(inputs)[:4]:
        assert not x[~inputs.mask].any()


@pytest.mark.parametrize("asked", some([1, 18]))
def test_the_first_tokens_of_each_row_ask(asked, triton_device, poisoned, small_tiles, seed):
    compare(Inputs.of(seed, [9, 2, 0, 20], asked=asked, dtype=torch.float32, device=triton_device))


def test_tokens_behind_the_last_row_get_nothing(triton_device, poisoned, small_tiles, seed):
    inputs = Inputs.of(seed, [5, 18], spare=4, dtype=torch.float32, device=triton_device)
    compare(inputs)
    assert not inputs.computed()[23:].any()


def test_no_rows(triton_device, poisoned, seed):
    inputs = Inputs.of(seed, [3], dtype=torch.float32, device=triton_device)
    leaves = [x.detach().requires_grad_() for x in inputs.leaves()]
    y = disentangled_attention(*leaves, inputs.distances, SCALE, inputs.cu_seqlens[:1])
    assert not any(x.any() for x in (y, *torch.autograd.grad(y.sum(), leaves)))


def test_heads_that_are_a_part_of_a_wider_product(triton_device, poisoned, small_tiles, seed):
    inputs = Inputs.of(seed, [5, 18], dtype=torch.float32, device=triton_device)
    wide = torch.cat([inputs.query, inputs.key, inputs.value], dim=1).detach()
    parts = [part.requires_grad_() for part in wide.split(HEADS, dim=1)]
    assert not parts[0].is_contiguous()
    compare(dataclasses.replace(inputs, query=parts[0], key=parts[1], value=parts[2]))


def test_the_same_bits_twice(triton_device, small_tiles, seed):
    inputs = Inputs.of(seed, [19, 5], dtype=torch.float32, device=triton_device)
    one = torch.tensor([5], device=triton_device)

    def both() -> list[torch.Tensor]:
        y = inputs.computed(dropout=0.2, seed=one)
        return [y, *torch.autograd.grad(y, inputs.leaves(), torch.ones_like(y))]

    assert all(torch.equal(first, second) for first, second in zip(both(), both()))


def test_nothing_is_asked_of_the_device(triton_device, small_tiles, monkeypatch, seed):
    """A step could be captured, and replayed with other lengths in the same places."""
    inputs = Inputs.of(seed, [19, 5, 9], dtype=torch.float32, device=triton_device)
    cu_seqlens, distances = inputs.cu_seqlens, inputs.distances

    def step() -> list[torch.Tensor]:
        y = disentangled_attention(*inputs.leaves(), distances, SCALE, cu_seqlens, dropout=0.1, seed=one)
        return [y, *torch.autograd.grad(y, inputs.leaves(), weights)]

    one, weights = torch.tensor([5], device=triton_device), torch.ones_like(inputs.query)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
            patch.setattr(torch.Tensor, name, _asked)
        step()
        cu_seqlens.copy_(torch.tensor([0, 2, 2, 17]))
        found = step()
    keep = dropout_mask((len(inputs.query), HEADS, 19), 0.1, one)
    want = dataclasses.replace(inputs, lengths=[2, 0, 15]).expected(dropout=0.1, keep=keep)
    expected = [want, *torch.autograd.grad(want, inputs.leaves(), weights.double())]
    assert all(relative_error(mine, theirs) <= BOUND[torch.float32] for mine, theirs in zip(found, expected))


def _asked(*_):
    raise AssertionError("the host asked for a value")


def test_which_kernels_are_launched(triton_device, seed):
    inputs = Inputs.of(seed, [5, 9], dtype=torch.float32, device=triton_device)
    before = LAUNCHES.copy()
    y = inputs.computed()
    assert LAUNCHES - before == {"attend_kernel": 1}
    torch.autograd.grad(y.sum(), inputs.leaves())
    names = "attend", "query_gradients", "key_gradients", "position_gradients", "sum_positions"
    assert LAUNCHES - before == {f"{name}_kernel": 1 for name in names}
    before = LAUNCHES.copy()
    torch.autograd.grad(frozen_tables(inputs).computed().sum(), inputs.leaves()[:3])
    assert LAUNCHES - before == {f"{name}_kernel": 1 for name in names[:3]}
