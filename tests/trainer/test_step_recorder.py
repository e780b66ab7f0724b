"""Every way in which a step cannot be replayed is found, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from tests.support.step_recorder import NotReplayable, check_replayable


class Toy:
    """A step over static tensors: gradient, clipping by a factor on the device, update."""

    def __init__(self, planted: Callable[[Toy], object] | None = None) -> None:
        self.x, self.rate = torch.ones(4, 3), torch.tensor(0.1)
        self.weight = torch.zeros(3, requires_grad=True)
        self.mean = torch.zeros(3)
        self.host_rate, self.num_fills = 0.0, 0
        self.planted = planted

    def fill(self) -> None:
        self.num_fills += 1
        self.x.copy_(torch.randn(4, 3, generator=torch.Generator().manual_seed(self.num_fills)))
        self.rate.fill_(0.1 / self.num_fills)
        self.host_rate = 0.1 / self.num_fills

    def step(self) -> None:
        loss = (self.x @ self.weight - 1).square().mean()
        (grad,) = torch.autograd.grad(loss, self.weight)
        grad = grad / grad.norm().clamp_min(1.0)
        with torch.no_grad():
            self.mean.lerp_(grad, 0.1)
            self.weight -= self.rate * self.mean
            if self.planted is not None:
                self.planted(self)

    def check(self) -> list[Any]:
        return check_replayable(self.step, [self.fill] * 4)


def test_a_step_on_the_device_is_replayable() -> None:
    toy = Toy()
    operations = toy.check()
    assert len(operations) > 10
    assert {"aten.mv.default", "aten.lerp_.Scalar"} <= {operation.name for operation in operations}


def rebind(toy: Toy) -> None:
    toy.mean = toy.mean * 0.9


def skip_sometimes(toy: Toy) -> None:
    if toy.num_fills % 2:
        toy.mean.mul_(0.9)


def other_shape(toy: Toy) -> None:
    toy.x[: toy.num_fills].sum()


def other_size(toy: Toy) -> None:
    torch.empty_strided((2,), (toy.num_fills,))


def recorded(toy: Toy) -> bool:
    """Where there is no GPU, a warm-up cannot wait for one."""
    return toy.num_fills > 1


class AsksInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].cpu()


def backward_to_the_host(toy: Toy) -> None:
    with torch.enable_grad():
        AsksInBackward.apply(toy.weight).sum().backward()


def assigns(toy: Toy) -> None:
    toy.mean[0] = toy.host_rate


PLANTED: dict[str, tuple[Callable[[Toy], object], str]] = {
    "a branch": (lambda toy: toy.mean.mul_(0.9) if toy.mean.norm() > 0 else None, "waits for the device"),
    "item": (lambda toy: toy.mean.sum().item(), "waits for the device: item"),
    "float": (lambda toy: float(toy.mean.sum()), "waits for the device"),
    "tolist": (lambda toy: toy.mean.tolist(), "waits for the device: tolist"),
    "to the host": (lambda toy: toy.mean.cpu(), "waits for the device: cpu"),
    "nonzero": (lambda toy: toy.x.nonzero(), "waits for the device: aten.nonzero"),
    "a mask as an index": (lambda toy: toy.x[toy.x > 0], "waits for the device: aten.index"),
    "repeats": (lambda toy: torch.arange(2).repeat_interleave(torch.tensor([1, 2])), "tensor of the host's"),
    "synchronize": (lambda toy: recorded(toy) and torch.cuda.synchronize(), "waits for the device: synchronize"),
    "an event": (
        lambda toy: recorded(toy) and cast(Any, torch.cuda.Event).synchronize(None),
        "waits for the device: synchronize",
    ),
    "a host's tensor": (lambda toy: toy.mean.add_(torch.tensor(toy.host_rate)), "makes a tensor of the host's: tensor"),
    "a host's array": (lambda toy: torch.as_tensor([1.0]), "makes a tensor of the host's: as_tensor"),
    "a host's number": (lambda toy: toy.mean.mul_(toy.host_rate), r"a number of the host's differs: aten.mul_"),
    "in backward": (backward_to_the_host, "waits for the device: cpu"),
    "a host's number that is assigned": (assigns, "a number of the host's differs: aten.lift_fresh"),
    "another address": (rebind, r"a tensor from before the step lies at another address: aten.lerp_"),
    "another operation": (skip_sometimes, "another operation is done"),
    "another shape": (other_shape, "a number of the host's differs: aten.slice"),
    "another allocation": (other_size, "a number of the host's differs: aten.empty_strided"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_cannot_be_replayed_is_named(name: str) -> None:
    planted, said = PLANTED[name]
    with pytest.raises(NotReplayable, match=said):
        Toy(planted).check()


def test_shapes_and_allocations_that_no_number_tells_are_seen() -> None:
    """As of a tensor that another thread makes longer."""

    def longer(toy: Toy) -> None:
        source = {2: short, 3: short}.get(toy.num_fills, long)
        torch.relu(source)

    short, long = torch.zeros(4), torch.zeros(5)
    with pytest.raises(NotReplayable, match=r"a result has another shape: aten.relu"):
        Toy(longer).check()
    from dataclasses import replace

    from tests.support import step_recorder

    toy = Toy()
    first = toy.check()
    other = [*first[:3], replace(first[3], allocations=(12345,)), *first[4:]]
    with pytest.raises(NotReplayable, match="memory is allocated in another size"):
        step_recorder._compare(first, other)


def test_a_warm_up_and_two_steps_to_compare_are_needed() -> None:
    toy = Toy()
    with pytest.raises(AssertionError, match="two to compare"):
        check_replayable(toy.step, [toy.fill] * 2)
