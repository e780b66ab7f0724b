"""Truncation against a dense float64 SVD, and the configuration that makes it readable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.errors import UserError
from fastpeft.export.trim import Trimmed, TrimmedMatrix, trimmed_config, truncate

SHARES = st.one_of(st.sampled_from([1e-12, 0.5, 0.9, 0.99, 0.999999, 1.0]), st.floats(1e-6, 1.0))


def factors(num_out: int, num_in: int, rank: int, seed: int, decay: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 A (R, I) and B (O, R) whose directions shrink by `decay`."""
    generator = torch.Generator().manual_seed(seed)
    a_RI = torch.randn(rank, num_in, generator=generator)
    b_OR = torch.randn(num_out, rank, generator=generator)
    return a_RI * decay ** torch.arange(rank)[:, None], b_OR


@settings(deadline=None, max_examples=150, print_blob=True)
@given(
    num_out=st.integers(1, 40),
    num_in=st.integers(1, 40),
    rank=st.integers(1, 12),
    decay=st.sampled_from([1.0, 0.5, 0.1]),
    scale=st.sampled_from([0.01, 1.0, 16.0]),
    share=SHARES,
    seed=st.integers(0, 2**31),
)
def test_it_is_the_smallest_rank_with_the_energy_and_the_best_of_its_rank(
    num_out, num_in, rank, decay, scale, share, seed
):
    a_RI, b_OR = factors(num_out, num_in, rank, seed, decay)
    cut = truncate(a_RI, b_OR, scale, share)
    dense_OI = scale * b_OR.double() @ a_RI.double()
    u, sigma, v = torch.linalg.svd(dense_OI, full_matrices=False)
    energy, total = sigma.square(), float(sigma.square().sum())
    assert cut.a_KI.shape == (cut.rank, num_in)
    assert cut.b_OK.shape == (num_out, cut.rank)
    assert 1 <= cut.rank <= min(num_out, num_in, rank)
    # A share on the edge between two ranks may fall to either in the last bits.
    slack = 1e-12 * total
    assert float(energy[: cut.rank].sum()) >= share * total - slack
    assert cut.rank == 1 or float(energy[: cut.rank - 1].sum()) < share * total + slack
    product = cut.b_OK @ cut.a_KI
    best = (u[:, : cut.rank] * sigma[: cut.rank]) @ v[: cut.rank]
    left_out = float(energy[cut.rank :].sum())
    assert float((dense_OI - product).square().sum()) == pytest.approx(left_out, rel=1e-6, abs=1e-20 * total + slack)
    gap = 1.0 if cut.rank == len(sigma) else float(1 - sigma[cut.rank] / sigma[cut.rank - 1])
    if gap > 1e-3:  # with equal singular values the best is not unique
        torch.testing.assert_close(product, best, rtol=0, atol=1e-9 * float(sigma[0]))
    assert cut.energy_kept == pytest.approx(float(energy[: cut.rank].sum()) / total, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_rank_that_is_really_there_is_found(rank):
    a_RI, b_OR = factors(30, 20, 8, seed=3)
    b_OR[:, rank:] = 0  # as AdaLoRA's padded export has it
    assert truncate(a_RI, b_OR, 2.0, 1 - 1e-12).rank == rank


def test_the_share_is_of_squared_singular_values():
    """diag(3, 1): 9 of 10 parts of the energy lie in the first."""
    a_RI, b_OR = torch.eye(2), torch.diag(torch.tensor([3.0, 1.0]))
    assert [truncate(a_RI, b_OR, 1.0, share).rank for share in (0.5, 0.89, 0.91, 1.0)] == [1, 1, 2, 2]
    assert truncate(a_RI, b_OR, 5.0, 0.5).energy_kept == pytest.approx(0.9)


def test_an_update_that_is_zero_keeps_rank_one():
    a_RI, b_OR = factors(6, 5, 4, seed=0)
    cut = truncate(a_RI, b_OR * 0, 2.0, 0.99)
    assert (cut.rank, cut.energy_kept) == (1, 1.0)
    assert not (cut.b_OK @ cut.a_KI).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    a_RI, b_OR = factors(6, 5, 4, seed=0)
    a_RI[0, 0] = value
    with pytest.raises(UserError, match="not finite"):
        truncate(a_RI, b_OR, 2.0, 0.99)


def test_every_way_of_reading_the_scale_that_knows_both_patterns_or_neither_gives_one():
    ranks = {"a": 3, "b": 5, "c": 1}
    matrices = [TrimmedMatrix(name, 8, rank, 0.99) for name, rank in ranks.items()]
    old = {"r": 8, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {}, "alpha_pattern": {}, "kept": 1}
    config = trimmed_config(old, Trimmed(0.99, matrices, {}))
    assert config["kept"] == 1
    assert not config["use_rslora"]
    assert config["lora_alpha"] / config["r"] == 1
    for name, rank in ranks.items():
        assert config["rank_pattern"].get(name, config["r"]) == rank
        assert config["alpha_pattern"].get(name, config["lora_alpha"]) == rank
