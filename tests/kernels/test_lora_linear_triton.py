"""lora_linear's Triton kernels against its reference in float64, in all forms, from poisoned memory."""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpeft.kernels import LoraMeasures, dropout_mask, lora_linear, lora_linear_grouped
from fastpeft.kernels.dispatch import Choice, Config, forced
from fastpeft.kernels.launch import LAUNCHES
from fastpeft.kernels.ops.lora_linear import configs
from fastpeft.kernels.ops.lora_linear.reference import lora_linear_reference, philox_keep
from tests.support.lora_linear_inputs import GRADIENTS, make_inputs, relative, run

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned")

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
DTYPES = list(LIMITS)
TOKENS, SIZES, RANKS = (1, 63, 1000), (16, 96, 312, 768, 1000), (1, 4, 8, 16, 64)


def forms(forward="fused", backward="fused", factors="fused_factors", config=None, factors_config=None):
    """A context in which these forms are used."""
    stack = ExitStack()
    stack.enter_context(forced(Choice(forward, config), "lora_forward"))
    stack.enter_context(forced(Choice(backward, config), "lora_backward"))
    stack.enter_context(forced(Choice(factors, factors_config), "lora_factors"))
    return stack


def check(device, seed, lead, num_in, num_out, rank, dtype, dropout=0.0, bias=True, strided=False, **chosen):
    """Forward, gradients and measures; x and weights in `dtype`, factors and their gradients in fp32."""
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(generator, lead, num_in, num_out, rank, bias)
    low = [None if t is None else t.to(device, dtype) for t in inputs]
    low[3], low[4] = low[3].float(), low[4].float()
    if strided:
        low = [None if t is None else torch.stack([t, t + 1], dim=-1)[..., 0] for t in low]
    exact = [None if t is None else t.double().cpu() for t in low]
    one = torch.tensor([seed * 2**31 + 7], device=device)
    mask = (torch.rand(exact[0].numel() // num_in, generator=generator) < 0.5).to(device)
    measures = LoraMeasures()
    options = {"dropout": dropout, "seed": one, "row_mask": mask, "measures": measures}
    with forms(**chosen):
        got = run(lora_linear, *low, 2.0, **options)
    keep = dropout_mask((*lead, num_in), dropout, one).cpu() if dropout else None
    want = run(lora_linear_reference, *exact, 2.0, dropout=dropout, keep=keep)
    for name, mine, theirs in zip(("y", *GRADIENTS), got, want):
        assert mine.dtype == (torch.float32 if name in ("da", "db") else dtype), name
        assert relative(mine, theirs) <= LIMITS[dtype], f"{name}: {relative(mine, theirs)}"
    a, b, dy = exact[3:]
    answers = dy * mask.cpu().view(*lead, 1)
    masked = run(lora_linear_reference, *exact[:5], answers, 2.0, dropout=dropout, keep=keep)[3]
    for mine, theirs in (
        (measures.gram_a, a @ a.t()),
        (measures.gram_b, b.t() @ b),
        (measures.db_square, want[3].square().sum()),
        (measures.db_square_masked, masked.square().sum()),
    ):
        assert mine.dtype == torch.float32
        assert relative(mine, theirs) <= LIMITS[dtype]


def pairwise(*axes):
    """Rows in which every two values of two axes meet."""
    wanted = {
        (i, u, j, v)
        for (i, first), (j, second) in itertools.combinations(enumerate(axes), 2)
        for u in first
        for v in second
    }

    def covers(row):
        return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(axes)), 2)} & wanted

    rows = []
    while wanted:
        best = max(itertools.product(*axes), key=lambda row: len(covers(row)))
        wanted -= covers(best)
        rows.append(best)
    return rows


SMALL = pairwise((1, 63, 130), (16, 96, 65), (16, 96, 70), RANKS, DTYPES)
"""Every two of: tokens, in, out, rank, dtype."""


@pytest.mark.parametrize(("num_tokens", "num_in", "num_out", "rank", "dtype"), SMALL)
def test_forward_gradients_and_measures(triton_device, seed, num_tokens, num_in, num_out, rank, dtype):
    check(triton_device, seed, (num_tokens,), num_in, num_out, rank, dtype)


MIXED = pairwise(
    configs.FORMS["lora_forward"],
    configs.FORMS["lora_backward"],
    configs.FORMS["lora_factors"],
    (0.0, 0.3),
    ((7, 9), (33,)),
    (True, False),
)


@pytest.mark.parametrize(("forward", "backward", "factors", "dropout", "lead", "strided"), MIXED)
def test_forms_compose(seed, request, monkeypatch, forward, backward, factors, dropout, lead, strided):
    if {forward, backward, factors} == {"split"} and not dropout:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = request.getfixturevalue("triton_device")
    chosen = {"forward": forward, "backward": backward, "factors": factors}
    check(device, seed, lead, 40, 56, 5, torch.float32, dropout, bias=not strided, strided=strided, **chosen)


@pytest.mark.parametrize("rank", [17, 256])
@pytest.mark.parametrize("form", ["fused", "fused_two"])
def test_ranks_beyond_one_tile(triton_device, seed, form, rank):
    check(triton_device, seed, (20,), 48, 40, rank, torch.bfloat16, forward=form, backward=form)


def test_several_tiles_and_splits(triton_device, seed):
    """More than one group of row blocks, and tiles that do not fill the last row and column."""
    check(triton_device, seed, (300,), 40, 50, 3, torch.float32, config=Config(16, 16, 16, 4, 1))


def test_strided_bias_and_row_mask(triton_device, seed):
    generator = torch.Generator().manual_seed(seed)
    exact = make_inputs(generator, (20,), 24, 40, 3)
    low = [t.to(triton_device, torch.float32) for t in exact]
    low[2] = low[2].repeat_interleave(2)[::2]
    mask = torch.rand(40, generator=generator).lt(0.5).to(triton_device)[::2]
    measures = LoraMeasures()
    with forms():
        got = run(lora_linear, *low, 2.0, row_mask=mask, measures=measures)
    masked = (exact[5] * mask.cpu()[:, None]).t() @ (2.0 * exact[0] @ exact[3].t())
    assert relative(got[0], run(lora_linear_reference, *exact, 2.0)[0]) <= 1e-5
    assert relative(measures.db_square_masked, masked.square().sum()) <= 1e-5


def test_no_rows(triton_device):
    x = torch.zeros(0, 24, dtype=torch.bfloat16, device=triton_device)
    weight = torch.zeros(40, 24, dtype=torch.bfloat16, device=triton_device)
    a, b = torch.ones(3, 24, device=triton_device), torch.ones(40, 3, device=triton_device)
    measures = LoraMeasures()
    dy = torch.zeros(0, 40, dtype=torch.bfloat16, device=triton_device)
    with forms():
        y, dx, da, db = run(lora_linear, x, weight, None, a, b, dy, 2.0, measures=measures)
    assert (y.shape, dx.shape) == ((0, 40), (0, 24))
    assert torch.equal(da, torch.zeros_like(a))
    assert torch.equal(db, torch.zeros_like(b))
    assert torch.equal(measures.gram_a, torch.full_like(measures.gram_a, 24))
    assert float(measures.db_square) == 0.0


def test_a_transposed_weight(triton_device, seed):
    x, weight, bias, a, b, dy = (
        t.float().to(triton_device) for t in make_inputs(torch.Generator().manual_seed(seed), (30,), 24, 40, 4)
    )
    transposed = weight.t().contiguous().t()
    for form in ("fused", "fused_two"):
        with forms(form, form):
            plain = run(lora_linear, x, weight, bias, a, b, dy, 2.0)
            turned = run(lora_linear, x, transposed, bias, a, b, dy, 2.0)
        for mine, theirs in zip(turned, plain):
            assert relative(mine, theirs.double()) <= 1e-6


@pytest.mark.parametrize("form", ["fused", "fused_two"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_bits_twice(triton_device, seed, form, dropout):
    inputs = [t.float().to(triton_device) for t in make_inputs(torch.Generator().manual_seed(seed), (130,), 40, 72, 8)]
    options = {"dropout": dropout, "seed": torch.tensor([seed], device=triton_device)}
    first, second = LoraMeasures(), LoraMeasures()
    with forms(form, form):
        once = run(lora_linear, *inputs, 2.0, measures=first, **options)
        again = run(lora_linear, *inputs, 2.0, measures=second, **options)
    assert all(torch.equal(one, two) for one, two in zip(once, again))
    assert torch.equal(first.db_square, second.db_square)
    assert torch.equal(first.gram_a, second.gram_a)


def test_no_dropout_is_the_same_bits_as_none(triton_device, seed):
    inputs = [t.float().to(triton_device) for t in make_inputs(torch.Generator().manual_seed(seed), (40,), 24, 40, 4)]
    options = {"dropout": 0.0, "seed": torch.tensor([seed], device=triton_device)}
    with forms():
        pairs = zip(run(lora_linear, *inputs, 2.0), run(lora_linear, *inputs, 2.0, **options))
        assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("shape", [(1, 8), (33, 130), (5, 7, 16)])
def test_the_mask_is_the_specified_one(triton_device, seed, shape):
    one = torch.tensor([seed * 2**31 + 99], device=triton_device)
    keep = dropout_mask(shape, 0.3, one)
    want = philox_keep(keep.numel() // shape[-1], shape[-1], 0.3, one)
    assert torch.equal(keep, want.view(shape))


@pytest.mark.parametrize("form", ["split", "fused", "fused_two"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_group_is_its_members(triton_device, seed, form, dropout):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((40, 4), (24, 2), (33, 8))
    each = [make_inputs(generator, (37,), 48, out, rank) for out, rank in sizes]
    each = [[t.float().to(triton_device) for t in one] for one in each]
    x = each[0][0].requires_grad_(True)
    weights, biases, lora_as, lora_bs, dys = ([one[i] for one in each] for i in range(1, 6))
    factors = [f.requires_grad_(True) for pair in zip(lora_as, lora_bs) for f in pair]
    seeds = [torch.tensor([seed + i], device=triton_device) for i in range(3)]
    scales = (2.0, 2.0, 0.5)
    with forms(form, form):
        ys = lora_linear_grouped(x, weights, biases, lora_as, lora_bs, scales, dropout=dropout, seeds=seeds)
        got = (*ys, *torch.autograd.grad(ys, [x, *factors], dys))
        singles = [
            lora_linear(x, *rest, dropout=dropout, seed=one)
            for *rest, one in zip(weights, biases, lora_as, lora_bs, scales, seeds)
        ]
        want = (*singles, *torch.autograd.grad(singles, [x, *factors], dys))
    for mine, theirs in zip(got, want):
        assert relative(mine.detach(), theirs.detach().double()) <= 1e-6


def test_which_kernels_are_launched(triton_device, seed):
    """No launch for a gradient that nobody asked for, one for y, one for dx, two for the factors."""
    x, weight, bias, a, b, dy = (
        t.float().to(triton_device) for t in make_inputs(torch.Generator().manual_seed(seed), (30,), 24, 40, 4)
    )

    def launched(form, *needing, **options):
        leaves = {name: t.detach().requires_grad_(name in needing) for name, t in (("x", x), ("a", a), ("b", b))}
        before = LAUNCHES.copy()
        with forms(form, form):
            lora_linear(leaves["x"], weight, bias, leaves["a"], leaves["b"], 2.0, **options).backward(dy)
        assert all((leaf.grad is not None) == (name in needing) for name, leaf in leaves.items())
        return {name.removesuffix("_kernel"): LAUNCHES[name] - before[name] for name in LAUNCHES}

    counts = launched("fused", "x", "a", "b", measures=LoraMeasures())
    assert {k: v for k, v in counts.items() if v} == {"lora_matmul": 2, "factors": 1, "reduce_factors": 1}
    counts = launched("fused_two", "x", "a", "b")
    assert (counts["lora_matmul"], counts["skinny"]) == (2, 2)
    counts = launched("fused", "b")
    assert (counts["lora_matmul"], counts.get("skinny", 0), counts["factors"]) == (1, 0, 1)
    counts = launched("fused", "x")
    assert (counts["lora_matmul"], counts["factors"]) == (2, 0)


@given(
    num_tokens=st.integers(1, 70),
    num_in=st.integers(1, 70),
    num_out=st.integers(1, 70),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    dropout=st.sampled_from([0.0, 0.5]),
    form=st.sampled_from(["fused", "fused_two"]),
    draw=st.integers(0, 2**31),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(triton_device, num_tokens, num_in, num_out, rank, dtype, dropout, form, draw):
    chosen = {"forward": form, "backward": form}
    if dtype != torch.float32:  # the terms of a single element may cancel, which no relative bound allows for
        num_in, num_out = max(16, num_in), max(16, num_out)
    check(triton_device, draw, (num_tokens,), num_in, num_out, rank, dtype, dropout, **chosen)


# ---- everything ------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_all_shapes(triton_device, seed, num_tokens, rank):
    """Tiles of the size that the interpreter is quickest with; forms, dtypes and dropout take turns."""
    turns = itertools.cycle(itertools.product(DTYPES, ("fused", "fused_two"), (0.0, 0.2)))
    config = None if triton_device.type == "cuda" else Config(128, 256, 256, 4, 1)
    for (num_in, num_out), (dtype, form, dropout) in zip(itertools.product(SIZES, SIZES), turns):
        chosen = {"forward": form, "backward": form, "config": config}
        check(triton_device, seed, (num_tokens,), num_in, num_out, rank, dtype, dropout, **chosen)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["fused", "fused_two", "fused_factors"])
def test_all_configs(triton_device, seed, form, dtype):
    for config in configs.CONFIGS[form]:
        if form == "fused_factors":
            chosen = {"factors_config": config}
        else:
            chosen = {"forward": form, "backward": form, "config": config}
        for dropout in (0.0, 0.2):
            check(triton_device, seed, (150,), 96, 140, 8, dtype, dropout, **chosen)
