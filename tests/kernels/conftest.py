"""Where the Triton kernels of a test run: on the GPU if there is one, else interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastpeft.kernels.launch import LAUNCHES


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Operations on this device go through their Triton kernels. The test has to launch one."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = LAUNCHES.total()
    yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert LAUNCHES.total() > before, "no Triton kernel was launched"


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance, in float64; NaN anywhere makes it NaN, which no bound passes."""
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from Tensor.new_empty is NaN, so that what a kernel leaves unwritten shows."""
    new_empty = torch.Tensor.new_empty

    def filled(self: torch.Tensor, *size: int, **options: object) -> torch.Tensor:
        out = new_empty(self, *size, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
