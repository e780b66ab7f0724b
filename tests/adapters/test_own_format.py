"""An adapter that has nothing of LoRA's: blocks of other parameters, and files of its own."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import nn

from fastpeft.adapters.adapter import Adapter
from fastpeft.adapters.blocks import ParameterBlock
from fastpeft.adapters.flat import FlatParameters
from fastpeft.config import RunConfig
from fastpeft.config.methods import METHODS, AdapterConfig
from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone
from fastpeft.models.targets import match_targets, projection_of
from fastpeft.signals import BLOCK_SUMS, Need
from fastpeft.trainer import StopRequest, train
from fastpeft.trainer.build import build_job
from fastpeft.trainer.checkpoint_files import newest_checkpoint
from tests.support.flat_model import low_rank_block
from tests.support.probe_runs import Recorder, Steps, assert_near, pairs_run, problem_run, put_in
from tests.support.tiny_runs import Listener, assert_same_outcome, strict_events

NUM_BLOCKS = 4
FILE = "scales.npz"
MULTIPLY = {"fot", "graff", "salelr"}
"""Schedules that give blocks rates of their own within twenty steps."""


class ScaleAndShift(Adapter):
    """y = s * (W x) + t behind every query and value; it counts its steps."""

    saved_as = "scales"
    export_format = "scale_and_shift"
    weight_files = "*.npz"

    def __init__(self, backbone: Backbone) -> None:
        self.model = backbone.model
        names = match_targets(self.model, backbone.head, "qv")
        self.blocks = [self._attach(name, self.model.get_submodule(name), i // 2) for i, name in enumerate(names)]
        self._head = {
            f"{top}.{name}": p for top in backbone.head for name, p in self.model.get_submodule(top).named_parameters()
        }
        self.flat = FlatParameters(self.blocks, self._head.values())
        self.num_steps = 0

    @classmethod
    def build(cls, adapter: AdapterConfig, own: Any, backbone: Backbone) -> Self:
        return cls(backbone)

    def _attach(self, name: str, linear: nn.Linear, layer: int) -> ParameterBlock:
        scale, shift = nn.Parameter(torch.ones(linear.out_features)), nn.Parameter(torch.zeros(linear.out_features))
        linear.register_forward_hook(lambda module, args, y: y * scale + shift)
        return ParameterBlock(name, layer, projection_of(name), (scale, shift), kind="scale_and_shift")

    def after_step(self, *args: Any) -> None:
        self.num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = state["num_steps"]

    def _parameters(self) -> dict[str, nn.Parameter]:
        named = {f"{b.name}:{what}": p for b in self.blocks for what, p in zip(("scale", "shift"), b.parameters)}
        return named | self._head

    def save(self, folder: Path) -> None:
        np.savez(folder / FILE, **{name: p.detach().cpu().numpy() for name, p in self._parameters().items()})

    def load(self, folder: Path) -> None:
        with np.load(folder / FILE) as stored:
            for name, parameter in self._parameters().items():
                parameter.data.copy_(torch.from_numpy(stored[name]))


@pytest.fixture(autouse=True)
def method(monkeypatch: pytest.MonkeyPatch) -> None:
    """`method: lora` is ScaleAndShift."""
    load = METHODS.load
    monkeypatch.setattr(METHODS, "load", lambda name: ScaleAndShift if name == "lora" else load(name))


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / FILE) as stored:
        return dict(stored)


def assert_same_arrays(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    assert len(a) > 2 * NUM_BLOCKS
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


# ---- whole runs ------------------------------------------------------------------------------


def test_it_trains_checkpoints_and_resumes_to_the_bit(tmp_path: Path) -> None:
    run = pairs_run(tmp_path, budget="4steps", training={"checkpoint_steps": 2}, schedule={"name": "linear"})
    unbroken = train(run, results_dir=tmp_path, name="unbroken")
    assert unbroken.status == "done"
    stop = StopRequest()
    listener = Listener(lambda e: e["type"] == "checkpoint" and setattr(stop, "signal", signal.SIGTERM))
    assert train(run, results_dir=tmp_path, name="r", reporter=listener, stop=stop).status == "stopped"
    checkpoint, _ = newest_checkpoint(tmp_path / "r" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.parts["adapter"] == {"num_steps": checkpoint.step}
    assert 0 < checkpoint.step < 4
    result = train(None, results_dir=tmp_path, name="r", resume=True)
    assert_same_outcome(result, unbroken)
    for weights in ("scales", "scales_best"):
        assert_same_arrays(arrays(tmp_path / "r" / weights), arrays(tmp_path / "unbroken" / weights))
    assert result.adapter_mb == pytest.approx((tmp_path / "r" / "scales" / FILE).stat().st_size / 2**20, abs=1e-3)
    first = build_job(run).adapter.flat.data
    assert not torch.equal(build_loaded(run, tmp_path / "r" / "scales").flat.data, first)


def build_loaded(run: RunConfig, folder: Path) -> ScaleAndShift:
    adapter = build_job(run).adapter
    adapter.load(folder)
    return adapter


def test_save_and_load_are_its_own_and_keep_every_bit(tmp_path: Path, seed: int) -> None:
    run = pairs_run(tmp_path, schedule={"name": "linear"})
    adapter = build_job(run).adapter
    adapter.flat.data.copy_(torch.randn(adapter.flat.data.shape, generator=torch.Generator().manual_seed(seed)))
    folder = tmp_path / "saved"
    folder.mkdir()
    adapter.save(folder)
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert torch.equal(build_loaded(run, folder).flat.data, adapter.flat.data)


@pytest.mark.parametrize("schedule", ["fot", "graff", "snac", "bacon", "salelr", "bats", "reactor"])
def test_every_measuring_schedule_trains_it(schedule: str, tmp_path: Path) -> None:
    """With block scaling, FoT reads the gradients of the labelled rows: for a classifier the whole ones."""
    options = {"fot": {"block_scaling": True, "window": 1}} if schedule == "fot" else {}
    run = pairs_run(
        tmp_path,
        budget="20steps",
        evaluation={"every": "end"},
        schedule={"name": schedule, "warmup_steps": 2, **options},
        training={"learning_rate": 5e-3},
    )
    assert train(run, results_dir=tmp_path, name="r").status == "done"
    events = [e for e in strict_events(tmp_path / "r") if e["type"] == "rates"]
    assert all(len(e["names"]) == len(e["multipliers"]) == NUM_BLOCKS for e in events)
    assert len(events) == 1 or schedule not in MULTIPLY


# ---- what a schedule sees --------------------------------------------------------------------


def test_blocks_have_rates_and_sums_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, Recorder, BLOCK_SUMS | {Need.SECANT, Need.ANSWER_GRADIENT})
    still = 2
    original = Recorder.next_rates

    def one_stands_still(self: Recorder, measured: Any) -> Any:
        rates = original(self, measured)
        rates.multiplier_K[still] = 0.0
        return rates

    monkeypatch.setattr(Recorder, "next_rates", one_stands_still)
    run = Steps(pairs_run(tmp_path)).take(4).finish()
    flat = run.job.adapter.flat
    assert len(flat.blocks) == flat.layout.num_blocks == NUM_BLOCKS
    assert flat.blocks.names == tuple(block.name for block in run.job.adapter.blocks)
    assert flat.blocks.layers == (0, 0, 1, 1)
    assert flat.blocks.num_b_elements == flat.blocks.num_elements[:NUM_BLOCKS] == (64,) * NUM_BLOCKS
    moved_U = run.sums(run.change(3).square())
    assert moved_U[still] == 0
    assert (np.delete(moved_U, still) > 0).all()
    for number, measured in enumerate(run.measured, start=1):
        assert_near(measured.blocks.grad_sq_U, run.sums(run.grad(number).square()), 0)
    first = run.measured[0]
    np.testing.assert_allclose(first.answer_grad_sq_K, first.blocks.grad_sq_U[:NUM_BLOCKS], rtol=1e-5)
    assert run.measured[3].secant is not None


def test_gradients_of_labelled_tokens_are_refused_by_the_blocks_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in(monkeypatch, Recorder, frozenset({Need.ANSWER_GRADIENT}))
    run = Steps(problem_run(tmp_path))
    with pytest.raises(UserError, match=r"labelled tokens, which the layer model\.layers\.0\.self_attn\.q_proj cannot"):
        run.take(1)


# ---- beside blocks of low rank ---------------------------------------------------------------


def test_blocks_of_both_kinds_lie_in_one_buffer(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=draw))

    pair = ParameterBlock("bias", 3, "bias", (parameter(5), parameter(2, 3)))
    matrices = [low_rank_block(i, parameter(2, 7), parameter(6, 2)) for i in range(2)]
    head = [parameter(4)]
    every = [p for block in (*matrices, pair) for p in block.parameters] + head
    before = [p.detach().clone() for p in every]
    flat = FlatParameters([matrices[0], pair, matrices[1]], head)
    assert all(torch.equal(p, value) for p, value in zip(every, before))
    assert flat.blocks.names == ("layer.0.query", "layer.1.query", "bias")
    assert flat.blocks.num_elements == (26, 26, 11, 4)
    assert flat.blocks.num_b_elements == (12, 12, 11)
    assert flat.num_adapter == flat.data.numel() - 4
    want = [torch.cat([p.detach().flatten() for p in block.parameters]).sum() for block in (*matrices, pair)]
    torch.testing.assert_close(flat.layout.unit_sums(flat.data)[:3], torch.stack(want))
    spread = flat.layout.spread(torch.tensor([2.0, 3.0, 5.0]), 1.0)
    torch.testing.assert_close(flat.layout.unit_sums(spread), torch.tensor([52.0, 78.0, 55.0, 4.0]))
