"""A base whose layers are shared out over the ranks trains what ranks that each have a whole one train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpeft.config import ConfigError
from tests.ranks.conftest import Ranks
from tests.support.every_kind import run_of_kind
from tests.support.rank_children import ENDLESS, children, options
from tests.support.rank_runs import assert_same, assert_went_on, files_of
from tests.support.rank_work import built, trained
from tests.support.tiny_runs import assert_same_weights, weights

SHARDED = {"shard_base": True}
IW_LORA: dict[str, Any] = {
    "method": "iw_lora",
    "regulariser": {"warmup_steps": 3, "online": True},
    "budget": "8steps",
    "evaluation": {"every": "4steps"},
    "training": {"checkpoint_steps": 2},
}


def split(kind: str) -> dict[str, Any]:
    """Settings by which ranks have unequally many micro-batches in one of the first steps."""
    return {"micro_batch_tokens": 30 if kind == "classification" else 36, "sampling": "random"}


def sharded(sections: dict[str, Any]) -> dict[str, Any]:
    return sections | {"training": sections.get("training", {}) | SHARDED}


def both(files: Path, kind: str, ranks: Ranks, **sections: Any) -> None:
    """Train with a whole base on each rank, and with a part of it; all that is logged and saved has to be the same."""
    sections = {"adapter": {"dropout": 0.0}} | sections
    whole = ranks(2)(trained, files, kind, "alone", sections)
    parts = ranks(2)(trained, files, kind, "ranks", sharded(sections))
    assert parts[0] == parts[1]
    assert_same(files, whole[0], parts[0])


@pytest.mark.parametrize(
    "kind",
    [
        "classification",
        "chat",
        "word-problems",
        pytest.param("token-classification", marks=pytest.mark.soak),
        pytest.param("regression", marks=pytest.mark.soak),
    ],
)
def test_it_trains_what_a_whole_base_trains(kind: str, float64_ranks: Ranks, tmp_path: Path) -> None:
    both(files_of(tmp_path, kind), kind, float64_ranks, training=split(kind))


@pytest.mark.parametrize("kind", ["classification", "chat"])
def test_calibration_and_checkpointed_layers(kind: str, float64_ranks: Ranks, tmp_path: Path) -> None:
    """Both read weights in a backward pass: of the layer that is calibrated, and of one that is computed again."""
    training = split(kind) | {"checkpoint_layers": True}
    sections = IW_LORA | {"regulariser": {"warmup_steps": 4, "estimator": "exact"}, "training": training}
    both(files_of(tmp_path, kind), kind, float64_ranks, **sections)


@pytest.mark.soak
@pytest.mark.parametrize(
    "sections",
    [
        {"method": "adalora", "adalora": {"initial_rank": 6, "target_rank": 3, "virtual_steps": 100}},
        {"method": "sat_lora", "sat_lora": {"num_atoms": 8, "max_extra_flops": 10.0}},
        {"schedule": {"name": "graff", "warmup_steps": 1, "graff": {"regret": "step"}}, "budget": "14steps"},
        {"schedule": {"name": "fot", "warmup_steps": 1, "fot": {"window": 1}}, "budget": "14steps"},
        {"schedule": {"name": "reactor", "warmup_steps": 1}, "budget": "14steps"},
        {"training": split("classification") | {"padding": "none"}},
    ],
    ids=["adalora", "sat_lora", "graff", "fot", "reactor", "unpadded"],
)
def test_other_methods_and_schedules(sections: dict[str, Any], float64_ranks: Ranks, tmp_path: Path) -> None:
    both(files_of(tmp_path, "classification"), "classification", float64_ranks, **sections)


# ---- what each rank has ----------------------------------------------------------------------


def held(files: Path, kind: str, sections: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What this rank has of the base, and of the adapter; and the gradient of a batch."""
    from torch.distributed.tensor import DTensor

    from fastpeft.trainer.micro_batches import MicroBatches
    from fastpeft.trainer.step import forward_backward

    job = built(files, kind, sections)
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for name, weight in job.adapter.model.named_parameters()
        if not weight.requires_grad
    }
    batches = MicroBatches(job, 0, "", print)
    signals = batches.until_it_fits(
        lambda: forward_backward(job.adapter, job.task.loss, batches, batches.num_items, reduce=batches.reduce)
    )
    saved = folder / str(job.ranks.rank)
    saved.mkdir(parents=True)
    job.adapter.save(saved)
    return {
        "parts": {name: w.to_local().clone() for name, w in base.items() if isinstance(w, DTensor)},
        "whole": {name: w.clone() for name, w in base.items() if not isinstance(w, DTensor)},
        "flat": job.adapter.flat.data.clone(),
        "gradient": job.adapter.flat.grad.clone(),
        "loss": float(signals.loss),
        "plan": job.plan.describe(),
        "json": job.plan.to_json(),
    }


@pytest.mark.parametrize(("kind", "layer"), [("classification", ".layer."), ("chat", ".layers.")])
def test_each_rank_has_its_own_part_of_the_base_and_all_of_the_adapter(
    kind: str, layer: str, float64_ranks: Ranks, tmp_path: Path
) -> None:
    files = files_of(tmp_path, kind)
    sections = {"adapter": {"dropout": 0.0}, "training": split(kind)}
    first, second = float64_ranks(2)(held, files, kind, sharded(sections), tmp_path / "sharded")
    (alone,) = float64_ranks(1)(held, files, kind, sections, tmp_path / "alone")
    stored = load_file(Path(run_of_kind(files, kind).model.name) / "model.safetensors")
    assert len(first["parts"]) > 10
    assert {name for name in alone["whole"] if layer in name} == first["parts"].keys() == second["parts"].keys()
    for name, part in first["parts"].items():
        other = second["parts"][name]
        assert part.numel() == other.numel() == alone["whole"][name].numel() / 2
        if part.ndim > 1:
            assert not torch.equal(part, other)
        wanted = stored[name] if name in stored else stored[name.partition(".")[2]]  # an encoder's file has no prefix
        assert torch.equal(torch.cat([part, other]), wanted)
    for name in ("flat", "gradient"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], rtol=1e-12, atol=1e-12)
    assert abs(first["loss"] - alone["loss"]) <= 1e-12
    for rank in "01":
        assert weights(tmp_path / "sharded", rank).keys() == weights(tmp_path / "alone", "0").keys()
        for name, tensor in weights(tmp_path / "alone", "0").items():
            assert torch.equal(weights(tmp_path / "sharded", rank)[name], tensor)


def passes_of(files: Path, kind: str, sections: dict[str, Any]) -> list[tuple[int, int]]:
    """(that count, all) passes of this rank in each of the first steps."""
    from fastpeft.trainer.micro_batches import MicroBatches

    job = built(files, kind, sections)
    steps = [list(MicroBatches(job, position, "", print)) for position in range(4)]
    return [(sum(batch.counts for batch in step), len(step)) for step in steps]


@pytest.mark.parametrize("kind", ["classification", "chat"])
def test_every_rank_takes_as_many_passes(kind: str, float64_ranks: Ranks, tmp_path: Path) -> None:
    files = files_of(tmp_path, kind)
    found = list(zip(*float64_ranks(2)(passes_of, files, kind, sharded({"training": split(kind)}))))
    assert any(first[0] != second[0] for first, second in found), "no step shows it"
    assert all(first[1] == second[1] == max(first[0], second[0]) for first, second in found)


def test_the_plan_counts_the_part(float64_ranks: Ranks, tmp_path: Path) -> None:
    files = files_of(tmp_path, "classification")
    first, second = float64_ranks(2)(held, files, "classification", sharded({}), tmp_path / "sharded")
    (alone,) = float64_ranks(1)(held, files, "classification", {}, tmp_path / "alone")
    assert first["plan"] == second["plan"]
    whole = sum(8 * part.numel() for each in (first, second) for part in each["parts"].values())
    everywhere = sum(8 * weight.numel() for weight in first["whole"].values())
    told = f"of the base's layers {whole / 1e3:.0f} kB, of which each of 2 ranks holds {whole / 2e3:.0f} kB"
    assert told in first["plan"]
    assert f"{everywhere / 1e3:.0f} kB beside them on every rank" in first["plan"]
    for name in ("bytes_per_token", "bytes_per_evaluation_token"):  # gathered weights are no token's
        assert math.isclose(first["json"][name], alone["json"][name], rel_tol=0.05)


def interrupted(files: Path, kind: str, sections: dict[str, Any]) -> bool:
    """Whether an evaluation ends without a score on this rank, where rank 1 alone is asked to stop."""
    import signal

    from fastpeft.trainer.follower import Follower

    job = built(files, kind, sections)
    if job.ranks.rank > 0:
        job.orders.stop.signal = signal.SIGTERM
        Follower(job, resumes=False).run()
        return job.orders.stop()
    with job.orders.evaluation(job.adapter.flat.data, job.limits):
        score = job.task.evaluate(job.adapter.model, job.limits, job.orders.asked_to_stop, None)
    job.orders.end()
    return score is None and job.orders.stop()


@pytest.mark.parametrize("kind", ["classification", "word-problems"])
def test_all_ranks_leave_an_evaluation_before_the_same_batch(kind: str, float64_ranks: Ranks, tmp_path: Path) -> None:
    assert float64_ranks(2)(interrupted, files_of(tmp_path, kind), kind, sharded({})) == [True, True]


# ---- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, True), (1, False)), ((1, False), (2, True)), pytest.param((2, True), (3, True), marks=pytest.mark.soak)],
)
def test_a_run_goes_on_with_a_whole_base_or_a_shared_one(
    before: tuple[int, bool], after: tuple[int, bool], float64_ranks: Ranks, tmp_path: Path
) -> None:
    """To what an unbroken run has at its end, up to rounding."""
    files = files_of(tmp_path, "classification")
    sections = IW_LORA | {"adapter": {"dropout": 0.0}}
    (unbroken,) = float64_ranks(1)(trained, files, "classification", "unbroken", sections)

    def go(size: int, is_shared: bool, *more: Any) -> dict[str, Any]:
        own = sharded(sections) if is_shared else sections
        return float64_ranks(size)(trained, files, "classification", "r", own, *more)[0]

    assert go(*before, False, 4)["status"] == "stopped"
    result = go(*after, True)
    assert_went_on(tmp_path, unbroken, result)


def test_the_same_ranks_go_on_to_the_same_bits(float64_ranks: Ranks, tmp_path: Path) -> None:
    files = files_of(tmp_path, "classification", dropout=True)
    own = sharded(IW_LORA | {"training": IW_LORA["training"] | split("classification")})
    float64_ranks(2)(trained, files, "classification", "unbroken", own)
    float64_ranks(2)(trained, files, "classification", "r", own, False, 4)
    float64_ranks(2)(trained, files, "classification", "r", own, True)
    for adapter in ("adapter", "adapter_best"):
        assert_same_weights(weights(tmp_path / "r", adapter), weights(tmp_path / "unbroken", adapter))


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sections", "said"),
    [
        (
            "classification",
            {"method": "full"},
            "training.shard_base: shares out weights that are frozen, and method full",
        ),
        ("chat", {"model": {"quantisation": "nf4"}}, "training.shard_base: a weight in nf4 is codes"),
    ],
)
def test_weights_that_cannot_be_shared_out(kind: str, sections: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run_of_kind(tmp_path, kind, **sharded(sections))


@pytest.mark.soak
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(killed: int, tmp_path: Path) -> None:
    """In the middle of gathering, most likely, which is all that these ranks do."""
    with children(tmp_path, *options(tmp_path, ENDLESS, "training.shard_base=true")) as ranks:
        ranks.wait_for_step(tmp_path / "results" / "r", 5)
        ranks.ranks[killed].kill()
        assert ranks.ends()[1 - killed] == 1
        if killed:
            (message,) = ranks.messages()
            assert "another rank has ended" in message


def test_one_rank_has_nobody_to_share_with(tmp_path: Path) -> None:
    from fastpeft.trainer import train

    run = run_of_kind(tmp_path, "classification", training=SHARDED)
    with pytest.raises(ConfigError, match=r"training.shard_base shares the base out over several ranks: set --ranks"):
        train(run, results_dir=tmp_path, name="r")
    assert not (tmp_path / "r").exists()


def test_a_model_that_runs_one_layer_again_and_again(float64_ranks: Ranks, tmp_path: Path) -> None:
    both(files_of(tmp_path, "classification", family="albert", embedding_size=16), "classification", float64_ranks)


def test_a_weight_that_two_layers_have(tmp_path: Path) -> None:
    from fastpeft.errors import UserError
    from fastpeft.models.sharded_base import _check

    layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    layers[1].weight = layers[0].weight
    with pytest.raises(UserError, match=r"Sequential has the weight 0.1.weight in a layer and elsewhere"):
        _check(torch.nn.Sequential(layers), list(layers))
