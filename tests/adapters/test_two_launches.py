"""A whole step after the backward pass is two launches, and without a penalty it is LoRA's, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fastpeft.kernels.launch import LAUNCHES
from fastpeft.signals import Signals
from fastpeft.tasks.sequences.examples import collate
from fastpeft.trainer.step import train_step
from tests.support.tiers import some

OWN = {"weighted_frobenius_kernel", "adamw_kernel"}


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the flat buffers' kernels: those of the layers have tests of their own, and take long."""
    from fastpeft.kernels import dispatch
    from fastpeft.kernels.ops.adamw import op as adamw
    from fastpeft.kernels.ops.frobenius import op as frobenius

    if torch.cuda.is_available():
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    for module in (adamw, frobenius):
        monkeypatch.setattr(module, "runs_triton", lambda x: x.dtype == torch.float32)


def calibrate(job) -> None:
    adapter = job.adapter
    adapter._set_sensitivity(torch.arange(1.0, len(adapter.blocks) + 1, device=job.device).double())


def take(job, num_steps: int, progress: float = 0.5) -> list[Signals]:
    found = []
    for position in range(num_steps):
        rows = job.batches.rows(position)
        batch = [collate(job.batches.encoded, rows, job.device)]
        found.append(train_step(job.adapter, job.schedule, job.optimizer, job.task.loss, batch, len(rows), progress)[0])
    return found


def trained(make_job, num_steps: int = 3, **settings):
    job = make_job("bert", adapter__target_modules="qv", **settings)
    if settings.get("method") is None and settings.get("regulariser__calibration") != "inline":
        calibrate(job)
    return job, take(job, num_steps)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("penalty", ["product", "factors"])
def test_alpha_0_is_lora_bit_for_bit(make_job, triton, penalty, request):
    if triton:
        request.getfixturevalue("on_triton")
    lora, plain = trained(make_job, method="lora")
    other, weighted = trained(make_job, regulariser__alpha=0.0, regulariser__penalty=penalty)
    assert torch.equal(lora.adapter.flat.data, other.adapter.flat.data)
    for name, tensor in lora.optimizer.state_dict().items():
        assert torch.equal(tensor, other.optimizer.state_dict()[name]), name
    for a, b in zip(plain, weighted):
        assert torch.equal(a.grad_norm, b.grad_norm)
        assert float(b.penalty) == float(b.penalty_share) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lora"},
        {},
        {"regulariser__online": True},
        {"regulariser__penalty": "factors"},
        {"regulariser__decoupled": True},
        {"regulariser__calibration": "inline"},
        {"method": "adalora"},
        {"method": "full"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "iw_lora",
)
def test_a_step_is_two_launches(make_job, on_triton, settings):
    before = LAUNCHES.copy()
    job, signals = trained(make_job, num_steps=2, **settings)
    found = {name: LAUNCHES[name] - before[name] for name in OWN}
    assert found == dict.fromkeys(OWN, 2)
    assert all(float(s.grad_norm) > 0 and float(s.skipped) == 0 for s in signals)
    assert not job.adapter.flat.layout.tickets.any()


@pytest.mark.parametrize("settings", some([{}, {"regulariser__online": True}, {"regulariser__decoupled": True}]))
def test_triton_trains_as_pytorch_does(make_job, settings, request):
    settings = {"regulariser__alpha": 0.3} | settings
    expected, theirs = trained(make_job, **settings)
    request.getfixturevalue("on_triton")
    job, mine = trained(make_job, **settings)
    torch.testing.assert_close(job.adapter.flat.data, expected.adapter.flat.data, rtol=1e-4, atol=1e-5)
    for a, b in zip(mine, theirs):
        for name in ("grad_norm", "penalty", "penalty_share"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-3, atol=1e-9)
    assert job.adapter.importance().sensitivity == pytest.approx(expected.adapter.importance().sensitivity, rel=1e-3)
