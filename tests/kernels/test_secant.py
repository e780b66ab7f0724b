"""Sums along the last two changes of the parameters against float64, and what is kept for the next step."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch

from fastpeft.kernels import FlatLayout, SecantSums, secant_sums
from fastpeft.kernels.flat_layout import STEP_SLICE
from fastpeft.kernels.launch import LAUNCHES
from fastpeft.kernels.ops.secant.op import BLOCK_ROWS
from fastpeft.kernels.ops.secant.reference import secant_sums as reference
from tests.support.flat_model import Random, make_layout

LAYOUTS = {
    "shapes": ((4, 8),),
    "adapter_only": ((4, 8), {"extra": (), "head": ()}),
    "no_matrix": ((), {"shapes": (), "extra": (5000,), "head": ()}),
    "head_only": ((), {"shapes": (), "extra": (), "head": (9, 2)}),
    "aligned": ((8,), {"shapes": (((1, 0), 64, 96, 2.0),), "extra": (64,), "head": (32, 3)}),
    "slices": ((16,), {"shapes": (((0,), 301, 512, 2.0),), "extra": (9001,), "head": (4097, 2)}),
}
"""The last: units of many slices, whose sums are added up by whoever comes last."""
ALIGNED = ("adapter_only", "no_matrix", "aligned")
NUM_STEPS = 4
BAD_STEP = 2


def layout_of(name: str, device: torch.device | str = "cpu") -> FlatLayout:
    ranks, *more = LAYOUTS[name]
    return make_layout(ranks, device, **(more[0] if more else {}))


@dataclass
class Run:
    """Buffers on their way through steps."""

    layout: FlatLayout
    random: Random

    def __post_init__(self) -> None:
        self.data = self.random(self.layout.num_total)
        self.previous, self.older = self.data.clone(), torch.zeros_like(self.data)
        self.divisor = self.random().double().abs() + 0.01

    def step(self, grad: torch.Tensor, second: torch.Tensor) -> SecantSums:
        return secant_sums(self.data, grad, self.previous, self.older, second, self.divisor, self.layout)

    def follow(self, bound: float) -> None:
        """Several steps beside the reference, one of them with a gradient that is not finite."""
        thetas = [self.data.clone()] * 2
        for number in range(NUM_STEPS):
            grad, second = self.random(self.layout.num_total), self.random(self.layout.num_total).square()
            if number == BAD_STEP:
                grad[number] = math.nan
            older = thetas[-1] - thetas[-2]
            given = [t.double().cpu() for t in (self.data, grad, thetas[-1], older, second, self.divisor)]
            sums, want, sizes = self.step(grad, second), reference(*given, self.layout), self.sizes(*given)
            columns = (0, 1, 2) if number != BAD_STEP else (2,)
            for column in columns:  # the terms may cancel
                assert sums[column].shape == (self.layout.num_units,)
                assert ((sums[column].double().cpu() - want[column]).abs() <= bound * sizes[column]).all()
            thetas.append(self.data.clone())
            assert torch.equal(self.previous, thetas[-1])
            assert torch.equal(self.older, thetas[-1] - thetas[-2])
            self.data += self.random(self.layout.num_total, scale=0.01)

    def sizes(self, data, grad, previous, older, second, divisor) -> list[torch.Tensor]:
        """The sums of their terms without signs."""
        unsigned = (data - previous).abs(), grad.abs(), torch.zeros_like(data), older.abs()
        return reference(*unsigned, second, divisor, self.layout)


# ---- PyTorch -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_equals_float64(seed, name, dtype, bound):
    Run(layout_of(name), Random(seed, dtype)).follow(bound)


def test_before_the_first_step_there_is_no_weighted_sum(seed):
    """The second moment and its divisor are 0."""
    run = Run(layout_of("shapes"), Random(seed, torch.float32))
    run.divisor.zero_()
    along_U, before_U, square_U = run.step(torch.ones_like(run.data), torch.zeros_like(run.data))
    assert not along_U.any()
    assert not before_U.any()
    assert square_U.isnan().all()


BAD = {
    "shape": ({"older": torch.zeros(3)}, r"older has shape \(3,\)"),
    "dtype": ({"previous": torch.zeros(616).half()}, r"previous "),
    "divisor": ({"divisor": torch.ones(2)}, r"divisor is torch.float32 of shape \(2,\)"),
    "divisor_dtype": ({"divisor": torch.ones((), dtype=torch.int64)}, r"divisor is torch.int64"),
}


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_named(change, said):
    layout = layout_of("shapes")
    names = "data", "grad", "previous", "older", "second"
    given = {name: torch.zeros(layout.num_total) for name in names} | {"divisor": torch.ones(())}
    with pytest.raises(ValueError, match="secant_sums: " + said):
        secant_sums(layout=layout, **(given | change))


# ---- Triton --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_triton(seed, triton_device, poisoned, name):
    layout = layout_of(name, triton_device)
    assert layout.aligned == (name in ALIGNED)
    before = LAUNCHES["secant_kernel"]
    Run(layout, Random(seed, torch.float32, triton_device)).follow(1e-6)
    assert LAUNCHES["secant_kernel"] == before + NUM_STEPS
    assert not layout.tickets.any()


@pytest.mark.soak
def test_triton_gives_the_same_bits_twice(seed, triton_device):
    """And right ones, where a unit has more slices than one turn adds up."""
    layout = make_layout((), triton_device, (), (BLOCK_ROWS * STEP_SLICE + 5,), (3,))
    run = Run(layout, Random(seed, torch.float32, triton_device))
    run.data += run.previous  # a change as large as the parameters
    run.older = run.random(layout.num_total)
    grad = run.random(layout.num_total)
    given = [t.double().cpu() for t in (run.data, grad, run.previous, run.older, grad.square(), run.divisor)]
    want, sizes = reference(*given, layout), run.sizes(*given)
    found = [[*each.step(grad, grad.square()), each.older, each.previous] for each in (run, copy.deepcopy(run))]
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert all(
        ((got.double().cpu() - exact).abs() <= 1e-6 * size).all() for got, exact, size in zip(found[0], want, sizes)
    )
