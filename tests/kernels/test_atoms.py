"""route_atoms and gather_atoms: against autograd of the specification in float64, and the Triton kernels against it."""

from __future__ import annotations

import pytest
import torch

from fastpeft.kernels import RouterCount, gather_atoms, route_atoms
from fastpeft.kernels.ops.atoms.reference import gather_atoms_reference, route_atoms_reference


def inputs(seed: int, num_tokens: int = 37, num_atoms: int = 24, width: int = 6, dtype: torch.dtype = torch.float64):
    """z, v, slope, bias, u; about half of the best logits are positive."""
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(True)

    z, v, u = tensor(num_tokens, width), tensor(num_atoms, width), tensor(num_atoms, width)
    slope = (1 + 0.3 * tensor(num_atoms)).detach().requires_grad_(True)
    bias = (tensor(num_atoms) - 4).detach().requires_grad_(True)
    return z, v, slope, bias, u


def gradients(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).cos()
    return [torch.zeros_like(x) if g is None else g for x, g in zip(
        leaves, torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)
    )]  # fmt: skip


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("gated", [True, False])
def test_values_and_gradients_are_the_specifications(top_k: int, gated: bool, seed: int) -> None:
    leaves = list(inputs(seed))
    z, v, slope, bias, u = leaves
    c, index = route_atoms(z, v, slope, bias, top_k, gated=gated)
    want_c, want_index, _ = route_atoms_reference(z, v, slope, bias, top_k, gated)
    assert torch.equal(index, want_index)
    torch.testing.assert_close(c, want_c)
    y, want = gather_atoms(c, index, u), gather_atoms_reference(want_c, want_index, u)
    torch.testing.assert_close(y, want)
    for got, expected in zip(gradients(y, leaves), gradients(want, leaves)):
        torch.testing.assert_close(got, expected)
    if gated:
        assert 0 < int((c != 0).sum()) < c.numel()
        assert int((c != 0).sum(1).max()) <= top_k


def test_the_count_of_active_atoms_and_its_gradient(seed: int) -> None:
    """Of tokens alone, not of padding; twice the pass counts twice."""
    z, v, slope, bias, u = inputs(seed)
    weight = (torch.arange(len(z)) % 3 > 0).double()
    count = RouterCount()
    for _ in range(2):
        c, index = route_atoms(z, v, slope, bias, 2, count=count, weight=weight)
        assert count.num_active is None or float(count.num_active) > 0
        gather_atoms(c, index, u).sum().backward()
    _, _, gate = route_atoms_reference(z.detach(), v, slope, bias, 2)
    want = (gate * weight[:, None]).sum()
    assert float(count.num_active) == pytest.approx(2 * float(want.detach()))
    assert float(count.num_tokens) == 2 * float(weight.sum())
    for got, expected in zip(
        (count.grad_v, count.grad_slope, count.grad_bias), torch.autograd.grad(want, [v, slope, bias])
    ):
        torch.testing.assert_close(got, 2 * expected)


def test_a_forward_pass_alone_counts_nothing(seed: int) -> None:
    count = RouterCount()
    route_atoms(*inputs(seed)[:4], 2, count=count)
    assert count.num_active is None


@pytest.mark.parametrize(
    ("num_tokens", "num_atoms", "width", "top_k"), [(70, 128, 16, 2), (33, 100, 12, 1), (1, 17, 24, 3), (64, 64, 32, 8)]
)
def test_the_kernels_are_the_specification(
    num_tokens: int, num_atoms: int, width: int, top_k: int, triton_device: torch.device, seed: int
) -> None:
    leaves = [x.detach().to(triton_device) for x in inputs(seed, num_tokens, num_atoms, width, torch.float32)]
    doubles = [x.double().cpu().requires_grad_(True) for x in leaves]
    leaves = [x.requires_grad_(True) for x in leaves]
    c, index = route_atoms(*leaves[:4], top_k)
    want_c, want_index, _ = route_atoms_reference(*doubles[:4], top_k)
    assert torch.equal(index.cpu(), want_index)
    torch.testing.assert_close(c.cpu().double(), want_c, rtol=1e-4, atol=1e-5)
    y, want = gather_atoms(c, index, leaves[4]), gather_atoms_reference(want_c, want_index, doubles[4])
    torch.testing.assert_close(y.cpu().double(), want, rtol=1e-4, atol=1e-4)
    for got, expected in zip(gradients(y, leaves), gradients(want, doubles)):
        assert float((got.cpu().double() - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-12


def test_numbers_that_are_none_lead_nowhere_outside(triton_device: torch.device) -> None:
    z = torch.full((5, 16), float("nan"), device=triton_device)
    v, one = torch.ones(20, 16, device=triton_device), torch.ones(20, device=triton_device)
    _, index = route_atoms(z, v, one, one, 2)
    assert int(index.min()) >= 0
    assert int(index.max()) < 20


def test_shapes_that_do_not_fit_are_refused(seed: int) -> None:
    z, v, slope, bias, u = inputs(seed)
    with pytest.raises(ValueError, match=r"route_atoms: z \(37, 6\), v \(24, 6\), slope \(23,\)"):
        route_atoms(z, v, slope[1:], bias, 2)
    with pytest.raises(ValueError, match="top_k 25 of 24 atoms; expected 1 to 24"):
        route_atoms(z, v, slope, bias, 25)
    c, index = route_atoms(z, v, slope, bias, 2)
    with pytest.raises(ValueError, match=r"gather_atoms: c \(37, 2\), index \(36, 2\)"):
        gather_atoms(c, index[1:], u)
