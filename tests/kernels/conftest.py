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


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every fresh tensor holds NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
