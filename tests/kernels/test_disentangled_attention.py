"""disentangled_attention: its reference against transformers, and PyTorch's form against the reference, in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, build_relative_position

from fastpeft.kernels.ops.disentangled_attention import row_blocks
from fastpeft.kernels.ops.disentangled_attention.distances import Distances
from fastpeft.kernels.ops.disentangled_attention.op import disentangled_attention
from fastpeft.kernels.ops.disentangled_attention.reference import disentangled_attention_reference
from tests.support.closeness import Largest
from tests.support.disentangled_inputs import LENGTHS, Inputs, bucket_rows, frozen_tables, gradients

SEED = torch.tensor([77])


# ---- the reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 17, 63, 128, 300])
@pytest.mark.parametrize("buckets", [-1, 16], ids=["no buckets", "log buckets"])
@pytest.mark.parametrize("share", [True, False], ids=["one key", "keys of their own"])
def test_the_reference_is_transformers_attention(share, buckets, length, seed):
    torch.manual_seed(seed)
    config = DebertaV2Config(
        hidden_size=24, num_attention_heads=2, relative_attention=True, position_buckets=buckets,
        max_position_embeddings=64, share_att_key=share, pos_att_type=["p2c", "c2p"],
    )  # fmt: skip
    theirs = DisentangledSelfAttention(config).double().eval()
    span = theirs.pos_ebd_size
    x, table = torch.randn(2, length, 24).double(), torch.randn(2 * span, 24).double().requires_grad_()
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, max(1, length - 5) :] = False
    x.requires_grad_()
    relative = build_relative_position(x, x, bucket_size=buckets, max_position=theirs.max_relative_positions)
    pairs = mask[:, None, None, :] & mask[:, None, :, None]
    want = theirs(x, pairs, relative_pos=relative, rel_embeddings=table)[0] * mask[..., None]

    rows = bucket_rows(length, buckets, theirs.max_relative_positions, span)
    position_key, position_query = (
        (theirs.key_proj, theirs.query_proj) if share else (theirs.pos_key_proj, theirs.pos_query_proj)
    )
    heads = [part.flatten(0, -2).view(-1, 2, 12) for part in (
        theirs.query_proj(x), theirs.key_proj(x), theirs.value_proj(x), position_key(table), position_query(table),
    )]  # fmt: skip
    scale = 1 / 6  # transformers rounds its root to fp32, which this one bears
    got = disentangled_attention_reference(*heads, rows, scale, [length, length], mask=mask.flatten())
    got = got.reshape(want.shape)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(want)
    leaves = [x, table, *theirs.parameters()]
    found, expected = (torch.autograd.grad(y, leaves, weights) for y in (got, want))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# ---- blocks of rows --------------------------------------------------------------------------


def compare(inputs: Inputs, **options) -> None:
    got, want = inputs.computed(**options), inputs.expected(**options)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    found, expected = gradients(inputs, got, want)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("buckets", [-1, 8], ids=["no buckets", "log buckets"])
def test_output_and_gradients(lengths, buckets, seed):
    compare(Inputs.of(seed, lengths, buckets=buckets))


def test_frozen_tables_get_no_gradient(seed):
    inputs = Inputs.of(seed, [7, 12])
    frozen = frozen_tables(inputs)
    weights = torch.randn_like(inputs.query)
    found, expected = (
        torch.autograd.grad((each.computed() * weights).sum(), inputs.leaves()[:3]) for each in (frozen, inputs)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_rows_of_the_tables_that_no_distance_reads(seed):
    compare(Inputs.of(seed, [6, 9], rows=[0, 0, 0, 0, 1, 3, 4, 5, 6, 7, 8, 9, 12, 12, 12, 14, 14]))


@pytest.mark.parametrize(("keys", "queries"), [(False, False), (True, False), (False, True)])
def test_a_part_of_the_positions(keys, queries, seed):
    compare(Inputs.of(seed, [7, 12], keys=keys, queries=queries))


@pytest.mark.parametrize(
    "real",
    [[9, 9], [9, 4], [1, 0], "first ones", "holes"],
    ids=["all", "padded", "a row without tokens", "padded left", "holes"],
)
def test_tokens_that_take_no_part(real, seed):
    places = torch.arange(9)
    if real == "first ones":
        mask = torch.stack([places >= 3, places >= 0])
    elif real == "holes":
        mask = torch.stack([places % 3 != 1, places % 4 != 0])
    else:
        mask = torch.stack([places < length for length in real])
    inputs = Inputs.of(seed, [9, 9], mask=mask.flatten())
    compare(inputs)
    y = inputs.computed()
    assert not y[~inputs.mask].any()
    found = torch.autograd.grad(y, inputs.leaves(), torch.randn_like(y))
    assert all(not gradient[~inputs.mask].any() for gradient in found[:3])


def test_tokens_behind_the_last_row_get_nothing(seed):
    inputs = Inputs.of(seed, [5, 8], spare=4)
    compare(inputs)
    assert not inputs.computed()[13:].any()


@pytest.mark.parametrize("asked", [1, 3])
def test_the_first_tokens_of_each_row_ask(asked, seed):
    """Rows that have fewer ask with all."""
    inputs = Inputs.of(seed, [9, 2, 0, 12], asked=asked)
    compare(inputs)


@pytest.mark.parametrize("limit", [1, 300, 4000], ids=["a query at a time", "some queries", "some heads"])
def test_few_weights_at_a_time(limit, monkeypatch, seed):
    monkeypatch.setattr(row_blocks, "CHUNK_BYTES", limit)
    monkeypatch.setattr(row_blocks, "KEYS", 8)
    compare(Inputs.of(seed, [21, 20, 5], buckets=8))


def test_long_rows_without_all_weights(monkeypatch, seed):
    """No tensor comes near a row's N x N."""
    monkeypatch.setattr(row_blocks, "CHUNK_BYTES", 2**16)
    monkeypatch.setattr(row_blocks, "KEYS", 16)
    length = 700
    inputs = Inputs.of(seed, [length], dtype=torch.float32)
    with Largest() as largest:
        y = inputs.computed(dropout=0.1, seed=SEED)
        torch.autograd.grad(y, inputs.leaves(), torch.ones_like(y))
    assert largest.elements < length**2 / 8


def test_backward_keeps_no_weights(seed):
    inputs = Inputs.of(seed, [40, 40])
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs.computed(dropout=0.1, seed=SEED)
    assert max(kept) == inputs.query.numel()


# ---- dropout ---------------------------------------------------------------------------------


def test_dropout_is_the_same_in_backward(monkeypatch, seed):
    """A row a block: so that what was kept is known by token, head and key."""
    inputs = Inputs.of(seed, [6, 11, 4])
    made, masks = row_blocks._Masks.make, []

    def noted(self, weights):
        masks.append(made(self, weights).clone())
        return masks[-1].clone()

    monkeypatch.setattr(row_blocks, "SHORTEST", 1.0, raising=False)
    monkeypatch.setattr(row_blocks._Masks, "make", noted)
    got = inputs.computed(dropout=0.4, seed=SEED)
    keep = torch.ones(21, inputs.query.shape[1], 11, dtype=torch.bool)
    for mask in masks:
        num = mask.shape[-1]
        start = {6: 0, 11: 6, 4: 17}[num]
        keep[start : start + num, :, :num] = mask[:, 0].transpose(0, 1).bool()
    assert 0.5 < keep.double().mean() < 1
    want = inputs.expected(dropout=0.4, keep=keep)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    forward = list(masks)
    found, expected = gradients(inputs, got, want)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(masks) == 2 * len(forward)
    assert all(torch.equal(one, two) for one, two in zip(masks, masks[len(forward) :]))


def test_dropout_keeps_the_mean(seed):
    inputs = Inputs.of(seed, [8, 6])
    with torch.no_grad():
        draws = torch.stack([inputs.computed(dropout=0.25, seed=torch.tensor([i])) for i in range(1500)])
        error = (draws.var(0) / len(draws)).sqrt()
        assert ((draws.mean(0) - inputs.expected()).abs() < 5 * error).all()
        assert torch.equal(inputs.computed(dropout=0.25, seed=torch.tensor([3])), draws[3])
        assert not torch.equal(draws[3], draws[4])


# ---- what is refused -------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_named(seed):
    inputs = Inputs.of(seed, [5, 4])
    with pytest.raises(ValueError, match="disentangled_attention: value, position tables: "):
        disentangled_attention(
            inputs.query, inputs.key, inputs.value[1:], inputs.position_keys[1:], None, inputs.distances, 0.3,
            inputs.cu_seqlens,
        )  # fmt: skip
    few, tables = Distances.of(range(5), 3), (inputs.position_keys[:5], None)
    with pytest.raises(ValueError, match="queries 0 to 5 and keys 0 to 5; the distances are of 3 and 3 at most"):
        disentangled_attention(inputs.query, inputs.key, inputs.value, *tables, few, 0.3, inputs.cu_seqlens)


@pytest.mark.parametrize("rows", [[], [1, 2], [0, 1, 0]])
def test_distances_ascend_from_zero(rows):
    with pytest.raises(ValueError, match="expected a row for each distance"):
        Distances.of(rows, 1)


def test_a_second_derivative_is_refused(seed):
    inputs = Inputs.of(seed, [5])
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(inputs.computed().sum(), inputs.leaves(), create_graph=True)
