"""varlen_attention against its reference in float64, whichever way computes it; no matrix of all tokens."""

from __future__ import annotations

import random
import sys
from functools import partial
from types import ModuleType

import pytest
import torch

from fastpeft.kernels.ops.varlen_attention import op, torch_attention
from fastpeft.kernels.ops.varlen_attention.op import varlen_attention
from fastpeft.kernels.ops.varlen_attention.reference import varlen_attention_reference
from fastpeft.kernels.sequences import Sequences
from tests.support.closeness import Largest
from tests.support.row_lengths import DRAWN, draw_lengths

SCALE, WIDTH = 0.4, 8
MASKS = {"all": {}, "causal": {"causal": True}, "a window": {"causal": True, "window": 5}}


def draw(lengths, heads=4, groups=4, dtype=torch.float64, device="cpu"):
    def one(num_heads):
        x = torch.randn(sum(lengths), num_heads, WIDTH, dtype=dtype, device=device)
        return x.requires_grad_(True)

    return one(heads), one(groups), one(groups)


def compare(tensors, found, expected, bound=1e-10):
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    weights = torch.randn_like(expected)
    got, want = (torch.autograd.grad(y, tensors, weights) for y in (found, expected))
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


@pytest.mark.parametrize("groups", [4, 2], ids=["a key a head", "grouped heads"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", DRAWN)
def test_output_and_gradients(kind, mask, groups, fresh_seed):
    torch.manual_seed(fresh_seed)
    lengths = draw_lengths(kind, random.Random(fresh_seed))
    tensors = draw(lengths, groups=groups)
    found = varlen_attention(*tensors, Sequences.of(lengths), SCALE, **mask)
    compare(tensors, found, varlen_attention_reference(*tensors, lengths, SCALE, **mask))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_heads_of_one_key_are_right_on_any_number_of_threads(num_threads, fresh_seed, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(num_threads)
    torch.manual_seed(fresh_seed)
    lengths = draw_lengths("mixed", random.Random(fresh_seed))
    tensors = draw(lengths, groups=1)
    found = varlen_attention(*tensors, Sequences.of(lengths), SCALE, causal=True)
    compare(tensors, found, varlen_attention_reference(*tensors, lengths, SCALE, causal=True))


@pytest.mark.parametrize("kind", DRAWN)
def test_the_first_tokens_alone(kind, fresh_seed):
    torch.manual_seed(fresh_seed)
    lengths = draw_lengths(kind, random.Random(fresh_seed))
    query, key, value = draw(lengths)
    sequences = Sequences.of(lengths)
    found = varlen_attention(query[sequences.starts], key, value, sequences, SCALE, first_only=True)
    whole = varlen_attention_reference(query, key, value, lengths, SCALE)
    compare((query, key, value), found, whole[sequences.starts])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_dropout_keeps_rows_apart_and_the_mean(mask, seed):
    """Over 2,000 draws: a weight that is dropped too often, or twice, moves the mean."""
    torch.manual_seed(seed)
    lengths = [3, 3, 7]
    query, key, value = (x.detach() for x in draw(lengths, groups=2))
    copies = 2000
    tiled = [torch.cat([row.repeat(copies, 1, 1) for row in x.split(lengths)]) for x in (query, key, value)]
    many = Sequences.of([length for length in lengths for _ in range(copies)])
    found = varlen_attention(*tiled, many, SCALE, dropout=0.25, **mask)
    rows = found.split([copies * length for length in lengths])
    found = torch.cat([row.view(copies, -1, 4, WIDTH) for row in rows], dim=1)
    expected = varlen_attention_reference(query, key, value, lengths, SCALE, **mask)
    error = found.std(0) / copies**0.5
    assert ((found.mean(0) - expected).abs() <= 6 * error + 1e-12).all()
    assert (found.std(0) > 0).any()


def test_dropout_is_the_same_in_backward(seed):
    lengths = [2, 2, 3]

    def dropped(*tensors):
        torch.manual_seed(seed)
        return varlen_attention(*tensors, Sequences.of(lengths), SCALE, causal=True, dropout=0.3)

    torch.manual_seed(seed)
    assert torch.autograd.gradcheck(dropped, draw(lengths, heads=2, groups=1), fast_mode=True)


def test_a_neighbour_changes_nothing(seed):
    torch.manual_seed(seed)
    lengths = [5, 5, 11]
    tensors = [x.detach() for x in draw(lengths)]
    sequences = Sequences.of(lengths)
    before = varlen_attention(*tensors, sequences, SCALE)
    for x in tensors:
        x[5:10] = torch.randn_like(x[5:10])
    after = varlen_attention(*tensors, sequences, SCALE)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[10:], after[10:])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_matrix_of_all_tokens(dropout, seed):
    torch.manual_seed(seed)
    lengths = [40] * 20 + [60]
    tensors = draw(lengths, heads=2, groups=2, dtype=torch.float32)
    with Largest() as largest:
        varlen_attention(*tensors, Sequences.of(lengths), SCALE, dropout=dropout).sum().backward()
    assert largest.elements < sum(lengths) ** 2 / 4


@pytest.mark.parametrize("kind", ["mixed", "one token"])
@pytest.mark.parametrize("first_only", [False, True])
def test_the_kernel_of_a_gpu(kind, first_only, triton_device, seed):
    torch.manual_seed(seed)
    lengths = draw_lengths(kind, random.Random(seed), longest=9)
    query, key, value = draw(lengths, heads=1, groups=1, dtype=torch.float32, device=triton_device)
    sequences = Sequences.of(lengths, triton_device)
    asked = query[sequences.starts] if first_only else query
    found = varlen_attention(asked, key, value, sequences, SCALE, first_only=first_only)
    expected = varlen_attention_reference(query, key, value, lengths, SCALE)
    expected = expected[sequences.starts] if first_only else expected
    compare((query, key, value), found, expected, bound=2e-5)


# ---- torch's varlen attention, as it is called -------------------------------------------------


def torch_of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                  window_size=(-1, -1)):  # fmt: skip
    assert query.shape[1] == key.shape[1], "2.11 knows no grouped heads"
    return _as_documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def torch_of_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                  window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None,
                  num_splits=None):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return _as_documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def torch_of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("it has no scale: not to be called")


def _as_documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
    """(-1, -1): all; (-1, 0): causal; (W, 0): also no more than W before."""
    assert query.is_contiguous()
    assert cu_seq_k.dtype == torch.int32
    lengths = cu_seq_k.diff().tolist()
    assert max(lengths) <= max_k
    assert int(cu_seq_q.diff().max()) <= max_q
    if len(query) != len(key):
        assert window_size == (-1, -1)
        firsts = torch.zeros(len(key), *query.shape[1:], dtype=query.dtype)
        firsts[cu_seq_k[:-1].long()] = query
        return varlen_attention_reference(firsts, key, value, lengths, scale)[cu_seq_k[:-1].long()]
    left, right = window_size
    more = {} if right == -1 else {"causal": True, "window": None if left == -1 else left + 1}
    return varlen_attention_reference(query, key, value, lengths, scale, **more)


@pytest.fixture
def torch_version(monkeypatch, request):
    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = request.param
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    torch_attention.varlen_arguments.cache_clear()
    monkeypatch.setattr(op, "varlen_fault", lambda query, dropout: None)
    yield request.param
    torch_attention.varlen_arguments.cache_clear()


@pytest.mark.parametrize("torch_version", [torch_of_2_11, torch_of_2_13], indirect=True)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_torch_is_called_as_it_is_documented(torch_version, mask, groups, seed):
    torch.manual_seed(seed)
    lengths = [3, 9, 9, 1]
    tensors = draw(lengths, groups=groups)
    sequences = Sequences.of(lengths)
    found = varlen_attention(*tensors, sequences, SCALE, **mask)
    compare(tensors, found, varlen_attention_reference(*tensors, lengths, SCALE, **mask))
    if not mask:
        first = varlen_attention(tensors[0][sequences.starts], *tensors[1:], sequences, SCALE, first_only=True)
        torch.testing.assert_close(first, found[sequences.starts])


@pytest.mark.parametrize("torch_version", [torch_of_2_10], indirect=True)
def test_a_torch_without_a_scale_is_left_alone(torch_version):
    assert torch_attention.varlen_arguments() is None


def test_a_torch_without_the_module_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    torch_attention.varlen_arguments.cache_clear()
    assert torch_attention.varlen_arguments() is None
    torch_attention.varlen_arguments.cache_clear()


@pytest.mark.parametrize("wrong", ["query", "key", "dtypes", "window", "first_only"])
def test_what_does_not_fit_is_named(wrong):
    query, key, value = draw([3, 4])
    more = {}
    if wrong == "query":
        query = query[1:]
    elif wrong == "key":
        query, key, value = query[1:], key[1:], value[1:]
    elif wrong == "dtypes":
        value = value.float()
    elif wrong == "first_only":
        query, more = query[:2], {"first_only": True, "causal": True}
    else:
        more = {"window": 3}
    with pytest.raises(ValueError, match=rf"varlen_attention: .*{wrong}"):
        varlen_attention(query, key, value, Sequences.of([3, 4]), SCALE, **more)
