"""The norm of the frozen weight's gradient: both forms, PyTorch and Triton, and the sketch's expectation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.kernels import gradient_norm, sketch_norm
from fastpeft.kernels.dispatch import Choice, Config, forced
from fastpeft.kernels.launch import LAUNCHES
from fastpeft.kernels.ops.sensitivity import op
from fastpeft.kernels.ops.sensitivity.reference import gradient_norm_reference
from tests.support.closeness import Largest, relative_error

SHAPES = [  # tokens, in, out: the Gram form is taken where T < I O / (I + O)
    (1, 33, 47),
    (19, 40, 40),
    (20, 40, 40),
    (500, 33, 47),
    (7, 130, 600),
    (300, 64, 600),
]
FUSED = Choice("fused")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def draw(seed, rows, num_in, num_out, dtype=torch.float64, device="cpu"):
    """One (x, g) for each number of rows, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(n, num_in, generator=generator, dtype=torch.float64) for n in rows]
    gs = [torch.randn(n, num_out, generator=generator, dtype=torch.float64) for n in rows]
    return [x.to(dtype).to(device) for x in xs], [g.to(dtype).to(device) for g in gs]


def exact(xs, gs):
    return gradient_norm_reference([x.double() for x in xs], [g.double() for g in gs])


@pytest.fixture
def small_tiles(monkeypatch):
    """The PyTorch path takes several tiles at shapes of a test."""
    monkeypatch.setattr(op, "CPU_TILE", 1)


# ---- PyTorch -------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "num_in", "num_out"), SHAPES)
def test_equals_the_explicit_product(seed, num_tokens, num_in, num_out):
    xs, gs = draw(seed, [num_tokens], num_in, num_out)
    got = gradient_norm(xs[0], gs[0])
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact(xs, gs), rtol=1e-10, atol=0)
    for dtype, limit in LIMITS.items():
        low_x, low_g = draw(seed, [num_tokens], num_in, num_out, dtype)
        low = gradient_norm(low_x[0], low_g[0])
        assert low.dtype == torch.float32
        assert relative_error(low, exact(low_x, low_g)) <= limit, dtype


def test_shapes_reach_both_forms_and_several_tiles():
    gram = [num_tokens < num_in * num_out / (num_in + num_out) for num_tokens, num_in, num_out in SHAPES]
    assert gram == [True, True, False, False, True, False]
    assert SHAPES[-1][2] > 256


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    num_in=st.integers(1, 50),
    num_out=st.integers(1, 50),
    dtype=st.sampled_from([torch.float64, *LIMITS]),
    lead=st.booleans(),
    draw_seed=st.integers(0, 2**31),
)
def test_any_uses_of_any_shape(rows, num_in, num_out, dtype, lead, draw_seed):
    xs, gs = draw(draw_seed, rows, num_in, num_out, dtype)
    want = exact(xs, gs)
    if lead:
        xs, gs = [x.unsqueeze(0) for x in xs], [g.unsqueeze(1) for g in gs]
    got = gradient_norm(xs, gs)
    assert relative_error(got, want) <= LIMITS.get(dtype, 1e-6)  # fp64: Gram terms that cancel


@pytest.mark.parametrize("num_in", [24, 500])
@pytest.mark.parametrize("num_tokens", [5, 400])
def test_two_uses_add_up_before_the_norm(seed, num_tokens, num_in):
    xs, gs = draw(seed, [num_tokens, num_tokens // 2], num_in, 290)
    want = (gs[0].t() @ xs[0] + gs[1].t() @ xs[1]).norm()
    torch.testing.assert_close(gradient_norm(xs, gs), want, rtol=1e-10, atol=0)
    joined = gradient_norm(torch.cat(xs), torch.cat(gs))
    torch.testing.assert_close(gradient_norm(xs, gs), joined, rtol=1e-10, atol=0)


@pytest.mark.parametrize("num_tokens", [4, 200])
def test_cancelling_uses_have_norm_zero(seed, num_tokens):
    """The second use undoes the first: rounding must not make the root of a negative number."""
    (x,), (g,) = draw(seed, [num_tokens], 24, 20, torch.float32)
    both = gradient_norm([x, x], [g, -g])
    assert both.isfinite()
    assert both < 1e-2 * gradient_norm(x, g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_that_nearly_cancel_in_half_precision(seed, dtype):
    """Tokens alike, gradients that sum to almost nothing: 100 times smaller than the Gram form's terms."""
    (x,), (g,) = draw(seed, [60], 200, 180)
    x, g = (x * 0.1 + x[:1]).to(dtype), (g - g.mean(0)).to(dtype)
    terms = (x.double() @ x.double().t()).norm() * (g.double() @ g.double().t()).norm()
    want = exact([x], [g])
    assert terms > 30 * want.square()
    assert relative_error(gradient_norm(x, g), want) <= 1e-3


@pytest.mark.parametrize("num_tokens", [5, 90])
def test_products_beyond_fp16(seed, num_tokens):
    (x,), (g,) = draw(seed, [num_tokens], 24, 20, torch.float16)
    got = gradient_norm(x * 1000, g * 1000)
    assert relative_error(got, exact([x * 1000], [g * 1000])) <= 1e-3


@pytest.mark.parametrize(("num_in", "num_out"), [(600, 520), (520, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_never_stored(seed, small_tiles, num_in, num_out, dtype):
    for rows in ([700, 30], [20, 10]):
        xs, gs = draw(seed, rows, num_in, num_out, dtype)
        with Largest() as largest:
            got = gradient_norm(xs, gs)
        assert 0 < largest.elements <= 256 * 600 < num_in * num_out
        assert relative_error(got, exact(xs, gs)) <= LIMITS[dtype]


def test_uses_are_not_joined(seed, small_tiles):
    xs, gs = draw(seed, [3000, 3000], 20, 300, torch.float32)
    with Largest() as largest:
        gradient_norm(xs, gs)
    assert largest.elements <= 256 * 20


@pytest.mark.parametrize("rows", [[9], [700, 30]])
def test_the_same_bits_twice_and_inputs_left_alone(seed, rows):
    xs, gs = draw(seed, rows, 130, 270, torch.float32)
    before = [t.clone() for t in (*xs, *gs)]
    assert torch.equal(gradient_norm(xs, gs), gradient_norm(xs, gs))
    assert all(torch.equal(now, then) for now, then in zip((*xs, *gs), before))


def test_it_carries_no_gradient():
    x = torch.ones(3, 4, requires_grad=True)
    assert not gradient_norm(x, torch.ones(3, 5)).requires_grad


@pytest.mark.parametrize("shape", [((0, 4), (0, 5)), ((3, 0), (3, 5)), ((3, 4), (3, 0))])
def test_nothing_has_norm_zero(shape):
    assert gradient_norm(torch.ones(shape[0]), torch.ones(shape[1])) == 0


# ---- Triton --------------------------------------------------------------------------------

TRITON_SHAPES = [  # rows of each use, in, out; the interpreter's tiles are 32 wide
    ([1], 16, 47, "direct"),
    ([63], 40, 96, "direct"),
    ([70, 5], 33, 20, "direct"),
    ([33, 31, 2], 64, 32, "direct"),
    ([1], 96, 100, "gram"),
    ([30, 33], 200, 160, "gram"),
    ([40], 128, 161, "gram"),
    ([5, 0, 8], 160, 192, "gram"),
]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("rows", "num_in", "num_out", "form"), TRITON_SHAPES)
def test_triton(seed, triton_device, poisoned, rows, num_in, num_out, form, dtype):
    xs, gs = draw(seed, rows, num_in, num_out, dtype, triton_device)
    kernel = f"gradient_norm_{form}"
    before = LAUNCHES[kernel]
    with forced(FUSED, "gradient_norm"):
        got, again = gradient_norm(xs, gs), gradient_norm(xs, gs)
    if triton_device.type == "cpu":  # a GPU may find another form cheaper
        assert LAUNCHES[kernel] == before + 2
    assert got.dtype == torch.float32
    assert got.shape == ()
    assert relative_error(got, exact(xs, gs)) <= min(LIMITS[dtype], 1e-4)
    assert torch.equal(got, again)


def test_triton_of_strided_tensors(seed, triton_device):
    xs, gs = draw(seed, [20], 80, 60, torch.float32, triton_device)
    with forced(FUSED, "gradient_norm"):
        got = gradient_norm(xs[0][:, ::2], gs[0][:, ::3])
    assert relative_error(got, exact([xs[0][:, ::2]], [gs[0][:, ::3]])) <= 1e-5


def test_triton_of_cancelling_uses(seed, triton_device):
    (x,), (g,) = draw(seed, [20], 96, 96, torch.float32, triton_device)
    with forced(FUSED, "gradient_norm"):
        both, one = gradient_norm([x, x], [g, -g]), gradient_norm(x, g)
    assert both.isfinite()
    assert both < 1e-2 * one


def test_float64_stays_with_pytorch(seed, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = LAUNCHES.total()
    xs, gs = draw(seed, [9], 20, 30)
    torch.testing.assert_close(gradient_norm(xs, gs), exact(xs, gs), rtol=1e-10, atol=0)
    assert LAUNCHES.total() == before


@pytest.mark.soak
@pytest.mark.parametrize("num_tokens", [1, 63, 1000])
@pytest.mark.parametrize("num_in", [16, 96, 312, 768, 1000])
def test_triton_soak(seed, triton_device, poisoned, num_tokens, num_in):
    wide = Choice("fused", Config(256, 256, 256, 8, 1)) if triton_device.type == "cpu" else FUSED  # fewer steps
    for num_out in (16, 96, 312, 768, 1000):
        for dtype, limit in LIMITS.items():
            xs, gs = draw(seed, [num_tokens, num_tokens // 3], num_in, num_out, dtype, triton_device)
            with forced(wide, "gradient_norm"):
                assert relative_error(gradient_norm(xs, gs), exact(xs, gs)) <= limit, (num_out, dtype)


def test_the_cheaper_form_counts_what_one_multiprocessor_does():
    """Few tokens and a wide weight: fewer multiplications in the Gram form, but all of them in one tile."""
    shapes = (64, 0, 768, 768)
    gram, direct = op.gram_config(torch.bfloat16, shapes), op.direct_config(torch.bfloat16, shapes, 132)
    assert op.gram_cost(gram, shapes, 1) < op.direct_cost(direct, shapes, 1) / 5
    assert op.gram_cost(gram, shapes, 132) > op.direct_cost(direct, shapes, 132)
    many = (1500, 0, 4096, 4096)
    gram, direct = op.gram_config(torch.bfloat16, many), op.direct_config(torch.bfloat16, many, 132)
    assert op.gram_cost(gram, many, 132) < op.direct_cost(direct, many, 132)
    long = (8192, 0, 4096, 4096)
    assert op.gram_cost(gram, long, 132) > op.direct_cost(direct, long, 132)


# ---- input that does not fit ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "g", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(4, 6), r"gradient_norm: x \(3, 5\) and g \(4, 6\) do not fit"),
        (torch.zeros(3, 5), torch.zeros(()), r"g \(\) do not fit"),
        ([torch.zeros(3, 5)] * 2, [torch.zeros(3, 6)], r"2 tensors x but 1 tensors g"),
        ([], [], r"0 tensors x but 0 tensors g"),
        (
            [torch.zeros(3, 5), torch.zeros(2, 4)],
            [torch.zeros(3, 6), torch.zeros(2, 6)],
            r"use 1: x \(2, 4\).*not of the same weight as use 0, whose in and out are 5 and 6",
        ),
        (torch.zeros(3, 5), torch.zeros(3, 6).half(), r"g is torch\.float16 on cpu but x is torch\.float32 on cpu"),
        (torch.zeros(3, 5).long(), torch.zeros(3, 6).long(), r"x is torch\.int64"),
        (torch.zeros(3, 5), torch.zeros(3, 6, device="meta"), r"g is torch\.float32 on meta"),
    ],
)
def test_input_that_does_not_fit(x, g, message):
    with pytest.raises(ValueError, match=message):
        gradient_norm(x, g)


# ---- the sketch ----------------------------------------------------------------------------


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


@pytest.mark.parametrize("wrong", [(0.0, 1.0, 8), (1.0, -1.0, 8), (1.0, 1.0, 0), (1.0, float("nan"), 8)])
def test_a_sketch_of_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match=r"sketch_norm: .* expected positive numbers"):
        sketch_norm(torch.ones(()), *wrong)
