"""attention against its reference in float64: dropout, padding, few heads at a time."""

from __future__ import annotations

import pytest
import torch

from fastpeft.kernels.ops.attention import op
from fastpeft.kernels.ops.attention.op import attention
from fastpeft.kernels.ops.attention.reference import attention_reference

SEED = torch.tensor([77])


def inputs(seed, num_rows, num_queries, num_keys, num_heads, width):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    return [
        draw(num_rows, num_queries, num_heads, width),
        draw(num_rows, num_keys, num_heads, width),
        draw(num_rows, num_keys, num_heads, width),
    ]


def padding(num_rows, num_keys, last):
    bias = torch.zeros(num_rows, 1, 1, num_keys, dtype=torch.float64)
    bias[-1, ..., num_keys - last :] = torch.finfo(torch.float64).min
    return bias


def reference(query, key, value, bias, **options):
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    return attention_reference(*heads_first, 0.3, bias, **options).transpose(1, 2)


def compare(tensors, bias, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(expected)
    got, want = (torch.autograd.grad(y, tensors, weights) for y in (found, expected))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("num_rows", "num_queries", "num_keys", "num_heads"),
    [(2, 5, 5, 3), (3, 1, 7, 2), (1, 1, 1, 1), (2, 17, 17, 2), (1, 3, 6, 4)],
)
def test_output_and_gradients_in_float64(num_rows, num_queries, num_keys, num_heads, seed):
    tensors = inputs(seed, num_rows, num_queries, num_keys, num_heads, 4)
    bias = padding(num_rows, num_keys, last=num_keys // 3)
    found = attention(*tensors, 0.3, bias)
    compare(tensors, bias, found, reference(*tensors, bias))


def test_dropout_is_the_same_in_backward(monkeypatch, seed):
    tensors = inputs(seed, 2, 6, 6, 3, 4)
    keep = torch.empty(3, 2, 6, 6, dtype=torch.float64)
    made = op._mask

    def noted(weights, dropout, mask_seed, heads):
        mask = made(weights, dropout, mask_seed, heads)
        keep[heads] = mask
        return mask

    monkeypatch.setattr(op, "_mask", noted)
    found = attention(*tensors, 0.3, None, dropout=0.4, seed=SEED)
    assert 0 < keep.mean() < 1
    expected = reference(*tensors, None, dropout=0.4, keep=keep.clone().transpose(0, 1))
    compare(tensors, None, found, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_few_heads_at_a_time_without_all_weights(monkeypatch, dropout, seed):
    tensors = inputs(seed, 2, 8, 8, 4, 4)
    largest = 0
    weights = op._Heads.weights

    def watched(self):
        nonlocal largest
        found = weights(self)
        largest = max(largest, found.numel() * found.element_size())
        return found

    monkeypatch.setattr(op._Heads, "weights", watched)
    limit = 2 * 8 * 8 * 8
    monkeypatch.setattr(op, "CHUNK_BYTES", limit)
    found = attention(*tensors, 0.3, None, dropout=dropout, seed=SEED)
    assert largest == limit
    if not dropout:  # else each part has a mask of its own
        compare(tensors, None, found, reference(*tensors, None))
    else:
        torch.autograd.grad(found.sum(), tensors)
    assert largest == limit


def test_backward_keeps_no_weights(seed):
    tensors = inputs(seed, 2, 40, 40, 2, 4)
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(*tensors, 0.3, dropout=0.1, seed=SEED)
    assert max(kept) == 2 * 40 * 2 * 4
