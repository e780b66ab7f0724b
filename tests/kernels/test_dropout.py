"""Masks of dropout on a CPU: their rate, that they are independent, and that a seed gives them again."""

from __future__ import annotations

import math

import pytest
import torch

from fastpeft.kernels.dropout import draw_seed, dropout_mask, keep_mask

CPU = torch.device("cpu")


def kept(num: int, dropout: float, seed: int) -> torch.Tensor:
    return keep_mask(1, num, dropout, torch.tensor([seed]), torch.float64).flatten()


@pytest.mark.parametrize("dropout", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_rate(dropout, seed):
    num = 400_000
    found = kept(num, dropout, seed).mean().item()
    rounded = round(2**16 * dropout) / 2**16
    assert abs(found - (1 - rounded)) < 5 * math.sqrt(dropout * (1 - dropout) / num)
    assert abs(rounded - dropout) <= 2**-17


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 64, 384])
def test_neighbours_rows_and_columns_are_independent(lag, seed):
    mask = kept(400_000, 0.1, seed) - 0.9
    assert abs((mask[lag:] * mask[:-lag]).mean().item()) < 5 * 0.09 / math.sqrt(len(mask) - lag)


@pytest.mark.parametrize("other", [1, 2, 3, 4096, 2**40])
def test_seeds_near_each_other_are_independent(other, seed):
    """Layers, heads and steps have seeds of their own."""
    first, second = kept(400_000, 0.1, seed) - 0.9, kept(400_000, 0.1, seed + other) - 0.9
    for lag in (0, 1, 2):
        product = first[: len(first) - lag] * second[lag:]
        assert abs(product.mean().item()) < 5 * 0.09 / math.sqrt(len(product))


def test_each_of_the_four_numbers_of_a_word(seed):
    counts = kept(400_000, 0.1, seed).view(-1, 4).mean(0)
    assert (counts - 0.9).abs().max() < 5 * 0.3 / math.sqrt(100_000)


def test_a_seed_gives_the_mask_again_and_a_state_the_seed():
    state = torch.get_rng_state()
    first = draw_seed(CPU)
    mask = dropout_mask((7, 33), 0.2, first)
    torch.set_rng_state(state)
    assert torch.equal(draw_seed(CPU), first)
    assert torch.equal(dropout_mask((7, 33), 0.2, first), mask)
    assert torch.equal(keep_mask(7, 33, 0.2, first, torch.float32).bool(), mask)
    assert not torch.equal(dropout_mask((7, 33), 0.2, first + 1), mask)


def test_a_longer_mask_begins_like_a_shorter_one(seed):
    assert torch.equal(kept(1000, 0.3, seed)[:123], kept(123, 0.3, seed))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_small_and_empty(shape):
    assert dropout_mask(shape, 0.5, torch.tensor([3])).shape == shape
