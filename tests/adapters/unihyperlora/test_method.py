"""The three methods that share atoms, as a trainer has them: penalties, micro-batches, saving, limits, whole runs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpeft.adapters.adapter import Adapter
from fastpeft.adapters.unihyperlora.quantise import straight_through
from fastpeft.config import ConfigError, RunConfig
from fastpeft.data.batches import micro_batches
from fastpeft.errors import UserError
from fastpeft.kernels.ops.atoms.reference import route_atoms_reference
from fastpeft.trainer import StopRequest, train
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.step import forward_backward
from tests.support.tiny_runs import Listener, assert_same_outcome, tiny_run

METHODS = ["unihyperlora", "sat_lora", "hf_sat_lora"]
FILES = {
    "unihyperlora": "unihyperlora.safetensors",
    "sat_lora": "sat_lora.safetensors",
    "hf_sat_lora": "sat_lora.safetensors",
}
LIFTED: dict[str, Any] = {"max_extra_flops": 100.0}
"""The tiny hosts are narrower than the atoms."""


def run_of(folder: Path, method: str, own: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    section = "unihyperlora" if method == "unihyperlora" else "sat_lora"
    sizes = {"num_atoms": 24, "width": 8} if method == "unihyperlora" else {"num_atoms": 12}
    return tiny_run(folder, method=method, **{section: LIFTED | sizes | (own or {})}, **sections)


def perturbed(job: Job, seed: int) -> Adapter:
    """With gains as training leaves them."""
    adapter = job.adapter
    adapter.flat.data.add_(
        torch.randn(adapter.flat.data.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.2
    )
    return adapter


def without_dropout(job: Job) -> Job:
    for module in job.adapter.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return job


def gradient(job: Job, limit: int) -> tuple[torch.Tensor, float, int]:
    """Of one batch in micro-batches of at most `limit` tokens: with the penalty, its value, and how many parts."""
    rows = job.batches.rows(2)
    parts = [job.task.collate(part, job.device) for part in micro_batches(job.batches.encoded, rows, limit)]
    signals = forward_backward(job.adapter, job.task.loss, parts, job.task.num_items(rows))
    job.adapter.after_backward(signals, 0.5)
    penalty = 0.0 if signals.penalty is None else float(signals.penalty)
    return job.adapter.flat.grad.clone(), penalty, len(parts)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_of_any_size_agree(method: str, tmp_path: Path, seed: int) -> None:
    own = {"budget_weight": 0.5, "delta_weight": 0.1} if method == "unihyperlora" else None
    job = without_dropout(build_job(run_of(tmp_path, method, own, training={"precision": "fp32"})))
    perturbed(job, seed)
    whole, penalty, _ = gradient(job, 10**6)
    for limit in (1, 60):
        got, same, count = gradient(job, limit)
        assert count > 1
        assert same == pytest.approx(penalty, rel=1e-5)
        assert float((got - whole).norm()) <= 2e-5 * float(whole.norm())
    assert (penalty > 0) == (method == "unihyperlora")


def test_the_penalty_is_the_equations(tmp_path: Path, seed: int) -> None:
    """lambda_F E[k] over tokens, padding apart, and lambda_Q ||delta||^2; and nothing is left of a pass before."""
    own = {"budget_weight": 0.5, "delta_weight": 0.1}
    job = without_dropout(build_job(run_of(tmp_path, "unihyperlora", own, adapter={"target_modules": ["query"]})))
    adapter: Any = perturbed(job, seed)
    rows = job.batches.rows(2)
    batch = job.task.collate(rows, job.device)
    plain = forward_backward(adapter, job.task.loss, [batch], len(rows))
    task_gradient = adapter.flat.grad.clone()
    adapter.after_backward(plain, 0.5)
    got = adapter.flat.grad - task_gradient
    seen = []
    queries = [adapter.model.get_submodule(site.name) for site in adapter.sites]
    hooks = [q.register_forward_hook(lambda module, args, y: seen.append(args[0].detach())) for q in queries]
    adapter.model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    adapter.flat.grad.zero_()
    active, count = torch.zeros(()), 0.0
    for x in seen:
        folded = adapter.host.fold()
        z = (x.flatten(0, -2) @ folded.phi[x.shape[-1]]).detach()
        gate = route_atoms_reference(z, folded.v_MQ, folded.slope_M, folded.bias_M, 2)[2]
        there = x.shape[:-1] == batch.inputs["attention_mask"].shape
        weight = batch.inputs["attention_mask"].flatten().float() if there else torch.ones(len(gate))
        active, count = active + (gate * weight[:, None]).sum(), count + float(weight.sum())
    delta = adapter.dictionary.mixer.delta
    want = 0.5 * active / count + 0.1 * straight_through(delta, 4).square().sum()
    want.backward()
    assert plain.penalty is not None
    assert float(plain.penalty) == pytest.approx(float(want.detach()), rel=1e-5)
    assert float((got - adapter.flat.grad).norm()) <= 1e-4 * float(adapter.flat.grad.norm())
    assert adapter.host.count.num_active is None


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_what_was_scored(method: str, tmp_path: Path, seed: int) -> None:
    """The head with it, in a file of its own; and saving what was loaded gives the same bytes."""
    job = build_job(run_of(tmp_path, method))
    adapter = perturbed(job, seed)
    batch = job.task.collate(job.batches.rows(0), job.device)
    adapter.model.eval()
    logits = adapter.model(**batch.inputs).logits
    first, again = tmp_path / "first", tmp_path / "again"
    for folder in (first, again):
        folder.mkdir()
    adapter.save(first)
    adapter.flat.data.normal_(generator=torch.Generator().manual_seed(seed))
    assert not torch.equal(adapter.model(**batch.inputs).logits, logits)
    adapter.load(first)
    assert torch.equal(adapter.model(**batch.inputs).logits, logits)
    adapter.save(again)
    assert sorted(p.name for p in first.iterdir()) == sorted([FILES[method], "head.safetensors"])
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in first.iterdir())
    assert (first / FILES[method]).stat().st_size == adapter.adapter_bytes  # type: ignore[attr-defined]
    assert not any("classifier" in name for name in load_file(first / FILES[method]))


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_to_the_same_bits(method: str, tmp_path: Path) -> None:
    """Dropout is on."""
    training = {"checkpoint_steps": 4, "learning_rate": 3e-2}
    run = run_of(tmp_path, method, budget="10steps", evaluation={"every": "6steps"}, training=training)
    unbroken = train(run, results_dir=tmp_path, name="unbroken")
    stop = StopRequest()
    listener = Listener(lambda e: e["type"] == "step" and e["step"] == 6 and setattr(stop, "signal", signal.SIGTERM))
    assert train(run, results_dir=tmp_path, name="r", reporter=listener, stop=stop).status == "stopped"
    result = train(None, results_dir=tmp_path, name="r", resume=True)
    assert_same_outcome(result, unbroken)
    assert result.adapter_facts == unbroken.adapter_facts
    assert 0 < result.adapter_facts["active_atoms"] <= 8
    for folder in ("adapter", "adapter_best"):
        for file in (FILES[method], "head.safetensors"):
            paths = [tmp_path / name / folder / file for name in ("r", "unbroken")]
            assert paths[0].read_bytes() == paths[1].read_bytes()


def test_over_a_budget_a_run_is_refused_and_a_larger_limit_lifts_it(tmp_path: Path) -> None:
    for own, message in (
        ({"max_extra_flops": 0.1}, r"adds \d+\.\d% to the model's FLOPs, over unihyperlora.max_extra_flops 0.1"),
        ({"max_mb": 0.001}, r"file has 0\.\d+ MB, over unihyperlora.max_mb 0.001"),
    ):
        with pytest.raises(UserError, match=message) as error:
            build_job(run_of(tmp_path, "unihyperlora", own))
        assert error.value.exit_code == 2
        assert "A larger limit lifts it" in str(error.value)
    for own, message in (
        ({"max_extra_flops": 0.1}, "sat_lora.max_extra_flops"),
        ({"max_mb": 0.001}, "sat_lora.max_mb"),
    ):
        with pytest.raises(UserError, match=message):
            build_job(run_of(tmp_path, "sat_lora", own))
    notes = build_job(run_of(tmp_path, "unihyperlora")).notes
    assert any("of 1 MB; extra FLOPs" in note and "at most 2 active atoms a token" in note for note in notes)


def test_three_atoms_a_token_are_not_in_the_papers_budget(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unihyperlora.top_k: expected less than or equal to 2, got 3"):
        run_of(tmp_path, "unihyperlora", {"top_k": 3})
    with pytest.raises(ConfigError, match=r"unihyperlora.train: delta .* name its file in unihyperlora.adapter"):
        run_of(tmp_path, "unihyperlora", {"train": "delta"})
    with pytest.raises(UserError, match=r"adapter.rank 4: .* sat_lora.num_atoms 3"):
        build_job(run_of(tmp_path, "sat_lora", {"num_atoms": 3}))


def test_one_dictionary_a_matrix_where_layers_do_not_share(tmp_path: Path) -> None:
    shared, own = (
        build_job(run_of(tmp_path, "sat_lora", {"share_across_layers": value})).adapter for value in (True, False)
    )
    assert len(shared.u) == 3  # type: ignore[attr-defined]
    assert len(own.u) == 12  # type: ignore[attr-defined]


@pytest.mark.parametrize("projector", ["coordinate", "spectral", "probe"])
def test_of_a_moved_adapter_the_bias_alone_is_trained(projector: str, tmp_path: Path, seed: int) -> None:
    job = build_job(run_of(tmp_path, "unihyperlora", {"projector": projector}))
    perturbed(job, seed)
    (tmp_path / "saved").mkdir()
    job.adapter.save(tmp_path / "saved")
    file = tmp_path / "saved" / FILES["unihyperlora"]
    own = {"adapter": str(file), "train": "delta", "task": "another"}
    moved = without_dropout(build_job(run_of(tmp_path, "unihyperlora", own)))
    adapter: Any = moved.adapter
    assert [block.projection for block in adapter.blocks] == ["delta"]
    assert adapter.flat.num_adapter == 24 * 6
    assert adapter.dictionary.shape.projector == projector
    before = {name: p.detach().clone() for name, p in adapter.dictionary.named_parameters()}
    gradient(moved, 10**6)
    assert bool(adapter.flat.grad[: adapter.flat.num_adapter].any())
    adapter.flat.data.sub_(adapter.flat.grad)
    changed = {name for name, p in adapter.dictionary.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"mixer.delta"}


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_computed_again_give_the_same_gradient(method: str, tmp_path: Path, seed: int) -> None:
    found = []
    for setting in (False, True):
        job = without_dropout(build_job(run_of(tmp_path, method, training={"checkpoint_layers": setting})))
        perturbed(job, seed)
        found.append(gradient(job, 10**6))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6)
    assert float((found[0][0] - found[1][0]).norm()) <= 1e-5 * float(found[0][0].norm())
