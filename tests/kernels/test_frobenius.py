"""Closed-form penalties against float64 autograd on the explicit product."""

from __future__ import annotations

import pytest
import torch

from fastpeft.kernels import factor_penalty, product_penalty

SIZES = [(1, 1, 1), (2, 17, 31), (3, 129, 67)]  # K matrices, in, out: none a multiple of a tile


def make_factors(seed, num, num_in, num_out, rank):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num, rank, num_in, generator=generator, dtype=torch.float64)
    b = torch.randn(num, num_out, rank, generator=generator, dtype=torch.float64)
    weight = torch.rand(num, generator=generator, dtype=torch.float64) + 0.1
    return a, b, weight


def explicit_product(a, b, weight, scale):
    return weight * (scale * (b @ a)).square().sum((1, 2))


def explicit_factors(a, b, weight, scale):
    return weight * (a.square().sum((1, 2)) + b.square().sum((1, 2)))


PENALTIES = [(product_penalty, explicit_product), (factor_penalty, explicit_factors)]


def differentiate(explicit, a, b, weight, scale):
    a, b = a.clone().requires_grad_(True), b.clone().requires_grad_(True)
    value = explicit(a, b, weight, scale)
    return value.detach(), *torch.autograd.grad(value.sum(), (a, b))


@pytest.mark.parametrize(("penalty", "explicit"), PENALTIES)
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 64])
@pytest.mark.parametrize(("num", "num_in", "num_out"), SIZES)
def test_value_and_gradients(seed, penalty, explicit, rank, num, num_in, num_out):
    factors = make_factors(seed, num, num_in, num_out, rank)
    want = differentiate(explicit, *factors, 16 / rank)
    for mine, theirs in zip(penalty(*factors, 16 / rank), want):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("penalty", "explicit"), PENALTIES)
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_single_precision(seed, penalty, explicit, rank):
    factors = make_factors(seed, 3, 129, 67, rank)
    single = penalty(*(tensor.float() for tensor in factors), 16 / rank)
    for mine, theirs in zip(single, differentiate(explicit, *factors, 16 / rank)):
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize(("penalty", "explicit"), PENALTIES)
def test_each_matrix_has_its_own_weight(seed, penalty, explicit):
    a, b, _ = make_factors(seed, 3, 9, 11, 4)
    value, da, db = penalty(a, b, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), 2.0)
    assert value[0] == value[2] == 0
    assert value[1] > 0
    assert not da[0].any()
    assert not db[2].any()
    assert da[1].any()
    assert db[1].any()


def test_product_of_a_fresh_adapter_is_zero(seed):
    """B = 0: no value and no gradient for A or B."""
    a, b, weight = make_factors(seed, 2, 9, 11, 4)
    assert not any(tensor.any() for tensor in product_penalty(a, torch.zeros_like(b), weight, 2.0))


def test_product_is_never_negative(seed):
    """B A = 0 with large A and B, so that the Gram value is only rounding: half of the time it is below 0."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    a = basis[:, :8] @ torch.randn(200, 8, 33, generator=generator)
    b = torch.randn(200, 21, 8, generator=generator) @ basis[:, 8:].t()
    value, _, _ = product_penalty(a, b, torch.ones(200), 2.0)
    assert (value >= 0).all()
    assert (value < 1).all()
