"""lora_linear against its reference, differentiated by autograd in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.kernels import lora_linear
from fastpeft.kernels.ops.lora_linear.reference import lora_linear_reference
from tests.support.lora_linear_inputs import GRADIENTS, make_inputs, relative, run


def assert_like_reference(inputs, scale, dtype, limit):
    """The operation in `dtype` against the reference in float64 on the same, rounded, values."""
    low = [None if tensor is None else tensor.to(dtype) for tensor in inputs]
    exact = [None if tensor is None else tensor.double() for tensor in low]
    got = run(lora_linear, *low, scale)
    want = run(lora_linear_reference, *exact, scale)
    for name, mine, theirs in zip(("y", *GRADIENTS), got, want):
        assert mine.dtype == dtype, name
        assert mine.shape == theirs.shape, name
        assert relative(mine, theirs) <= limit, f"{name}: {relative(mine, theirs)}"


@given(
    lead=st.one_of(
        st.tuples(st.sampled_from([1, 2, 7, 63])), st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 33]))
    ),
    num_in=st.sampled_from([1, 3, 16, 65, 130]),
    num_out=st.sampled_from([1, 2, 17, 64, 129]),
    rank=st.integers(1, 64),
    bias=st.booleans(),
    scale=st.sampled_from([0.25, 1.0, 2.0]),
    draw=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_forward_and_gradients_in_float64(lead, num_in, num_out, rank, bias, scale, draw):
    inputs = make_inputs(torch.Generator().manual_seed(draw), lead, num_in, num_out, rank, bias)
    got, want = run(lora_linear, *inputs, scale), run(lora_linear_reference, *inputs, scale)
    for name, mine, theirs in zip(("y", *GRADIENTS), got, want):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rank", [1, 8, 64, 256])
def test_relative_error_per_dtype(seed, dtype, limit, rank):
    generator = torch.Generator().manual_seed(seed)
    for num_tokens in (1, 63, 1000):
        inputs = make_inputs(generator, (num_tokens,), 96, 80, rank)
        assert_like_reference(inputs, 2.0, dtype, limit)


def test_gradcheck(seed):
    x, weight, bias, a, b, _ = make_inputs(torch.Generator().manual_seed(seed), (2, 3), 5, 4, 2)
    leaves = [tensor.requires_grad_(True) for tensor in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.7), leaves)


def test_non_contiguous_x_weight_and_dy(seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, a, b, dy = make_inputs(generator, (6, 4), 10, 12, 3)
    want = run(lora_linear_reference, x, weight, bias, a, b, dy, 1.5)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, weight, a, b, dy)]
    assert not any(t.is_contiguous() for t in strided)
    x, weight, a, b, dy = strided
    for mine, theirs in zip(run(lora_linear, x, weight, bias, a, b, dy, 1.5), want):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_expanded_dy(seed):
    """sum().backward() hands down a dy with zero strides."""
    x, weight, bias, a, b, dy = make_inputs(torch.Generator().manual_seed(seed), (2, 5), 6, 7, 2)
    dy = torch.ones((), dtype=torch.float64).expand(dy.shape)
    got, want = (run(f, x, weight, bias, a, b, dy, 2.0) for f in (lora_linear, lora_linear_reference))
    for mine, theirs in zip(got, want):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_x_without_gradient(seed):
    x, weight, bias, a, b, dy = make_inputs(torch.Generator().manual_seed(seed), (9,), 6, 7, 2)
    _, _, want_a, want_b = run(lora_linear_reference, x, weight, bias, a, b, dy, 2.0)
    a.requires_grad_(True)
    b.requires_grad_(True)
    lora_linear(x, weight, bias, a, b, 2.0).backward(dy)
    assert x.grad is None
    torch.testing.assert_close(a.grad, want_a, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(b.grad, want_b, rtol=1e-11, atol=1e-11)


def test_only_one_factor_trained(seed):
    x, weight, bias, a, b, dy = make_inputs(torch.Generator().manual_seed(seed), (9,), 6, 7, 2)
    want_b = run(lora_linear_reference, x, weight, bias, a, b, dy, 2.0)[3]
    b.requires_grad_(True)
    lora_linear(x, weight, bias, a, b, 2.0).backward(dy)
    assert a.grad is None
    torch.testing.assert_close(b.grad, want_b, rtol=1e-11, atol=1e-11)


def test_no_gradient_mode_makes_no_graph(seed):
    x, weight, bias, a, b, _ = make_inputs(torch.Generator().manual_seed(seed), (9,), 6, 7, 2)
    a.requires_grad_(True)
    with torch.no_grad():
        assert not lora_linear(x, weight, bias, a, b, 2.0).requires_grad


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_half_precision_x_with_fp32_factors(seed, compute):
    """The usual case: frozen weights in half precision, adapters and their gradients in fp32."""
    x, weight, bias, a, b, dy = make_inputs(torch.Generator().manual_seed(seed), (3, 40), 64, 48, 8)
    low = [tensor.to(compute) for tensor in (x, weight, bias)]
    dy = dy.to(compute)
    got = run(lora_linear, *low, a.float(), b.float(), dy, 2.0)
    assert [tensor.dtype for tensor in got] == [compute, compute, torch.float32, torch.float32]
    want = run(lora_linear_reference, *(t.double() for t in low), a, b, dy.double(), 2.0)
    for name, mine, theirs in zip(("y", *GRADIENTS), got, want):
        assert relative(mine, theirs) <= 2e-2, name


def test_gradients_accumulate_into_existing_ones(seed):
    """Both uses of a layer in one graph add up, and so do two backward passes."""
    x, weight, bias, a, b, dy = make_inputs(torch.Generator().manual_seed(seed), (5,), 8, 8, 3)

    def twice(function, x, weight, bias, a, b, scale):
        return function(function(x, weight, bias, a, b, scale).tanh(), weight, bias, a, b, scale)

    want = run(lambda *args: twice(lora_linear_reference, *args), x, weight, bias, a, b, dy, 0.5)
    got = run(lambda *args: twice(lora_linear, *args), x, weight, bias, a, b, dy, 0.5)
    for name, mine, theirs in zip(("y", *GRADIENTS), got, want):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11, msg=name)
    leaf_a, leaf_b = a.clone().requires_grad_(True), b.clone().requires_grad_(True)
    for _ in range(2):
        twice(lora_linear, x, weight, bias, leaf_a, leaf_b, 0.5).backward(dy)
    torch.testing.assert_close(leaf_a.grad, 2 * want[2], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(leaf_b.grad, 2 * want[3], rtol=1e-11, atol=1e-11)


def test_inputs_are_left_alone(seed):
    inputs = make_inputs(torch.Generator().manual_seed(seed), (5,), 8, 9, 3)
    before = [tensor.clone() for tensor in inputs]
    run(lora_linear, *inputs, 2.0)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before))


def test_deterministic(seed):
    inputs = [t.float() for t in make_inputs(torch.Generator().manual_seed(seed), (4, 65), 96, 80, 8)]
    first, second = run(lora_linear, *inputs, 2.0), run(lora_linear, *inputs, 2.0)
    assert all(torch.equal(one, two) for one, two in zip(first, second))


@pytest.mark.parametrize(
    ("changed", "shape"),
    [
        *[("x", (5, 7)), ("weight", (9, 7)), ("lora_a", (3, 7)), ("lora_b", (8, 3)), ("lora_b", (9, 4))],
        *[("x", ()), ("weight", (9,)), ("weight", (9, 8, 1)), ("lora_a", ()), ("lora_b", (27,))],
    ],
)
def test_shapes_that_do_not_fit(changed, shape):
    tensors = {"x": (5, 8), "weight": (9, 8), "lora_a": (3, 8), "lora_b": (9, 3)} | {changed: shape}
    tensors = {name: torch.zeros(size) for name, size in tensors.items()}
    with pytest.raises(ValueError, match="do not fit") as error:
        lora_linear(bias=None, scale=1.0, **tensors)
    for tensor in tensors.values():
        assert str(tuple(tensor.shape)) in str(error.value)


@pytest.mark.parametrize("lead", [(0,), (3, 0), (4,)])
def test_no_input_features(lead):
    y = lora_linear(torch.zeros(*lead, 0), torch.zeros(9, 0), torch.ones(9), torch.zeros(3, 0), torch.ones(9, 3), 1.0)
    torch.testing.assert_close(y, torch.ones(*lead, 9))


def test_on_the_meta_device():
    shapes = {"x": (5, 8), "weight": (9, 8), "lora_a": (3, 8), "lora_b": (9, 3)}
    y = lora_linear(bias=None, scale=1.0, **{k: torch.zeros(size, device="meta") for k, size in shapes.items()})
    assert (y.shape, y.device.type) == ((5, 9), "meta")


def test_a_second_derivative_is_refused_and_not_left_out():
    """Where dL/dY does not depend on the inputs too, torch itself would say nothing and give zero."""
    x, a = torch.ones(5, 8, requires_grad=True), torch.ones(3, 8, requires_grad=True)
    y = lora_linear(x, torch.ones(9, 8), None, a, torch.ones(9, 3), 1.0)
    with pytest.raises(RuntimeError, match=r"lora_linear: .* cannot be differentiated again \(create_graph=True\)"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_dtypes_that_do_not_fit():
    x, weight = torch.zeros(5, 8), torch.zeros(9, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.float32.*torch\.bfloat16"):
        lora_linear(x, weight, None, torch.zeros(3, 8), torch.zeros(9, 3), 1.0)


@pytest.mark.parametrize("rank", [0, 257])
def test_a_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"rank {rank}; expected 1 to 256"):
        lora_linear(torch.zeros(5, 8), torch.zeros(9, 8), None, torch.zeros(rank, 8), torch.zeros(9, rank), 1.0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dropout": 1.0}, r"dropout is 1\.0.*\[0, 1\)"),
        ({"dropout": -0.1}, r"dropout is -0\.1"),
        ({"dropout": 0.5, "seed": torch.zeros(1)}, r"seed is torch\.float32 \(1,\).*torch\.int64 \(1,\)"),
        ({"dropout": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, r"seed is torch\.int64 \(2,\)"),
        ({"row_mask": torch.zeros(4, dtype=torch.bool)}, r"row_mask is torch\.bool \(4,\).*\(5,\)"),
        ({"row_mask": torch.zeros(5)}, r"row_mask is torch\.float32 \(5,\).*torch\.bool \(5,\)"),
    ],
)
def test_options_that_do_not_fit(option, message):
    with pytest.raises(ValueError, match=message):
        lora_linear(torch.zeros(5, 8), torch.zeros(9, 8), None, torch.zeros(3, 8), torch.zeros(9, 3), 1.0, **option)


def test_tensors_that_do_not_fit():
    good = {"x": torch.zeros(5, 8), "weight": torch.zeros(9, 8), "bias": None, "lora_a": torch.zeros(3, 8)}
    good |= {"lora_b": torch.zeros(9, 3), "scale": 1.0}
    for bad, message in (
        ({"bias": torch.zeros(8)}, r"bias \(8,\).*do not fit"),
        ({"bias": torch.zeros(9).half()}, r"x is torch\.float32 but bias is torch\.float16"),
        ({"lora_a": torch.zeros(3, 8, dtype=torch.int64)}, r"lora_a is torch\.int64; expected a floating dtype"),
        ({"lora_b": torch.zeros(9, 3, device="meta")}, "x is on cpu but lora_b is on meta"),
        ({"x": torch.zeros(5, 8, dtype=torch.int32)}, r"x is torch\.int32; expected one of torch\.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_linear(**good | bad)


def test_no_rows(seed):
    inputs = make_inputs(torch.Generator().manual_seed(seed), (0,), 8, 9, 3)
    y, dx, da, db = run(lora_linear, *inputs, 2.0)
    assert y.shape == (0, 9)
    assert dx.shape == (0, 8)
    assert torch.equal(da, torch.zeros(3, 8).double())
    assert torch.equal(db, torch.zeros(9, 3).double())


def test_a_weight_that_wants_a_gradient_gets_none(seed):
    x, weight, bias, a, b, dy = make_inputs(torch.Generator().manual_seed(seed), (5,), 8, 9, 3)
    for tensor in (weight, bias, a, b):
        tensor.requires_grad_(True)
    lora_linear(x, weight, bias, a, b, 2.0).backward(dy)
    assert weight.grad is None
    assert bias.grad is None
    assert a.grad is not None


def test_autocast_decides_the_dtype(seed):
    """As torch's own linear under autocast; dy comes in the dtype of y, gradients leave in their owners'."""
    inputs = make_inputs(torch.Generator().manual_seed(seed), (40,), 64, 48, 8)
    x, weight, bias, a, b, dy = (tensor.float() for tensor in inputs)
    leaves = [tensor.requires_grad_(True) for tensor in (x, a, b)]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight, bias, a, b, 2.0)
    assert y.dtype == torch.bfloat16
    got = (y.detach(), *torch.autograd.grad(y, leaves, dy.bfloat16()))
    assert [tensor.dtype for tensor in got[1:]] == [torch.float32] * 3
    for mine, theirs in zip(got, run(lora_linear_reference, *inputs, 2.0)):
        assert relative(mine, theirs) <= 2e-2
