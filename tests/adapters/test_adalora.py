"""AdaLoRA does what PEFT's own loop does, under budgets that PEFT's loop does not know."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers

from fastpeft.adapters.adalora import AdaLora
from fastpeft.config import ConfigError, load_run
from fastpeft.signals import Rates, Signals
from fastpeft.tasks.sequences.examples import collate
from fastpeft.trainer import train
from fastpeft.trainer.step import train_step
from tests.support.tiers import some
from tests.support.tiny import FAMILIES

STEPS = 40
SETTINGS = {
    "method": "adalora",
    "adalora__initial_rank": 6,
    "adalora__target_rank": 3,
    "adalora__virtual_steps": STEPS,
    "adalora__initial_fraction": 0.1,
    "adalora__final_fraction": 0.25,
    "adalora__prune_every": 3,
    "training__learning_rate": 2e-2,
    "budget": f"{STEPS}steps",
}
LAST = STEPS - STEPS // 4


def step(job, i: int):
    rows = job.batches.rows(i)
    batch = collate(job.batches.encoded, rows, job.device)
    return train_step(job.adapter, job.schedule, job.optimizer, job.task.loss, [batch], len(rows), i / STEPS), batch


def load_base(job):
    return transformers.AutoModelForSequenceClassification.from_pretrained(job.run.model.name, num_labels=2)


def bare_peft(job) -> peft.PeftModel:
    """The same model, adapter and initial weights as `job`, all of it PEFT's."""
    own = job.adapter.model.peft_config["default"]
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=6, target_r=3, tinit=STEPS // 10, tfinal=STEPS // 4, deltaT=3, total_step=STEPS,
        lora_alpha=own.lora_alpha, target_modules=own.target_modules, modules_to_save=own.modules_to_save,
        orth_reg_weight=0.5,
    )  # fmt: skip
    model = peft.get_peft_model(load_base(job), config)
    model.load_state_dict(job.adapter.model.state_dict())
    return model.train()


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_ranks_and_weights_equal_a_bare_peft_loop(make_job, family):
    job = make_job(family, **SETTINGS)
    model = bare_peft(job)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.01)
    seen = []
    for i in range(STEPS):
        (_, rates), batch = step(job, i)
        optimizer.zero_grad()
        model(**batch.inputs, labels=batch.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = rates.lr
        optimizer.step()
        model.base_model.update_and_allocate(i + 1)
        pattern = model.peft_config["default"].rank_pattern
        if pattern is not None:
            want = [sum(pattern[f"{block.name}.lora_E.default"]) for block in job.adapter.blocks]
            assert job.adapter.ranks() == want, f"after step {i + 1}"
            seen.append(want)
    assert sum(seen[-1]) == 3 * len(seen[-1]) < sum(seen[0])
    assert len(set(seen[-1])) > 1, "every matrix has the same rank: nothing was allocated"
    theirs = dict(model.named_parameters())
    for name, parameter in job.adapter.model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_orthogonality_gradient_is_autograds(make_job, seed):
    job = make_job("bert", **SETTINGS)
    adapter = job.adapter
    adapter.flat.data.add_(torch.randn(adapter.flat.data.shape, generator=torch.Generator().manual_seed(seed)))
    factors = [b.lora_a.detach().double().requires_grad_() for b in adapter.blocks]
    factors += [b.lora_b.detach().double().requires_grad_() for b in adapter.blocks]
    norms = [(m @ m.T if m.shape[0] < m.shape[1] else m.T @ m) for m in factors]
    want = 0.5 * torch.stack([(n - torch.eye(6).double()).norm() for n in norms]).mean()
    want.backward()
    adapter.flat.grad.zero_()
    signals = Signals(loss=torch.zeros(()), num_tokens=1)
    adapter.after_backward(signals, 0.0)
    torch.testing.assert_close(signals.penalty.double(), want.detach(), rtol=1e-5, atol=1e-6)
    got = [b.lora_a.grad for b in adapter.blocks] + [b.lora_b.grad for b in adapter.blocks]
    for gradient, factor in zip(got, factors):
        torch.testing.assert_close(gradient.double(), factor.grad, rtol=1e-4, atol=1e-6)
    assert not adapter.blocks[0].lora_e.grad.any()
    assert float(signals.penalty_share) == pytest.approx(1.0)


@pytest.mark.parametrize("num_steps", [7, 40, 1000])
def test_every_pruning_step_is_visited_once_however_many_steps_there_are(make_job, num_steps, monkeypatch):
    """Under a budget in seconds the share that is spent moves unevenly, and by more or less than a virtual step."""
    job = make_job("bert", **SETTINGS)
    adapter, visited = job.adapter, []
    budgets = []
    monkeypatch.setattr(adapter, "_pruning_steps", spy(visited, adapter._pruning_steps))
    mask = adapter._allocator.mask_to_budget
    monkeypatch.setattr(adapter._allocator, "mask_to_budget", lambda m, b: budgets.append(b) or mask(m, b))
    signals = Signals(loss=torch.zeros(()), num_tokens=1, skipped=torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    for i in range(num_steps):
        adapter.flat.grad.copy_(torch.randn(adapter.flat.grad.shape, generator=generator))
        adapter.flat.data.add_(adapter.flat.grad, alpha=-0.01)
        adapter.after_step(signals, Rates(lr=0.0), (i / num_steps) ** 1.5)
    first = STEPS // 10
    assert visited == [s for s in range(first + 1, LAST + 1) if s % 3 == 0 or s == LAST]
    assert budgets == sorted(budgets, reverse=True)
    assert sum(adapter.ranks()) == 3 * len(adapter.blocks)


def spy(visited: list, call):
    def wrapped(*args):
        found = call(*args)
        visited.extend(found)
        return found

    return wrapped


def test_a_step_that_is_not_finite_leaves_the_importances_alone(make_job):
    job = make_job("bert", **SETTINGS)
    step(job, 0)
    before = copy.deepcopy(job.adapter.state_dict())
    assert before["sensitivity"].any()
    job.adapter.flat.grad.fill_(torch.nan)
    job.adapter.after_step(
        Signals(loss=torch.zeros(()), num_tokens=1, skipped=torch.ones(())), Rates(lr=0.0), 1 / STEPS
    )
    for name in ("sensitivity", "deviation"):
        assert torch.equal(job.adapter.state_dict()[name], before[name])


def test_without_a_measured_importance_nothing_is_pruned(make_job):
    """fp16 may skip the first steps; the prunings that were due then happen once there is something to rank by."""
    job = make_job("bert", **SETTINGS)
    adapter = job.adapter
    skipped = Signals(loss=torch.zeros(()), num_tokens=1, skipped=torch.ones(()))
    adapter.flat.grad.fill_(torch.nan)
    for i in range(LAST - 2):
        adapter.after_step(skipped, Rates(lr=0.0), i / STEPS)
    assert sum(adapter.ranks()) == 6 * len(adapter.blocks)
    step(job, LAST - 2)
    step(job, LAST - 1)
    assert sum(adapter.ranks()) == 3 * len(adapter.blocks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_steps", [0, 12, STEPS])
def test_saved_as_plain_lora_and_as_adalora(make_job, tmp_path, family, num_steps):
    """Before, while and after pruning; each form gives the logits that were trained."""
    job = make_job(family, **SETTINGS)
    for i in range(num_steps):
        _, batch = step(job, i)
    batch = collate(job.batches.encoded, job.batches.rows(0), job.device)
    want = job.adapter.model.eval()(**batch.inputs).logits
    (tmp_path / "saved").mkdir()
    job.adapter.save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    live = [int((block.lora_e != 0).sum()) for block in job.adapter.blocks]
    assert (settings["peft_type"], settings["r"]) == ("LORA", max(1, *live))
    native = json.loads((tmp_path / "saved" / "adalora" / "adapter_config.json").read_text())
    for names in (settings["target_modules"], native["target_modules"]):
        assert names == sorted(names), "another order in each process"
    for folder, kind in (("saved", peft.tuners.lora.Linear), ("saved/adalora", peft.tuners.adalora.SVDLinear)):
        loaded = peft.PeftModel.from_pretrained(load_base(job), str(tmp_path / folder)).eval()
        assert any(isinstance(module, kind) for module in loaded.modules())
        torch.testing.assert_close(loaded(**batch.inputs).logits, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(job.adapter.model(**batch.inputs).logits, want), "saving changed the model"


@pytest.mark.parametrize("stop_at", some([3, 15, 34], (1,)))
def test_resumes_to_the_same_bits(make_run, tmp_path, stop_at):
    run = make_run("bert", dropout=True, **SETTINGS | {"adapter__dropout": 0.1, "training__checkpoint_steps": stop_at})

    class StopAt:
        """Asks to stop once `stop_at` steps are in the log."""

        def __init__(self):
            self.steps = 0

        def say(self, message): ...

        def on_event(self, event):
            self.steps = max(self.steps, event.get("step", 0))

    whole = train(run, results_dir=tmp_path, name="whole")
    watch = StopAt()
    from fastpeft.trainer import StopRequest

    class Request(StopRequest):
        def __call__(self):
            return watch.steps >= stop_at

    first = train(run, results_dir=tmp_path, name="cut", reporter=watch, stop=Request())
    assert first.status == "stopped"
    assert stop_at <= first.steps < STEPS
    second = train(None, results_dir=tmp_path, name="cut", resume=True)
    assert (second.status, second.steps) == (whole.status, whole.steps) == ("done", STEPS)
    for name in ("adapter", "adapter/adalora"):
        weights = [(tmp_path / n / name / "adapter_model.safetensors").read_bytes() for n in ("whole", "cut")]
        assert weights[0] == weights[1]


def test_importance_events_hold_live_ranks(make_run, tmp_path):
    train(make_run("bert", **SETTINGS | {"evaluation__every": "20%"}), results_dir=tmp_path, name="x")
    events = [json.loads(line) for line in (tmp_path / "x" / "events.jsonl").read_text().splitlines()]
    found = [event for event in events if event["type"] == "importance"]
    totals = [sum(event["ranks"]) for event in found]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == 3 * len(found[-1]["names"]) < totals[0]
    assert sum(found[-1]["weights"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adalora.initial_rank": 8, "adalora.target_rank": 8}, "leaves nothing to prune"),
        ({"adalora.initial_fraction": 0.6, "adalora.final_fraction": 0.5}, "no virtual step is left"),
        ({"adalora.virtual_steps": 2, "adalora.final_fraction": 0.9}, "no virtual step is left"),
        ({"adalora.virtual_steps": 10, "adalora.final_fraction": 0.01}, "under one virtual step"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_run("lora_mnli", {"method": "adalora"} | settings)
    load_run("lora_mnli", settings)  # of another method: not used


def test_is_a_method(make_job):
    assert isinstance(make_job("bert", **SETTINGS).adapter, AdaLora)
