"""AdamW over flat buffers against torch.optim.AdamW in float64, a parameter group a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from fastpeft.kernels import AdamWOptions, FlatLayout, adamw_step
from fastpeft.kernels.launch import LAUNCHES
from fastpeft.kernels.ops.adamw.op import SUMS
from tests.support.closeness import relative_error
from tests.support.flat_model import SHAPES, Random, make_layout

CPU = torch.device("cpu")
OPTIONS = {
    "plain": AdamWOptions(),
    "clips": AdamWOptions(max_norm=0.7, weight_decay=0.1),
    "groups": AdamWOptions(weight_decay=0.3, head_weight_decay=0.05, head_ratio=5.0, beta1=0.8, beta2=0.95, eps=1e-6),
    "no_memory": AdamWOptions(beta1=0.0, beta2=0.9, max_norm=2.0),
}
NUM_STEPS = 6
SKIPPED = (1, 3)


@dataclass
class Run:
    """Buffers of one optimizer."""

    data: torch.Tensor
    layout: FlatLayout
    options: AdamWOptions

    def __post_init__(self) -> None:
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.data), torch.zeros_like(self.data)
        self.count = torch.zeros((), device=self.data.device)

    def step(self, grad: torch.Tensor, lr, **more):
        norm = torch.linalg.vector_norm(grad)
        buffers = self.data, grad, self.exp_avg, self.exp_avg_sq, self.count
        return adamw_step(*buffers, self.layout, lr=lr, norm=norm, options=self.options, **more)

    def snapshot(self) -> list[torch.Tensor]:
        return [t.clone() for t in (self.data, self.exp_avg, self.exp_avg_sq, self.count)]


class Oracle:
    """torch.optim.AdamW in fp64 on the CPU: one group a unit."""

    def __init__(self, data: torch.Tensor, layout: FlatLayout, options: AdamWOptions, multiplier_K) -> None:
        self.options, self.parts = options, layout.unit_parts()
        self.flat = data.double().cpu().clone()
        self.units = [[torch.nn.Parameter(self.flat[at : at + n].clone()) for at, n in unit] for unit in self.parts]
        self.ratios, groups = [], []
        for i, unit in enumerate(self.units):
            is_head = self.parts[i][0][0] >= layout.num_adapter
            own = float(multiplier_K[i]) if multiplier_K is not None and i < layout.num_blocks else 1.0
            self.ratios.append(options.head_ratio if is_head else own)
            decay = options.head_weight_decay if is_head else options.weight_decay
            groups.append({"params": unit, "weight_decay": decay})
        self.adamw = torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), eps=options.eps)
        self.directions = [torch.zeros(sum(p.numel() for p in unit), dtype=torch.float64) for unit in self.units]
        """u (1 - rate decay) of the last step, of each unit."""

    def values(self) -> torch.Tensor:
        out = self.flat.clone()
        for unit, places in zip(self.units, self.parts):
            for parameter, (at, n) in zip(unit, places):
                out[at : at + n] = parameter.detach()
        return out

    def gather(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat([flat[at : at + n] for at, n in places]) for places in self.parts]

    def step(self, grad: torch.Tensor, lr: float) -> torch.Tensor:
        """Returns the clipped gradient, and keeps the direction of the step in `directions`."""
        grad, norm = grad.double().cpu(), float(grad.double().norm())
        if self.options.max_norm:
            grad = grad / max(1.0, norm / self.options.max_norm)
        before = self.gather(self.values())
        for group, unit, places, ratio in zip(self.adamw.param_groups, self.units, self.parts, self.ratios):
            group["lr"] = lr * ratio
            for parameter, (at, n) in zip(unit, places):
                parameter.grad = grad[at : at + n]
        self.adamw.step()
        after = self.gather(self.values())
        decays = [group["weight_decay"] for group in self.adamw.param_groups]
        self.directions = [
            (b - a) / (lr * ratio) * (1 - lr * ratio * decay)
            for b, a, ratio, decay in zip(before, after, self.ratios, decays)
        ]
        return grad

    def moments(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Bias-corrected, of each unit."""
        found = []
        for unit in self.units:
            states = [self.adamw.state[p] for p in unit]
            t = float(states[0]["step"])
            first = torch.cat([s["exp_avg"] for s in states]) / (1 - self.options.beta1**t)
            second = torch.cat([s["exp_avg_sq"] for s in states]) / (1 - self.options.beta2**t)
            found.append((first, second))
        return found


def follow(seed, layout, options, device, dtype, bound, multiplies=False, reduces=()):
    """Several steps beside the oracle, two of them skipped."""
    random = Random(seed, dtype, device)
    multiplier_K = random(layout.num_blocks).abs() + 0.25 if multiplies else None
    run = Run(random(layout.num_total), layout, options)
    start = run.data.double().cpu().clone()
    oracle = Oracle(run.data, layout, options, multiplier_K)
    for i in range(NUM_STEPS):
        lr = 0.01 * (i + 1)
        grad = random(layout.num_total, scale=10.0 ** (i % 3 - 2))
        more = {"multiplier_K": multiplier_K, "reduces": reduces, "loss": torch.tensor(0.5, device=device)}
        if i in SKIPPED:
            before = run.snapshot()
            grad[i % layout.num_total] = math.nan if i == 1 else 0.0
            more["loss"] = torch.tensor(0.5 if i == 1 else math.inf, device=device)
            assert float(run.step(grad, lr, **more).skipped) == 1.0
            assert all(torch.equal(a, b) for a, b in zip(before, run.snapshot()))
            continue
        true, directions = grad.clone(), oracle.directions
        clipped = oracle.step(true, lr)
        result = run.step(grad, lr, **more)
        assert float(result.skipped) == 0.0
        assert relative_error(grad, clipped) < bound
        if reduces:
            check_sums(result.sums, oracle, directions, true.double().cpu(), bound)
    assert float(run.count) == NUM_STEPS - len(SKIPPED)
    assert relative_error(run.data.double().cpu() - start, oracle.values() - start) < bound


def check_sums(sums, oracle, directions, grad, bound):
    gathered, moments = oracle.gather(grad), oracle.moments()
    assert sums.shape == (len(gathered), 4)
    want = [
        [g.square().sum(), m.square().sum(), v.sum(), g @ u]
        for g, (m, v), u in zip(gathered, moments, directions, strict=True)
    ]
    want = torch.tensor(want, dtype=torch.float64)
    for column in range(3):
        assert relative_error(sums[:, column], want[:, column]) < bound
    scale = max(float(g.norm() * u.norm()) for g, u in zip(gathered, directions))
    assert (sums[:, 3].double().cpu() - want[:, 3]).abs().max() <= bound * scale  # g u may cancel


# ---- PyTorch -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_adamw(seed, options, multiplies, dtype):
    bound = 2e-5 if dtype == torch.float32 else 1e-9
    follow(seed, make_layout((4, 8)), options, CPU, dtype, bound, multiplies, reduces=SUMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("matrices", [True, False])
def test_blocks_that_are_no_matrices_have_rates_too(seed, matrices, dtype):
    layout = make_layout((4, 8), num_named=1) if matrices else make_layout((), shapes=(), num_named=1)
    assert layout.num_blocks == (4 if matrices else 1)
    bound = 2e-5 if dtype == torch.float32 else 1e-9
    follow(seed, layout, OPTIONS["groups"], CPU, dtype, bound, multiplies=True, reduces=SUMS)


def test_without_matrices_and_without_a_head(seed):
    for layout in (make_layout((), shapes=(), extra=(5000,), head=()), make_layout((), shapes=(), head=(9, 2))):
        follow(seed, layout, OPTIONS["groups"], CPU, torch.float32, 2e-5, reduces=SUMS)


BAD = {
    "shape": ({"exp_avg": torch.zeros(3)}, r"exp_avg has shape \(3,\)"),
    "dtype": ({"exp_avg_sq": torch.zeros(616).half()}, r"exp_avg_sq "),
    "norm": ({"norm": torch.zeros(2)}, r"norm is torch.float32 of shape \(2,\)"),
    "norm_dtype": ({"norm": torch.ones((), dtype=torch.float64)}, r"norm is torch.float64; expected torch.float32"),
    "step": ({"step": torch.zeros((), dtype=torch.int64)}, r"step is torch.int64 of shape \(\)"),
    "multiplier": ({"multiplier_K": torch.ones(4)}, r"multiplier_K is torch.float32 of shape \(4,\) on cpu; expected"),
    "multiplier_device": ({"multiplier_K": torch.ones(3, device="meta")}, r"multiplier_K .* on meta; expected"),
}


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_named(change, said):
    layout = make_layout((4, 8))
    given = {name: torch.zeros(layout.num_total) for name in ("data", "grad", "exp_avg", "exp_avg_sq")}
    given |= {"step": torch.zeros(()), "norm": torch.ones(()), "lr": 0.1, "options": AdamWOptions()}
    with pytest.raises(ValueError, match="adamw_step: " + said):
        adamw_step(layout=layout, **(given | change))


@pytest.mark.parametrize("name", SUMS)
def test_only_what_is_asked_for_is_summed(seed, name):
    """To the same bits, and the step too; the others are NaN, so that no reader can take them for numbers."""
    layout, random = make_layout((4, 8)), Random(seed, torch.float32, CPU)
    start, grads = random(layout.num_total), [random(layout.num_total) for _ in range(3)]
    one, all_ = Run(start.clone(), layout, OPTIONS["groups"]), Run(start.clone(), layout, OPTIONS["groups"])
    for grad in grads:
        found, want = (
            one.step(grad.clone(), 0.01, reduces=(name,)).sums,
            all_.step(grad.clone(), 0.01, reduces=SUMS).sums,
        )
        asked = torch.tensor([other == name for other in SUMS])
        assert torch.equal(found[:, asked], want[:, asked])
        assert found[:, ~asked].isnan().all()
        assert want.isfinite().all()
    assert torch.equal(one.data, all_.data)


# ---- Triton --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "multiplies", "reduces"),
    [("plain", False, ()), ("clips", True, SUMS), ("groups", True, SUMS), ("no_memory", False, SUMS)],
)
def test_triton(seed, triton_device, poisoned, name, multiplies, reduces):
    layout = make_layout((4, 8), triton_device)
    before = LAUNCHES["adamw_kernel"]
    follow(seed, layout, OPTIONS[name], triton_device, torch.float32, 2e-5, multiplies, reduces)
    assert LAUNCHES["adamw_kernel"] == before + NUM_STEPS
    assert not layout.tickets.any()


def test_triton_of_blocks_that_are_no_matrices(seed, triton_device, poisoned):
    layout = make_layout((4, 8), triton_device, num_named=1)
    follow(seed, layout, OPTIONS["groups"], triton_device, torch.float32, 2e-5, multiplies=True, reduces=SUMS)


def test_triton_of_whole_numbers_and_strided_multipliers(seed, triton_device):
    """A Triton argument that is a Python int is an integer there."""
    random = Random(seed, torch.float32, triton_device)
    layout = make_layout((4, 8), triton_device)
    data, grad, multiplier = random(layout.num_total), random(layout.num_total), random(layout.num_matrices).abs()
    strided = multiplier.repeat_interleave(2)[::2]
    runs = []
    for number, own in ((int, strided), (float, multiplier)):
        options = AdamWOptions(max_norm=number(2), weight_decay=number(0), head_ratio=number(3), beta1=number(0))
        runs.append(Run(data.clone(), layout, options))
        runs[-1].step(grad.clone(), 0.01, multiplier_K=own)
    assert torch.equal(runs[0].data, runs[1].data)
    assert not torch.equal(runs[0].data, data)


def test_triton_over_several_slices(seed, triton_device, poisoned):
    """Units of many slices, whose sums are added up by whoever comes last; a length that is no multiple of four."""
    layout = make_layout((16,), triton_device, (((0,), 301, 512, 2.0),), (9001,), (4097, 2))
    follow(seed, layout, OPTIONS["clips"], triton_device, torch.float32, 2e-5, True, True)


def test_triton_gives_the_same_bits_twice(seed, triton_device):
    random = Random(seed, torch.float32, triton_device)
    layout = make_layout((8, 16), triton_device)
    data, grad = random(layout.num_total), random(layout.num_total)
    first, second = (Run(data.clone(), layout, OPTIONS["clips"]) for _ in range(2))
    sums = [run.step(grad.clone(), 0.01, reduces=SUMS).sums for run in (first, second) for _ in range(2)]
    assert torch.equal(sums[1], sums[3])
    assert all(torch.equal(a, b) for a, b in zip(first.snapshot(), second.snapshot()))
    assert not torch.equal(first.data, data)


@pytest.mark.soak
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_triton_with_every_option(seed, triton_device, poisoned, options, multiplies, aligned):
    shapes = (((1, 0), 64, 96, 2.0),) if aligned else (((1, 0), 63, 97, 2.0),)
    layout = make_layout((8 if aligned else 5,), triton_device, shapes, (64,), (32, 3))
    assert layout.aligned == aligned
    follow(seed, layout, options, triton_device, torch.float32, 2e-5, multiplies, True)


@pytest.mark.parametrize("num_named", [0, 1])
@pytest.mark.parametrize("extra", [(), (7, 40)])
@pytest.mark.parametrize("head", [(), (33, 3)])
@pytest.mark.parametrize("adapted", [True, False])
def test_sums_over_units_on_either_device_are_those_of_their_parts(seed, adapted, head, extra, num_named):
    """The model's order is not that of the buffers."""
    if not adapted and not extra + head:
        pytest.skip("no parameter at all")
    num_named = min(num_named, len(extra))
    ranks, shapes = ((4, 8), SHAPES) if adapted else ((), ())
    layout = make_layout(ranks, shapes=shapes, extra=extra, head=head, num_named=num_named)
    flat = Random(seed, torch.float64)(layout.num_total)
    want = torch.stack([sum(flat[at : at + size].sum() for at, size in parts) for parts in layout.unit_parts()])
    for sums in (layout.unit_sums(flat), layout._sums_by_group(flat)):
        torch.testing.assert_close(sums, want)
    last_parts = [parts[-1] for parts in layout.unit_parts()[: layout.num_blocks]]  # of a matrix: B
    squares = [flat[at : at + size].square().sum() for at, size in last_parts]
    torch.testing.assert_close(layout.b_squares(flat), torch.stack(squares) if squares else flat[:0])
