"""linear_cross_entropy and logits_cross_entropy against torch's own loss over the whole logits, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.kernels import linear_cross_entropy, logits_cross_entropy
from fastpeft.kernels.dispatch import Choice, Config, forced
from fastpeft.kernels.launch import LAUNCHES
from fastpeft.kernels.ops.linear_cross_entropy import tiles
from fastpeft.kernels.ops.linear_cross_entropy.op import _Head
from fastpeft.kernels.ops.linear_cross_entropy.reference import cross_entropy_reference, entropy_reference
from tests.support.closeness import Largest, relative_error

LIMITS = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
IGNORED = -100
NARROW = Choice("fused", Config(1, 64, 1, 4, 1))  # several blocks a row at the sizes of a test


def draw(seed, num_tokens, width, vocab, dtype=torch.float64, ignored=0.3, device="cpu"):
    """hidden, weight, bias, labels, token weights, lens rows; logits are of order 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(dtype).to(device)

    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < ignored] = IGNORED
    weights = torch.rand(num_tokens, generator=generator) + 0.1
    tensors = normal(num_tokens, width), normal(vocab, width, std=2 * width**-0.5), normal(vocab), normal(3, width)
    hidden, weight, bias, lens = tensors
    return hidden, weight, bias, labels.to(device), weights.to(device), lens


def wide(tensor):
    return None if tensor is None else tensor.detach().double().clone()


def reference(hidden, weight, bias, labels, factor=1.0, token_weights=None, **options):
    """(loss, Fisher, entropy, gradient of factor * loss) in float64."""
    leaf = wide(hidden).requires_grad_(True)
    logits = leaf @ wide(weight).t() + (0 if bias is None else wide(bias))
    loss, fisher, entropy = cross_entropy_reference(logits, labels, token_weights=wide(token_weights), **options)
    (gradient,) = torch.autograd.grad(loss * factor, leaf)
    return loss, fisher, entropy, gradient


def assert_like_reference(hidden, weight, bias, labels, lens=None, *, rows=None, chunk_rows=None, **options):
    leaf = hidden.detach().clone().requires_grad_(True)
    got = linear_cross_entropy(
        leaf, weight, labels, bias, rows=rows, statistics=True, lens_hidden=lens, chunk_rows=chunk_rows, **options
    )
    (gradient,) = torch.autograd.grad(got.loss * 3, leaf)
    loss, fisher, entropy, want = reference(hidden, weight, bias, labels, 3.0, **options)
    limit = LIMITS[hidden.dtype]
    assert gradient.dtype == hidden.dtype
    assert got.loss.dtype == got.fisher.dtype == torch.promote_types(hidden.dtype, torch.float32)
    pairs = [("loss", got.loss, loss), ("fisher", got.fisher, fisher), ("entropy", got.entropy, entropy)]
    for name, mine, theirs in [*pairs, ("gradient", gradient, want)]:
        assert mine.shape == theirs.shape, name
        assert relative_error(mine, theirs) <= limit, f"{name}: {relative_error(mine, theirs)}"
    if lens is not None:
        logits = wide(lens) @ wide(weight).t() + (0 if bias is None else wide(bias))
        assert relative_error(got.lens_entropy, entropy_reference(logits)) <= limit
    return got


def blocks_of(columns: int, patch: pytest.MonkeyPatch) -> None:
    """Blocks of so many classes on a CPU."""
    patch.setattr(tiles, "_SMALLEST", columns)
    patch.setattr(tiles, "LOGITS_BYTES", 0)


# ---- against the reference -----------------------------------------------------------------

options_strategy = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "reduction": st.sampled_from(["mean", "sum"]),
        "num_items": st.sampled_from([None, 7, 2.5]),
    }
)


@settings(max_examples=120, deadline=None)
@given(
    num_tokens=st.integers(1, 20),
    width=st.integers(1, 9),
    vocab=st.sampled_from([1, 2, 3, 17, 130]),
    ignored=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    chunk_rows=st.sampled_from([None, 1, 3, 50]),
    weighted=st.booleans(),
    with_bias=st.booleans(),
    with_lens=st.booleans(),
    with_rows=st.booleans(),
    columns=st.sampled_from([1, 5, 64]),
    options=options_strategy,
    draw_seed=st.integers(0, 2**31),
)
def test_any_shape_and_options(
    num_tokens,
    width,
    vocab,
    ignored,
    chunk_rows,
    weighted,
    with_bias,
    with_lens,
    with_rows,
    columns,
    options,
    draw_seed,
):
    hidden, weight, bias, labels, weights, lens = draw(draw_seed, num_tokens, width, vocab, ignored=ignored)
    rows = torch.randperm(num_tokens)  # may hold ignored rows too, in any order
    with pytest.MonkeyPatch.context() as patch:
        blocks_of(columns, patch)
        assert_like_reference(
            hidden, weight, bias if with_bias else None, labels, lens if with_lens else None,
            rows=rows if with_rows else None, chunk_rows=chunk_rows, token_weights=weights if weighted else None,
            **options,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("num_tokens", "vocab"), [(1, 1000), (63, 312), (200, 96)])
@pytest.mark.parametrize("columns", [40, 1000])
def test_dtypes(seed, poisoned, monkeypatch, dtype, num_tokens, vocab, columns):
    blocks_of(columns, monkeypatch)
    hidden, weight, bias, labels, weights, lens = draw(seed, num_tokens, 96, vocab, dtype, ignored=0)
    assert_like_reference(hidden, weight, bias, labels, lens, token_weights=weights, label_smoothing=0.1, chunk_rows=40)
    logits = torch.nn.functional.linear(hidden, weight, bias).requires_grad_(True)
    got = logits_cross_entropy(logits, labels, token_weights=weights, label_smoothing=0.1, statistics=True)
    (gradient,) = torch.autograd.grad(got.loss, logits)
    leaf = wide(logits).requires_grad_(True)
    loss, fisher, entropy = cross_entropy_reference(leaf, labels, token_weights=wide(weights), label_smoothing=0.1)
    (want,) = torch.autograd.grad(loss, leaf)
    for mine, theirs in ((got.loss, loss), (got.fisher, fisher), (got.entropy, entropy), (gradient, want)):
        assert relative_error(mine, theirs) <= LIMITS[dtype]
    assert gradient.dtype == dtype
    assert got.lens_entropy is None


def test_it_is_torchs_loss(seed):
    hidden, weight, bias, labels, _, _ = draw(seed, 30, 8, 11)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    for smoothing in (0.0, 0.3):
        for reduction in ("mean", "sum"):
            options = {"label_smoothing": smoothing, "reduction": reduction}
            want = torch.nn.functional.cross_entropy(logits, labels, **options)
            torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, bias, **options).loss, want)
            torch.testing.assert_close(logits_cross_entropy(logits, labels, **options).loss, want)


def test_gradcheck(seed):
    hidden, weight, bias, labels, weights, _ = draw(seed, 7, 4, 6)
    labels[0], labels[1] = 2, IGNORED
    hidden.requires_grad_(True)
    for options in ({}, {"label_smoothing": 0.2, "token_weights": weights}, {"reduction": "sum", "chunk_rows": 2}):
        assert torch.autograd.gradcheck(
            lambda h, o=options: linear_cross_entropy(h, weight, labels, bias, **o).loss, hidden
        )
    logits = (hidden.detach() @ weight.t()).requires_grad_(True)
    for options in ({}, {"label_smoothing": 0.2, "token_weights": weights}, {"num_items": 3}):
        assert torch.autograd.gradcheck(lambda z, o=options: logits_cross_entropy(z, labels, **o).loss, logits)


def test_leading_axes(seed):
    hidden, weight, bias, labels, weights, _ = draw(seed, 12, 5, 9)
    flat = linear_cross_entropy(hidden, weight, labels, bias, token_weights=weights, statistics=True)
    leaf = hidden.view(3, 4, 5).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(True)
    got = linear_cross_entropy(leaf, weight, labels.view(3, 4), bias, token_weights=weights.view(3, 4), statistics=True)
    torch.testing.assert_close(got.loss.detach(), flat.loss)
    torch.testing.assert_close(got.fisher, flat.fisher.view(3, 4))
    got.loss.backward()
    *_, want = reference(hidden, weight, bias, labels, token_weights=weights)
    torch.testing.assert_close(leaf.grad, want.view(3, 4, 5))


def test_micro_batches_add_up_to_the_mean_of_their_batch(seed):
    hidden, weight, bias, labels, _, _ = draw(seed, 20, 5, 9)
    num_items = int((labels != IGNORED).sum())
    want = linear_cross_entropy(hidden, weight, labels, bias).loss
    for divisor in (num_items, torch.tensor(num_items)):
        parts = [
            linear_cross_entropy(hidden[part], weight, labels[part], bias, num_items=divisor).loss
            for part in (slice(0, 3), slice(3, 15), slice(15, 20))
        ]
        torch.testing.assert_close(sum(parts), want)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_labelled_row(num_tokens, reduction):
    hidden, weight, labels = torch.ones(num_tokens, 4), torch.ones(6, 4), torch.full((num_tokens,), IGNORED)
    hidden = (hidden * float("nan")).requires_grad_(True)  # what has no label plays no part
    got = linear_cross_entropy(hidden, weight, labels, reduction=reduction, statistics=True)
    got.loss.backward()
    assert got.loss == 0
    assert not hidden.grad.any()
    assert got.fisher.tolist() == got.entropy.tolist() == [0.0] * num_tokens
    logits = torch.full((num_tokens, 6), float("nan"), requires_grad=True)
    loss = logits_cross_entropy(logits, labels, reduction=reduction).loss
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("columns", [1, 2, 100])
def test_of_a_sure_token_every_digit_is_there(monkeypatch, columns):
    """1 - p of 2e-7: from p in fp32 nothing of it is left. The label's class is the first, between others, the last."""
    blocks_of(columns, monkeypatch)
    hidden = torch.eye(3).mul(16).requires_grad_(True)
    got = linear_cross_entropy(hidden, torch.eye(3), torch.arange(3), statistics=True, reduction="sum")
    got.loss.backward()
    _, fisher, _, want = reference(hidden, torch.eye(3), None, torch.arange(3), reduction="sum")
    assert relative_error(got.fisher, fisher) < 1e-5
    assert relative_error(hidden.grad, want) < 1e-5


@pytest.mark.parametrize("columns", [1, 3, 100])
def test_huge_logits_through_a_head(monkeypatch, columns):
    """Whichever block holds the largest: nothing overflows."""
    blocks_of(columns, monkeypatch)
    logits = torch.tensor([[1e4, -1e4, 0.0, 1.0], [-1e4, -1e4, -1e4, -1e4], [5.0, 6.0, 1e4, 1e4 - 1]])
    labels = torch.tensor([1, 0, 3])
    hidden = torch.eye(3, requires_grad=True)
    got = linear_cross_entropy(hidden, logits.t().contiguous(), labels, reduction="sum", statistics=True)
    got.loss.backward()
    loss, fisher, entropy, want = reference(hidden, logits.t(), None, labels, reduction="sum")
    pairs = ((got.loss, loss), (got.fisher, fisher), (got.entropy, entropy), (hidden.grad, want))
    assert max(relative_error(mine, theirs) for mine, theirs in pairs) <= 1e-5


def test_one_labelled_row_and_another_ignore_index(seed):
    hidden, weight, bias, labels, _, lens = draw(seed, 9, 4, 6, ignored=0)
    labels = torch.where(torch.arange(9) == 4, 3, 0)
    assert_like_reference(hidden, weight, bias, labels, lens, ignore_index=0, chunk_rows=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_logits(dtype):
    """+-1e4 and -inf: nothing overflows, and what is impossible has no entropy."""
    logits = torch.tensor(
        [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4 - 1], [5.0, float("-inf"), 4.0]], dtype=dtype
    ).requires_grad_(True)
    labels = torch.tensor([1, 0, 2, 0])
    got = logits_cross_entropy(logits, labels, reduction="sum", statistics=True)
    (gradient,) = torch.autograd.grad(got.loss, logits)
    leaf = wide(logits).requires_grad_(True)
    loss, fisher, entropy = cross_entropy_reference(leaf, labels, reduction="sum")
    (want,) = torch.autograd.grad(loss, leaf)
    for mine, theirs in ((got.loss, loss), (got.fisher, fisher), (got.entropy, entropy), (gradient, want)):
        assert relative_error(mine, theirs) <= 1e-5


# ---- what it does not do -------------------------------------------------------------------


def test_the_logits_are_never_whole(seed):
    hidden, weight, bias, labels, weights, lens = draw(seed, 64, 8, 500, torch.float32, ignored=0.5)
    hidden.requires_grad_(True)
    with Largest() as largest:
        got = linear_cross_entropy(
            hidden, weight, labels, bias, token_weights=weights, statistics=True, lens_hidden=lens, chunk_rows=5,
            label_smoothing=0.1,
        )  # fmt: skip
        got.loss.backward()
    assert largest.elements == 5 * 500


def test_a_gpus_chunks_fit_into_their_memory(monkeypatch):
    from fastpeft.kernels.ops.linear_cross_entropy import op

    head = _Head(torch.empty(151_936, 8, device="meta", dtype=torch.bfloat16), None, None, False, None)
    assert 4096 <= head._rows_that_fit(10_000) <= 2 * 2**30 // 2 // 151_936
    assert head._rows_that_fit(3) >= 3
    monkeypatch.setattr(op, "CHUNK_BYTES", 1)
    assert head._rows_that_fit(10_000) == 1
    monkeypatch.setattr(op, "CHUNK_BYTES", 2 * 1000 * 151_936)
    assert head._rows_that_fit(1001) == 512  # two chunks of nearly one size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 30, 400, 512])
@pytest.mark.parametrize(("vocab", "width"), [(262_144, 640), (151_936, 4096), (100, 32), (65, 10**7)])
def test_a_tile_and_its_block_of_the_head_fit_into_a_cache(dtype, num_rows, vocab, width):
    head = tiles.Head(torch.empty(vocab, width, device="meta", dtype=dtype), None)
    columns = head.columns(num_rows)
    assert 1 <= columns <= vocab
    if columns > tiles._SMALLEST:
        assert num_rows * columns * max(4, dtype.itemsize) <= tiles.LOGITS_BYTES
        assert columns * width * dtype.itemsize <= tiles.HEAD_BYTES


def test_on_a_cpu_the_head_is_read_once_a_chunk(seed):
    """Each block of it is multiplied twice, and no logits but a tile's are made."""
    hidden, weight, _, labels, _, _ = draw(seed, 40, 16, 2000, torch.float32, ignored=0)
    hidden.requires_grad_(True)
    with Largest() as largest, pytest.MonkeyPatch.context() as patch:
        blocks_of(100, patch)
        loss = linear_cross_entropy(hidden, weight, labels).loss
        loss.backward()
    assert largest.elements == 40 * 100
    *_, want = reference(hidden, weight, None, labels)
    assert relative_error(hidden.grad, want) <= 1e-5


def test_rows_without_a_label_cost_nothing(seed):
    hidden, weight, _, labels, _, _ = draw(seed, 50, 8, 300, torch.float32)
    labels[:] = IGNORED
    labels[7] = 3
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, labels)
    assert largest.elements <= 300


def test_without_a_gradient_none_is_made(seed):
    hidden, weight, _, labels, _, _ = draw(seed, 5, 4, 6)
    assert not linear_cross_entropy(hidden, weight, labels).loss.requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(hidden.requires_grad_(True), weight, labels).loss.requires_grad
    got = linear_cross_entropy(hidden, weight, labels, lens_hidden=hidden)
    assert got.loss.requires_grad
    assert not got.lens_entropy.requires_grad
    assert got.fisher is None
    assert got.entropy is None


def test_inputs_are_left_alone_and_backward_runs_twice(seed):
    hidden, weight, bias, labels, weights, lens = draw(seed, 9, 4, 6, torch.float32)
    inputs = hidden, weight, bias, labels, weights, lens
    before = [t.clone() for t in inputs]
    hidden.requires_grad_(True)
    loss = linear_cross_entropy(hidden, weight, labels, bias, token_weights=weights, lens_hidden=lens).loss
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * once)
    logits = torch.nn.functional.linear(hidden.detach(), weight, bias).requires_grad_(True)
    copy = logits.detach().clone()
    logits_cross_entropy(logits, labels).loss.backward()
    assert torch.equal(logits.detach(), copy)
    assert all(torch.equal(now.detach(), then) for now, then in zip(inputs, before))


def test_half_precision_gradients_outlast_a_small_factor(seed):
    """1 / num_items alone is nothing in fp16; times the loss scale it is not."""
    hidden, weight, _, labels, _, _ = draw(seed, 20, 16, 50, torch.float16, ignored=0)
    leaf = hidden.clone().requires_grad_(True)
    (linear_cross_entropy(leaf, weight, labels, num_items=10**8).loss * 10**8).backward()
    *_, want = reference(hidden, weight, None, labels, reduction="sum")
    assert relative_error(leaf.grad, want) <= 2e-2


def test_the_same_bits_twice(seed):
    hidden, weight, bias, labels, weights, lens = draw(seed, 80, 32, 700, torch.float32)
    results = []
    for _ in range(2):
        leaf = hidden.clone().requires_grad_(True)
        got = linear_cross_entropy(
            leaf, weight, labels, bias, token_weights=weights, statistics=True, lens_hidden=lens, chunk_rows=30
        )
        got.loss.backward()
        results.append([leaf.grad, *got])
    assert all(torch.equal(one, two) for one, two in zip(*results))


# ---- Triton --------------------------------------------------------------------------------

TRITON_CASES = [  # tokens, width, vocab, chunk, options
    (1, 16, 1, None, {}),
    (5, 16, 2, 2, {"reduction": "sum"}),
    (7, 16, 37, None, {"label_smoothing": 0.1}),
    (9, 8, 64, 4, {"num_items": 3}),
    (6, 24, 300, 4, {"label_smoothing": 0.3}),
    (4, 40, 1003, None, {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "width", "vocab", "chunk_rows", "options"), TRITON_CASES)
def test_triton(seed, triton_device, poisoned, dtype, num_tokens, width, vocab, chunk_rows, options):
    hidden, weight, bias, labels, weights, lens = draw(seed, num_tokens, width, vocab, dtype, device=triton_device)
    labels[0] = vocab - 1
    if vocab < 3 and dtype != torch.float32:
        lens = None  # two classes: rounded logits leave an entropy no digits
        bias = None
    options = {**options, "token_weights": weights} if num_tokens % 2 else options
    before = LAUNCHES["cross_entropy_row"]
    with forced(NARROW, "cross_entropy"):
        assert_like_reference(hidden, weight, bias, labels, lens, chunk_rows=chunk_rows, **options)
        assert LAUNCHES["cross_entropy_row"] > before
        logits = torch.nn.functional.linear(hidden, weight, bias)
        leaf = logits.clone().requires_grad_(True)
        got = logits_cross_entropy(leaf, labels, statistics=True, **options)
        (gradient,) = torch.autograd.grad(got.loss, leaf)
        again = logits_cross_entropy(logits, labels, statistics=True, **options)
    exact = wide(logits).requires_grad_(True)
    loss, fisher, entropy = cross_entropy_reference(
        exact, labels, **{k: wide(v) if k == "token_weights" else v for k, v in options.items()}
    )
    (want,) = torch.autograd.grad(loss, exact)
    pairs = ((got.loss, loss), (got.fisher, fisher), (got.entropy, entropy), (gradient, want))
    assert [relative_error(mine, theirs) <= LIMITS[dtype] for mine, theirs in pairs] == [True] * 4
    assert all(torch.equal(one, two) for one, two in zip(got[:3], again[:3]))
    assert torch.equal(leaf.detach(), logits)


def test_triton_ignores_and_selects_rows(seed, triton_device, poisoned):
    """Without `rows` it computes all and masks; with them these alone. NaN without a label plays no part."""
    hidden, weight, bias, labels, _, lens = draw(seed, 12, 16, 100, torch.float32, 0, triton_device)
    labels[::3] = IGNORED
    rows = (labels != IGNORED).nonzero()[:, 0]
    hidden[::3] = float("nan")
    clean = torch.where(hidden.isnan(), 0, hidden)
    want_loss, want_fisher, want_entropy, want = reference(clean, weight, bias, labels)
    for given_rows in (None, rows) if triton_device.type == "cuda" else (torch.arange(12), rows):
        leaf = hidden.clone().requires_grad_(True)
        got = linear_cross_entropy(
            leaf, weight, labels, bias, rows=given_rows, statistics=True, lens_hidden=lens, chunk_rows=5
        )
        got.loss.backward()
        pairs = ((got.loss, want_loss), (got.fisher, want_fisher), (got.entropy, want_entropy), (leaf.grad, want))
        assert max(relative_error(mine, theirs) for mine, theirs in pairs) <= 1e-5


def test_triton_of_huge_logits(triton_device, poisoned):
    inf = float("inf")
    logits = torch.full((4, 200), -1e4, device=triton_device)
    logits[0, 3], logits[1, 150], logits[2, :130], logits[3] = 1e4, 1e4, -inf, torch.linspace(-1e4, 1e4, 200)
    labels = torch.tensor([3, 7, 140, 199], device=triton_device)
    leaf = logits.clone().requires_grad_(True)
    with forced(NARROW, "cross_entropy"):
        got = logits_cross_entropy(leaf, labels, statistics=True, reduction="sum")
        got.loss.backward()
    exact = wide(logits).requires_grad_(True)
    loss, fisher, entropy = cross_entropy_reference(exact, labels, reduction="sum")
    loss.backward()
    pairs = ((got.loss, loss), (got.fisher, fisher), (got.entropy, entropy), (leaf.grad, exact.grad))
    assert max(relative_error(mine, theirs) for mine, theirs in pairs) <= 1e-5


def test_triton_of_strided_weights_and_of_one_row_of_any_stride(seed, triton_device):
    torch.manual_seed(seed)
    logits, labels = torch.randn(6, 20, device=triton_device), torch.arange(6, device=triton_device)
    weights = torch.rand(12, device=triton_device)[::2]
    got = logits_cross_entropy(logits, labels, token_weights=weights).loss
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(got, (each * weights).sum() / weights.sum())
    one = torch.randn(20, 1, device=triton_device).t()
    assert one.is_contiguous()
    assert one.stride(0) == 1
    got = logits_cross_entropy(one, labels[:1]).loss
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(one, labels[:1]))


def test_triton_of_a_sure_token(triton_device):
    """1 - p of 2e-7, squared: from p in fp32 nothing of it is left."""
    logits = torch.tensor([[0.0, 16.0, 0.0]], device=triton_device)
    label = torch.tensor([1], device=triton_device)
    got = logits_cross_entropy(logits, label, statistics=True)
    _, fisher, _ = cross_entropy_reference(logits.double(), label)
    assert relative_error(got.fisher, fisher) < 1e-5


def test_triton_of_a_label_that_is_no_class(triton_device):
    """A GPU cannot raise without being waited for; nothing may pass for a loss."""
    from fastpeft.kernels.ops.linear_cross_entropy.per_row import Options, PerRow, compute_rows

    logits = torch.zeros(2, 5, device=triton_device)
    out = PerRow.empty(2, logits, True)
    options = Options("x", IGNORED, 0.0, "sum", None, True)
    compute_rows(logits, None, torch.tensor([5, 1], device=triton_device), None, 2, options, out)
    assert out.loss_C.isnan().tolist() == [True, False]


@pytest.mark.soak
@pytest.mark.parametrize("vocab", [1, 2, 1000, 50257, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soak(seed, poisoned, vocab, dtype):
    hidden, weight, bias, labels, weights, lens = draw(seed, 40, 64, vocab, dtype)
    labels[0] = 0
    if vocab > 2 or dtype == torch.float32:
        assert_like_reference(hidden, weight, bias, labels, lens, token_weights=weights, label_smoothing=0.1)


@pytest.mark.soak
@pytest.mark.parametrize("vocab", [1, 2, 1000, 8193, 50257, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_soak(seed, triton_device, poisoned, vocab, dtype):
    hidden, weight, bias, labels, weights, lens = draw(seed, 9, 64, vocab, dtype, device=triton_device)
    labels[0] = 0
    if vocab <= 2 and dtype != torch.float32:
        bias = lens = None
    assert_like_reference(hidden, weight, bias, labels, lens, token_weights=weights, label_smoothing=0.1, chunk_rows=4)


# ---- input that does not fit ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(5, 3)}, r"hidden \(5, 3\) and weight \(6, 4\) do not fit"),
        ({"weight": torch.zeros(6, 4).half()}, r"weight is torch\.float16 on cpu but hidden is torch\.float32"),
        ({"bias": torch.zeros(4)}, r"bias is \(4,\); expected \(6,\)"),
        ({"labels": torch.zeros(4).long()}, r"labels is \(4,\) on cpu but hidden is \(5, 4\).*expected \(5,\)"),
        ({"labels": torch.zeros(5)}, r"labels are torch\.float32; expected torch\.int64"),
        ({"labels": torch.tensor([0, 1, 6, 0, 0])}, r"labels has 6; expected 0 to 5, or ignore_index -100"),
        ({"labels": torch.tensor([0, -1, 5, 0, 0])}, r"labels has -1"),
        ({"rows": torch.zeros(2)}, r"rows is torch\.float32 \(2,\) on cpu; expected int64 \(L,\)"),
        ({"rows": torch.tensor([1, 5])}, r"rows has 5; expected 0 to 4"),
        ({"token_weights": torch.ones(5).long()}, r"token_weights are torch\.int64"),
        ({"token_weights": torch.ones(5, requires_grad=True)}, r"without a gradient"),
        ({"lens_hidden": torch.zeros(2, 3)}, r"lens_hidden is \(2, 3\); expected \(M, 4\)"),
        ({"weight": torch.zeros(6, 4, requires_grad=True)}, r"weight requires a gradient.*logits_cross_entropy"),
        ({"bias": torch.zeros(6, requires_grad=True)}, r"bias requires a gradient"),
        ({"reduction": "none"}, r"reduction is 'none'; expected 'mean' or 'sum'"),
        ({"label_smoothing": 1.5}, r"label_smoothing is 1\.5"),
        ({"num_items": 0}, r"num_items is 0; expected a positive number"),
        ({"num_items": torch.tensor([4.0])}, r"num_items has shape \(1,\); expected \(\)"),
        ({"num_items": "4"}, r"num_items is '4'"),
        ({"chunk_rows": 0}, r"chunk_rows is 0"),
    ],
)
def test_input_that_does_not_fit(changed, message):
    good = {"hidden": torch.zeros(5, 4), "weight": torch.zeros(6, 4), "labels": torch.zeros(5).long()}
    assert linear_cross_entropy(**good).loss.isfinite()
    with pytest.raises(ValueError, match=r"linear_cross_entropy: .*" + message):
        linear_cross_entropy(**{**good, **changed})


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(5, 3).long(), torch.zeros(5).long(), r"logits is torch\.int64 \(5, 3\)"),
        (torch.zeros(5, 0), torch.zeros(5).long(), r"the last axis not empty"),
        (torch.zeros(5, 3), torch.zeros(5, 1).long(), r"labels is \(5, 1\)"),
        (torch.zeros(5, 3), torch.full((5,), 3), r"labels has 3; expected 0 to 2"),
    ],
)
def test_logits_that_do_not_fit(logits, labels, message):
    with pytest.raises(ValueError, match=r"logits_cross_entropy: .*" + message):
        logits_cross_entropy(logits, labels)


def test_a_second_derivative_is_refused_and_not_left_out():
    hidden = torch.zeros(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.zeros(6, 4), torch.zeros(5).long()).loss
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again \(create_graph=True\)"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_head_that_requires_a_gradient_may_be_evaluated():
    weight = torch.zeros(6, 4, requires_grad=True)
    with torch.no_grad():
        assert linear_cross_entropy(torch.zeros(5, 4), weight, torch.zeros(5).long()).loss > 0
