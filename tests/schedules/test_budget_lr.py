"""BudgetLR: a schedule as torch's LRScheduler, alone, under accelerate and under transformers' Trainer."""

from __future__ import annotations

import io
import time
import warnings

import accelerate
import pytest
import torch
import transformers
from torch.optim.lr_scheduler import LRScheduler

import fastpeft
from fastpeft import BudgetLR
from fastpeft.config.schedules import ScheduleConfig
from fastpeft.errors import UserError
from fastpeft.schedules import make_schedule

CLASSIC = ("constant", "linear", "cosine", "wsd", "rex")
PEAKS = (3e-4, 1e-2)


def optimizer_of(peaks: tuple[float, ...] = PEAKS) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": peak} for peak in peaks])


def take(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, num_steps: int) -> list[list[float]]:
    """The rates that the steps are taken with, of every group."""
    rates = []
    for _ in range(num_steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def reference(name: str, num_steps: int, peak: float, **settings: float) -> list[float]:
    """What the trainer takes its steps with."""
    schedule = make_schedule(ScheduleConfig(name=name, **({"warmup_steps": 0} | settings)), peak)
    return [schedule.rates(None, i / num_steps).lr for i in range(num_steps)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that `time.perf_counter` shows; set them."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("name", CLASSIC)
def test_the_rates_are_the_trainers_for_every_group(name: str) -> None:
    settings = {"warmup_steps": 3, "final_ratio": 0.1, "decay_fraction": 0.5}
    optimizer = optimizer_of()
    scheduler = BudgetLR(optimizer, name, total_steps=200, **settings)
    assert isinstance(scheduler, LRScheduler)
    rates = take(optimizer, scheduler, 200)
    for group, peak in enumerate(PEAKS):
        assert [row[group] for row in rates] == pytest.approx(reference(name, 200, peak, **settings), rel=1e-15)
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_a_rate_that_is_the_users_stays_to_the_bit() -> None:
    optimizer = optimizer_of((0.1 + 0.2, 1 / 3))
    rates = take(optimizer, BudgetLR(optimizer, "constant", total_steps=10), 10)
    assert all(row == [0.1 + 0.2, 1 / 3] for row in rates)


@pytest.mark.parametrize("name", CLASSIC)
def test_after_the_end_the_rate_stays_where_it_is(name: str) -> None:
    optimizer = optimizer_of()
    scheduler = BudgetLR(optimizer, name, total_steps=20, final_ratio=0.25)
    take(optimizer, scheduler, 20)
    shares = {"constant": 1.0, "rex": 0.0}
    for row in take(optimizer, scheduler, 5):
        assert row == pytest.approx([peak * shares.get(name, 0.25) for peak in PEAKS])


def test_seconds_are_those_of_the_clock(clock: list[float]) -> None:
    optimizer = optimizer_of((1.0,))
    scheduler = BudgetLR(optimizer, "linear", budget_s=100)
    seen = []
    for now in (0, 10, 40, 40, 99, 100, 500):
        clock[0] = 1000 + now
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([1.0, 0.9, 0.6, 0.6, 0.01, 0.0, 0.0])
    assert scheduler.progress == 1.0


@pytest.mark.parametrize("name", CLASSIC)
@pytest.mark.parametrize("stop", [1, 4, 25, 70])
def test_a_resume_is_exact_through_torch_save(name: str, stop: int) -> None:
    def make() -> tuple[torch.optim.Optimizer, BudgetLR]:
        optimizer = optimizer_of()
        return optimizer, BudgetLR(optimizer, name, total_steps=80, warmup_steps=4)

    optimizer, scheduler = make()
    whole = take(optimizer, scheduler, 80)
    optimizer, scheduler = make()
    take(optimizer, scheduler, stop)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    optimizer, scheduler = make()
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert scheduler.get_last_lr() == whole[stop]
    assert take(optimizer, scheduler, 80 - stop) == whole[stop:]


def test_a_resume_by_seconds_counts_those_before_it(clock: list[float]) -> None:
    optimizer = optimizer_of((1.0,))
    scheduler = BudgetLR(optimizer, "linear", budget_s=100)
    clock[0] += 30
    take(optimizer, scheduler, 1)
    state = scheduler.state_dict()
    clock[0] += 1e6
    again = BudgetLR(optimizer_of((1.0,)), "linear", budget_s=100)
    again.load_state_dict(state)
    assert again.elapsed_s == 30
    clock[0] += 20
    take(again.optimizer, again, 1)
    assert again.get_last_lr() == pytest.approx([0.5])


def test_asking_for_rates_between_steps_changes_nothing() -> None:
    optimizer = optimizer_of()
    scheduler = BudgetLR(optimizer, "linear", total_steps=200, warmup_steps=10)
    rates = []
    for _ in range(30):
        rates += take(optimizer, scheduler, 1)
        assert scheduler.get_lr() == [group["lr"] for group in optimizer.param_groups]
    assert [row[0] for row in rates] == pytest.approx(reference("linear", 200, PEAKS[0], warmup_steps=10)[:30])


def test_a_warm_up_that_is_cut_is_told_once() -> None:
    optimizer = optimizer_of()
    scheduler = BudgetLR(optimizer, "linear", total_steps=100, warmup_steps=50)
    with pytest.warns(UserWarning, match="the warm-up ended after 6 of 50 steps") as caught:
        take(optimizer, scheduler, 50)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either total_steps or budget_s"),
        ({"total_steps": 5, "budget_s": 5.0}, "give either total_steps or budget_s"),
        ({"total_steps": 0}, "more than 0, got 0"),
        ({"budget_s": -1.0}, "more than 0, got -1.0"),
        ({"budget_s": float("nan")}, "more than 0, got nan"),
        ({"total_steps": 5, "name": "lineer"}, "name: .*got 'lineer'"),
        ({"total_steps": 5, "final": 0.5}, "final: .*got 0.5"),
        ({"total_steps": 5, "final_ratio": 2.0}, "final_ratio: .*got 2.0"),
        ({"total_steps": 5, "warmup_steps": -1}, "warmup_steps: .*got -1"),
        ({"total_steps": 5, "name": "salelr"}, "schedule salelr needs measurements .*: grad_sq. Use"),
        ({"total_steps": 5, "name": "bats"}, "schedule bats needs measurements .*: tokens. Use"),
        ({"total_steps": 5, "name": "reactor"}, "schedule reactor needs measurements .*: loss, tokens. Use"),
        ({"total_steps": 5, "name": "bacon"}, "schedule bacon needs measurements .*: grad_sq, mean_sq, secant. Use"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BudgetLR(optimizer_of(), **settings)


def test_a_state_of_another_schedule_and_an_epoch_are_refused() -> None:
    scheduler = BudgetLR(optimizer_of(), "linear", total_steps=5)
    with pytest.raises(UserError, match="this is linear, and the state is of cosine"):
        scheduler.load_state_dict(BudgetLR(optimizer_of(), "cosine", total_steps=5).state_dict())
    with pytest.raises(UserError, match="without an epoch"):
        scheduler.step(3)


def test_it_is_found_at_the_top() -> None:
    assert "BudgetLR" in fastpeft.__all__


# ---- other people's loops ------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_accelerate_steps_it_once_an_optimizer_step(accumulation: int) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    optimizer = optimizer_of((1.0,))
    optimizer, scheduler = accelerator.prepare(optimizer, BudgetLR(optimizer, "linear", total_steps=10))
    (parameter,) = optimizer.param_groups[0]["params"]
    rates = []
    for _ in range(10 * accumulation):
        with accelerator.accumulate():
            accelerator.backward(parameter.square().sum())
            if accelerator.sync_gradients:
                rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert rates == pytest.approx([1 - i / 10 for i in range(10)])


class Rates(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


def hf_trainer(folder, callback: Rates, resume: bool = False) -> transformers.Trainer:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    head = list(model.classifier.parameters())
    groups = [{"params": list(model.bert.parameters()), "lr": 1e-3}, {"params": head, "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups)
    scheduler = BudgetLR(optimizer, "wsd", total_steps=10, decay_fraction=0.5)
    rows = [{"input_ids": torch.arange(8) % (i + 3), "labels": i % 2} for i in range(64)]
    settings = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=2, gradient_accumulation_steps=2, seed=7,
        logging_steps=1, save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=settings, train_dataset=rows, optimizers=(optimizer, scheduler), callbacks=[callback]
    )  # fmt: skip


def test_hf_trainer_takes_its_steps_with_these_rates_and_resumes(tmp_path) -> None:
    first, second = Rates(), Rates()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = hf_trainer(tmp_path, first)
        trainer.train()
    want = [[share * 1e-3, share * 1e-2] for share in reference("wsd", 10, 1.0, decay_fraction=0.5)]
    assert first.seen == [pytest.approx(row) for row in want]
    assert first.seen[0] == [1e-3, 1e-2]
    assert first.seen[-1][0] < 0.2e-3
    assert trainer.state.global_step == 10
    hf_trainer(tmp_path, second).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.seen == first.seen[4:]
