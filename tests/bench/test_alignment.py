"""Alignments of canonical spaces: a host that is another one turned is read as it was."""

from __future__ import annotations

import pytest
import torch

from bench.alignment import ALIGNMENTS, NUM_FITTED, agreement, aligned_by
from fastpeft.adapters.unihyperlora import probe, projectors


def hosts(seed: int, turn: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """What two hosts make of the probe words (W x d): the same but for a rotation, or unlike."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(probe.NUM_WORDS, 24, generator=generator) * torch.logspace(0, -2, 24)
    rotation, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    return source, source @ rotation if turn else torch.randn(probe.NUM_WORDS, 24, generator=generator)


@pytest.mark.parametrize("name", sorted(set(ALIGNMENTS) - {"turned"}))
def test_a_turned_host_says_the_codes_and_another_one_does_not(name, seed):
    read, write = ALIGNMENTS[name]
    for turn in (True, False):
        source, other = hosts(seed, turn)
        codes = projectors.codes_of(source, 6)
        found = agreement(read, [(other, codes)])
        assert found > 0.95 if turn else found < 0.4, (turn, found)
    source, other = hosts(seed)
    codes = projectors.codes_of(source, 6)
    assert write(other, codes).norm(dim=0) == pytest.approx(torch.ones(6))


def test_the_control_is_aligned_with_nothing(seed):
    source, other = hosts(seed)
    codes = projectors.codes_of(source, 6)
    phi, offset = ALIGNMENTS["turned"][0](other, codes)
    assert torch.corrcoef(torch.cat([(other @ phi + offset).t(), codes.t()])).diagonal(6)[:6].square().mean() < 0.8


def test_the_products_functions_come_back_and_what_was_fitted_is_noted(seed):
    source, other = hosts(seed)
    codes = projectors.codes_of(source, 6)
    with aligned_by("procrustes") as fitted:
        probe.read_codes(other, codes)
    assert probe.read_codes is projectors.read_codes
    assert probe.write_codes is projectors.write_codes
    assert [(x.shape, c.shape) for x, c in fitted] == [(other.shape, codes.shape)]
    assert 0 < NUM_FITTED < probe.NUM_WORDS
