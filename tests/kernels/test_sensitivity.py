"""The norm of the frozen weight's gradient: both forms, and the sketch's expectation."""

from __future__ import annotations

import pytest
import torch

from fastpeft.kernels import gradient_norm, sketch_norm
from fastpeft.kernels.sensitivity import reference

SHAPES = [  # tokens, in, out: the Gram form is taken where T < I O / (I + O)
    (1, 33, 47),
    (19, 40, 40),
    (20, 40, 40),
    (500, 33, 47),
    (7, 130, 600),
    (300, 64, 600),
]


@pytest.mark.parametrize(("num_tokens", "num_in", "num_out"), SHAPES)
def test_equals_the_explicit_product(seed, num_tokens, num_in, num_out):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_in, generator=generator, dtype=torch.float64)
    g = torch.randn(num_tokens, num_out, generator=generator, dtype=torch.float64)
    want = (g.t() @ x).norm()
    got = gradient_norm(x, g)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    single = gradient_norm(x.float(), g.float())
    assert single.dtype == torch.float32
    assert abs(float(single) / float(want) - 1) < 1e-5


def test_shapes_reach_both_forms():
    gram = [num_tokens < num_in * num_out / (num_in + num_out) for num_tokens, num_in, num_out in SHAPES]
    assert gram == [True, True, False, False, True, False]
    assert SHAPES[-1][2] > reference.TILE_ROWS  # more than one tile


@pytest.mark.parametrize("num_tokens", [12, 400])
def test_half_precision_is_summed_in_fp32(seed, num_tokens):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 96, generator=generator).bfloat16()
    g = (torch.randn(num_tokens, 80, generator=generator) * 100).bfloat16()
    got, want = gradient_norm(x, g), (g.double().t() @ x.double()).norm()
    assert got.dtype == torch.float32
    assert abs(float(got) / float(want) - 1) < 5e-3


@pytest.mark.parametrize("num_tokens", [5, 90])
def test_two_uses_add_up_before_the_norm(seed, num_tokens):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, num_tokens, 24, generator=generator, dtype=torch.float64)
    g = torch.randn(2, num_tokens, 20, generator=generator, dtype=torch.float64)
    want = (g[0].t() @ x[0] + g[1].t() @ x[1]).norm()
    torch.testing.assert_close(gradient_norm(x.flatten(0, 1), g.flatten(0, 1)), want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("num_tokens", [4, 200])
def test_cancelling_uses_have_norm_zero(seed, num_tokens):
    """The second use undoes the first: rounding must not make the root of a negative number."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 24, generator=generator)
    g = torch.randn(num_tokens, 20, generator=generator)
    both = gradient_norm(torch.cat([x, x]), torch.cat([g, -g]))
    assert both.isfinite()
    assert both < 1e-2 * gradient_norm(x, g)


def test_rows_that_do_not_fit():
    with pytest.raises(ValueError, match=r"3 rows of X but 4 of G"):
        gradient_norm(torch.zeros(3, 5), torch.zeros(4, 6))


@pytest.mark.parametrize("rank", [1, 8])
def test_sketch_squared_is_unbiased(seed, rank):
    """E_A ||dL/dB||^2 = s^2 v r ||G^T X||^2, over 4,000 draws of A with PEFT's initial distribution."""
    generator = torch.Generator().manual_seed(seed)
    num_in, scale, num_draws = 30, 2.0, 4000
    x = torch.randn(50, num_in, generator=generator, dtype=torch.float64)
    g = torch.randn(50, 20, generator=generator, dtype=torch.float64)
    bound = num_in**-0.5  # kaiming_uniform_(a=sqrt(5)): variance 1 / (3 in)
    a = (torch.rand(num_draws, rank, num_in, generator=generator, dtype=torch.float64) * 2 - 1) * bound
    db_norm = (scale * (g.t() @ x) @ a.transpose(1, 2)).flatten(1).norm(dim=1)
    estimate = sketch_norm(db_norm, scale, variance=1 / (3 * num_in), rank=rank)
    exact = gradient_norm(x, g)
    squares = (estimate / exact).square()
    standard_error = float(squares.std()) / num_draws**0.5
    assert abs(float(squares.mean()) - 1) < 6 * standard_error
    assert standard_error < 0.05
    assert abs(float(estimate.mean() / exact) - 1) < (0.15 if rank == 1 else 0.05)
