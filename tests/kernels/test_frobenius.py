"""The weighted penalty of all matrices against float64 autograd on the explicit product, and the norms beside it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.kernels import FlatLayout, MatrixGroup, weighted_frobenius
from fastpeft.kernels.launch import LAUNCHES
from fastpeft.kernels.ops.frobenius import reference
from fastpeft.kernels.ops.frobenius.op import gram_side
from tests.support.closeness import relative_error
from tests.support.flat_model import EXTRA, HEAD, SHAPES, Random, make_layout

RANKS = [1, 4, 8, 16, 64]
CPU = torch.device("cpu")


def explicit(data, layout, coefficient_K, penalty):
    """Each matrix's penalty and the gradient of their sum, by autograd on B A."""
    data = data.detach().double().cpu().requires_grad_()
    value_K = torch.zeros(layout.num_matrices, dtype=torch.float64)
    for group in layout.groups:
        for k, a, b in zip(group.indices, group.stack_a(data), group.stack_b(data)):
            size = (group.scale * b @ a).square().sum() if penalty == "product" else a.square().sum() + b.square().sum()
            value_K[k] = coefficient_K[k].double().cpu() * size
    gradient = torch.autograd.grad(value_K.sum(), data, allow_unused=True)[0]
    return value_K.detach(), gradient


def make(seed, layout, dtype=torch.float32, device=CPU):
    random = Random(seed, dtype, device)
    return random(layout.num_total), random(layout.num_total), random(layout.num_matrices).abs() + 0.1


def check(seed, layout, device, penalty, dtype=torch.float32, given_grams=False, into=False, bound=1e-5):
    """Values, gradients, norms and sketches of one call, everything that it writes poisoned before."""
    data, grad, coefficient_K = make(seed, layout, dtype, device)
    value_K, gradient = explicit(data, layout, coefficient_K, penalty)
    before, whole = grad.clone(), grad.double().cpu() + gradient
    target = torch.full((layout.num_factors,), torch.nan, dtype=dtype, device=device) if into else None
    result = weighted_frobenius(
        data, grad, layout, coefficient_K, penalty=penalty, into=target, measure=True,
        grams=grams_of(data, layout) if given_grams else None,
    )  # fmt: skip
    cut, num = layout.num_adapter, layout.num_factors
    added = grad - before if target is None else target
    assert relative_error(result.values, value_K) < bound
    assert relative_error(added[:num] if target is None else added, gradient[:num]) < 10 * bound
    if into:
        assert torch.equal(grad, before)
        whole = grad.double().cpu()
    assert relative_error(grad, whole) < bound
    assert torch.equal(grad[num:], before[num:])
    want = [whole.norm(), value_K.sum(), gradient.norm(), gradient.norm() / whole[:cut].norm()]
    got = [result.norm, result.penalty, result.penalty_norm, result.share]
    for mine, theirs in zip(got, want):
        assert relative_error(mine, theirs) < bound
    for group in layout.groups:
        for k, b, a in zip(group.indices, group.stack_b(before), group.stack_a(data)):
            assert relative_error(result.square_grad_b_K[k], b.double().square().sum()) < bound
            assert relative_error(result.square_a_K[k], a.double().square().sum()) < bound


def grams_of(data, layout):
    side = gram_side(layout)
    grams = data.new_zeros(layout.num_matrices, 2, side, side)
    for group, index_K in zip(layout.groups, layout.index_K):
        a, b = group.stack_a(data), group.stack_b(data)
        grams[index_K, :, : group.rank, : group.rank] = torch.stack([a @ a.mT, b.mT @ b], 1)
    return grams


# ---- PyTorch -------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["product", "factors"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("into", [False, True])
def test_double_precision(seed, penalty, rank, into):
    check(seed, make_layout((rank, rank)), CPU, penalty, torch.float64, into=into, bound=1e-11)


@pytest.mark.parametrize("penalty", ["product", "factors"])
@pytest.mark.parametrize("ranks", [(1, 64), (8, 4), (256, 16)])
def test_single_precision(seed, penalty, ranks):
    check(seed, make_layout(ranks), CPU, penalty)
    check(seed, make_layout(ranks), CPU, penalty, given_grams=True)


@pytest.mark.parametrize("penalty", ["product", "factors"])
@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 3), *[st.integers(1, 40)] * 3), min_size=1, max_size=4),
    extra=st.lists(st.integers(1, 9), max_size=2),
    head=st.lists(st.integers(1, 9), max_size=2),
)
def test_any_model(penalty, shapes, extra, head):
    first, groups, place = 0, [], 0
    for num, rank, num_in, num_out in shapes:
        groups.append(MatrixGroup(tuple(range(first, first + num)), rank, num_in, num_out, 1.5, place))
        first, place = first + num, groups[-1].end
    check(len(shapes), FlatLayout(groups, extra, head), CPU, penalty, torch.float64, bound=1e-11)


@pytest.mark.parametrize("penalty", ["product", "factors"])
@pytest.mark.parametrize("rank", [1, 8])
def test_reference_equals_autograd(seed, penalty, rank):
    layout = make_layout((rank, 16))
    data, _, coefficient_K = make(seed, layout, torch.float64)
    mine = reference.weighted_frobenius(data, layout, coefficient_K, penalty)
    for got, want in zip(mine, explicit(data, layout, coefficient_K, penalty)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_product_of_a_fresh_adapter_is_zero(seed):
    """B = 0: no value and no gradient for A or B."""
    layout = make_layout((8, 8))
    data, grad, coefficient_K = make(seed, layout)
    for group in layout.groups:
        group.stack_b(data).zero_()
    before = grad.clone()
    result = weighted_frobenius(data, grad, layout, coefficient_K)
    assert result.penalty == result.penalty_norm == result.share == 0
    assert torch.equal(grad, before)


def orthogonal_factors(seed, device):
    """B A = 0 with large A and B, so that the Gram value is only rounding: half of the time it is below 0."""
    layout = make_layout((16,), device, (((*range(12),), 33, 21, 2.0),), (), ())
    random = Random(seed, torch.float32, device)
    basis = torch.linalg.qr(random(16, 16).cpu())[0].to(device)
    data = random(layout.num_total)
    (group,) = layout.groups
    group.stack_a(data).copy_(basis[:, :8] @ random(12, 8, 33))
    group.stack_b(data).copy_(random(12, 21, 8) @ basis[:, 8:].t())
    return data, layout


def test_a_penalty_is_never_negative(seed):
    data, layout = orthogonal_factors(seed, CPU)
    value_K = weighted_frobenius(data, torch.zeros_like(data), layout, torch.ones(12)).values
    assert (value_K >= 0).all()
    assert (value_K < 1).all()


def test_each_matrix_has_its_own_coefficient(seed):
    layout = make_layout((4, 4))
    data, grad, _ = make(seed, layout)
    grad.zero_()
    value_K = weighted_frobenius(data, grad, layout, torch.tensor([0.0, 1.0, 0.0])).values
    first, second = layout.groups
    assert value_K[0] == value_K[2] == 0
    assert value_K[1] > 0
    assert not grad[: first.end].any()
    assert second.stack_a(grad).any()
    assert second.stack_b(grad).any()


# ---- what both do --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("triton", [False, True])
def test_what_is_not_finite_shows_in_the_norm(seed, bad, triton, request):
    device = request.getfixturevalue("triton_device") if triton else CPU
    layout = make_layout((4, 4), device)
    data, grad, coefficient_K = make(seed, layout, device=device)
    for place in (0, layout.num_factors, layout.num_total - 1):
        spoilt = grad.clone()
        spoilt[place] = bad
        assert not weighted_frobenius(data, spoilt, layout, coefficient_K).norm.isfinite()
        assert not weighted_frobenius(data, spoilt, layout).norm.isfinite()
    data[0] = torch.nan
    assert weighted_frobenius(data, grad, layout, coefficient_K).penalty.isnan()


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("penalty", ["product", "factors"])
def test_coefficients_of_zero_give_the_bits_of_no_penalty(seed, triton, penalty, request):
    device = request.getfixturevalue("triton_device") if triton else CPU
    layout = make_layout((8, 4), device)
    data, grad, _ = make(seed, layout, device=device)
    other = grad.clone()
    plain = weighted_frobenius(data, grad, layout)
    zeros = torch.zeros(layout.num_matrices, device=device)
    weighted = weighted_frobenius(data, other, layout, zeros, penalty=penalty)
    assert torch.equal(grad, other)
    for name in ("norm", "penalty", "penalty_norm", "share"):
        assert torch.equal(getattr(plain, name), getattr(weighted, name)), name
    assert plain.penalty == 0


BAD = {
    "data": ({"data": torch.zeros(3)}, r"data has shape \(3,\)"),
    "grad": ({"grad": torch.zeros(2, 2)}, r"grad has shape \(2, 2\)"),
    "dtype": ({"data": "bf16"}, r"data is torch.bfloat16; expected all buffers float32"),
    "mixed": ({"grad": "double"}, r"grad is torch.float64"),
    "penalty": ({"penalty": "nuclear"}, r"penalty is 'nuclear'; expected one of product, factors"),
    "coefficient": ({"coefficient_K": torch.zeros(2)}, r"coefficient_K has shape \(2,\); expected \(3,\)"),
    "coefficient_dtype": ({"coefficient_K": torch.zeros(3).double()}, r"coefficient_K is torch.float64 on cpu"),
    "grams": ({"grams": torch.zeros(3, 2, 8, 8)}, r"grams has shape \(3, 2, 8, 8\); expected \(3, 2, 16, 16\)"),
    "into": ({"into": torch.zeros(5)}, r"into has shape \(5,\)"),
}


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_named(change, said):
    layout = make_layout((8, 8))
    given = {"data": torch.zeros(layout.num_total), "grad": torch.zeros(layout.num_total)}
    given["coefficient_K"] = torch.zeros(3)
    casts = {"bf16": torch.bfloat16, "double": torch.float64}
    given |= {k: given[k].to(casts[v]) if isinstance(v, str) and v in casts else v for k, v in change.items()}
    with pytest.raises(ValueError, match="weighted_frobenius: " + said):
        weighted_frobenius(layout=layout, **given)


@pytest.mark.parametrize("starts", [(0, 5), (3, 400)])
def test_a_layout_with_gaps_is_refused(starts):
    groups = [MatrixGroup((i,), 2, 3, 4, 1.0, start) for i, start in enumerate(starts)]
    with pytest.raises(ValueError, match="FlatLayout: groups of matrices"):
        FlatLayout(groups)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, -4)])
def test_a_layout_of_sizes_below_one_is_refused(sizes):
    with pytest.raises(ValueError, match="expected positive numbers"):
        FlatLayout([MatrixGroup((0,), *sizes, 1.0, 0)])


def test_parameters_that_require_a_gradient_make_no_graph(seed):
    layout = make_layout((4, 8))
    data = torch.randn(layout.num_total, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    grad = torch.zeros(layout.num_total)
    result = weighted_frobenius(data, grad, layout, torch.ones(3))
    assert not grad.requires_grad
    assert not result.penalty.requires_grad
    assert grad.norm() > 0


# ---- Triton --------------------------------------------------------------------------------

# (ranks of the two shapes, penalty, Gram matrices given, into a buffer of its own)
PAIRWISE = [
    ((1, 8), "product", False, False),
    ((4, 16), "product", True, False),
    ((16, 4), "product", False, True),
    ((64, 1), "product", False, False),
    ((8, 20), "factors", False, False),
    ((1, 4), "factors", False, True),
]


@pytest.mark.parametrize(("ranks", "penalty", "given_grams", "into"), PAIRWISE)
def test_triton(seed, triton_device, poisoned, ranks, penalty, given_grams, into):
    before = LAUNCHES["weighted_frobenius_kernel"]
    check(seed, make_layout(ranks, triton_device), triton_device, penalty, given_grams=given_grams, into=into)
    assert LAUNCHES["weighted_frobenius_kernel"] == before + 1


def test_triton_with_aligned_sizes(seed, triton_device, poisoned):
    layout = make_layout((8,), triton_device, (((0, 1), 96, 40, 2.0),), (16,), (8, 3))
    assert layout.aligned
    assert layout.aligned_rows
    check(seed, layout, triton_device, "product")


def test_triton_over_several_slices_of_a_head(seed, triton_device, poisoned):
    """Norms without any matrix, as in full fine-tuning."""
    layout = make_layout((), triton_device, (), (70_000,), (5,))
    data, grad, _ = make(seed, layout, device=triton_device)
    result = weighted_frobenius(data, grad, layout)
    assert relative_error(result.norm, grad.double().norm()) < 1e-6
    assert result.penalty == result.share == 0


def test_triton_clamps(seed, triton_device):
    data, layout = orthogonal_factors(seed, triton_device)
    ones = torch.ones(12, device=triton_device)
    value_K = weighted_frobenius(data, torch.zeros_like(data), layout, ones).values
    assert (value_K >= 0).all()
    assert (value_K < 1).all()


def test_triton_gives_the_same_bits_twice(seed, triton_device):
    layout = make_layout((8, 16), triton_device)
    data, grad, coefficient_K = make(seed, layout, device=triton_device)
    twin = grad.clone()
    first, second = (weighted_frobenius(data, g, layout, coefficient_K, measure=True) for g in (grad, twin))
    assert torch.equal(grad, twin)
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(second, name)), name
    assert not layout.tickets.any()


@pytest.mark.soak
@pytest.mark.parametrize(("ranks", "penalty"), product([(r, r) for r in (*RANKS, 100, 256)], ["product", "factors"]))
@pytest.mark.parametrize("shape", [(96, 16), (312, 96), (768, 312), (1000, 768)])
def test_triton_at_every_rank(seed, triton_device, poisoned, ranks, penalty, shape):
    shapes = (SHAPES[0], ((1,), *shape, 2.0))
    check(seed, make_layout(ranks, triton_device, shapes, EXTRA, HEAD), triton_device, penalty)
