"""A member of each family that the package does not know is registered from outside, and trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
import yaml

from fastpeft.adapters.lora import Lora
from fastpeft.config import load_run, save_run, trial_run
from fastpeft.config.fields import STRICT_KEYS, Fraction, PositiveFloat
from fastpeft.config.load import json_schema
from fastpeft.config.methods import METHODS, AdapterConfig, MethodEntry
from fastpeft.config.optimizers import OPTIMIZERS, OptimizerEntry
from fastpeft.config.registry import Beside, Entry, Registry
from fastpeft.config.schedules import SCHEDULES, ScheduleConfig, ScheduleEntry
from fastpeft.config.schema import FAMILIES, DatasetConfig, EvaluationConfig
from fastpeft.config.tasks import TASKS
from fastpeft.config.trackers import TRACKERS, TrackerEntry
from fastpeft.data.rows import Row
from fastpeft.data.source import Source
from fastpeft.export.plan import make_plan
from fastpeft.export.write import export
from fastpeft.models.backbone import Backbone
from fastpeft.runs.store import RunFolder
from fastpeft.schedules import Schedule
from fastpeft.schedules.budget_lr import BudgetLR
from fastpeft.signals import Measured, Rates, Signals
from fastpeft.tasks.sequences.reading import TextSplit, read_texts
from fastpeft.tasks.sequences.scoring import Answers
from fastpeft.tasks.sequences.task import SequenceTask
from fastpeft.trainer import train
from fastpeft.trainer.optim import Optimizer
from tests.support.line_tracker import LineConfig
from tests.support.run_files import one_problem
from tests.support.tiny_runs import Listener, strict_events, tiny_run, weights


@dataclass(frozen=True, kw_only=True)
class StairsConfig:
    """Down by one stair every so much of the budget."""

    __pydantic_config__ = STRICT_KEYS

    height: Fraction = 0.5
    """Share of the rate that a stair takes."""
    width: PositiveFloat = 0.5
    """Share of the budget between two stairs."""

    TRIAL: ClassVar[dict[str, Any]] = {"width": 0.125}

    def problems(self, beside: Beside) -> Iterator[str]:
        if beside.warmup_steps > 1000:
            yield "schedule.stairs: no stair is left after so long a warm-up"


class Stairs(Schedule):
    own: StairsConfig

    def rates(self, measured: Measured | None, progress: float) -> Rates:
        return Rates(self.peak_lr * (1 - self.own.height) ** (progress // self.own.width))


@dataclass(frozen=True, kw_only=True)
class FrozenAConfig:
    """LoRA whose A stays as it was drawn."""

    draw: PositiveFloat = 1.0
    """A's first values are multiplied by this."""


class FrozenA(Lora):
    def __init__(self, config: AdapterConfig, own: FrozenAConfig, backbone: Backbone) -> None:
        super().__init__(config, own, backbone)
        for block in self.blocks:
            block.lora_a.data.mul_(own.draw)

    def after_backward(self, signals: Signals, progress: float) -> None:
        for block in self.blocks:
            block.lora_a.grad.zero_()


@dataclass(frozen=True, kw_only=True)
class DescentConfig:
    """Gradient descent, without a memory."""

    sign_only: bool = False


class Descent(Optimizer):
    def _update(self, signals: Signals, norm: torch.Tensor, rates: Rates) -> torch.Tensor:
        flat = self._flat
        flat.grad.div_(self.clip_divisor(norm))
        flat.data.sub_(flat.grad.sign() if self._config.own.sign_only else flat.grad, alpha=rates.lr)
        return torch.zeros(())

    def _state(self) -> dict[str, torch.Tensor]:
        return {}

    def _load_state(self, state: dict[str, torch.Tensor]) -> None: ...


class WordCount(SequenceTask):
    """How many words a text has, whatever its label: the model's one output is rounded."""

    kind = "word-count"
    problem_type = "regression"
    label_dtype = np.float32
    metric = "right"
    num_outputs = 1

    @classmethod
    def load(cls, config: DatasetConfig, source: Source, evaluation: EvaluationConfig, seed: int) -> Self:
        texts = read_texts(config, source, lambda values, column: None, cls._counter)
        return cls(source.name, texts, config, evaluation)

    @staticmethod
    def _counter(split: TextSplit) -> Callable[[Row], float]:
        return lambda row: float(len(row.values[split.columns.text].split()))

    def describe(self) -> str:
        return f"{self.name}: words of {len(self.texts.train)} texts"

    def row_losses(self, logits_NC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits_NC[:, 0] - labels).abs().sum()

    def metrics(self, answers: Answers, labels: np.ndarray) -> tuple[float, dict[str, float], dict[str, dict]]:
        off = np.abs(answers.logits_NC[:, 0].numpy() - labels)
        return float((off < 0.5).mean()), {"off": float(off.mean())}, {"short": {"off": float(off[labels < 6].mean())}}

    def card_task(self) -> str:
        return "how many words"

    def card_example(self, max_length: int, eos_token_ids: tuple[int, ...]) -> str:
        return "print(model(**tokenizer('one text', return_tensors='pt')).logits.item())\n"


MEMBERS: list[tuple[Registry[Any], Entry]] = [
    (SCHEDULES, ScheduleEntry(name="stairs", target=f"{__name__}:Stairs", config=StairsConfig)),
    (METHODS, MethodEntry(name="frozen_a", target=f"{__name__}:FrozenA", config=FrozenAConfig, section="frozen")),
    (OPTIMIZERS, OptimizerEntry(name="descent", target=f"{__name__}:Descent", config=DescentConfig)),
    (
        TRACKERS,
        TrackerEntry(name="lines", title="Lines", target="tests.support.line_tracker:LineTracker", config=LineConfig),
    ),
    (TASKS, Entry(name="word-count", target=f"{__name__}:WordCount")),
]


@pytest.fixture(autouse=True)
def members() -> Iterator[None]:
    before = [family.names for family in FAMILIES]
    for registry, entry in MEMBERS:
        registry.add(entry)
    yield
    for registry, entry in MEMBERS:
        registry.remove(entry.name)
    assert [family.names for family in FAMILIES] == before


def trained(folder: Path, name: str, **settings: Any) -> list[dict[str, Any]]:
    """The step events of a run of two steps."""
    base = {"method": "lora", "schedule": {"name": "constant", "warmup_steps": 0}, "budget": "2steps"}
    result = train(tiny_run(folder, **(base | settings)), results_dir=folder, name=name)
    assert (result.status, result.steps) == ("done", 2)
    return [event for event in strict_events(folder / name) if event["type"] == "step"]


def test_a_kind_of_task_trains_is_scored_and_exported(tmp_path: Path) -> None:
    steps = trained(tmp_path, "r", dataset={"task": "word-count"})
    assert steps[0]["loss"] > 1.0  # words off: the head begins near 0
    result = RunFolder(tmp_path / "r").read_result()
    assert result is not None
    assert result.kind == "word-count"
    assert result.metric["name"] == "right"
    assert result.metric["more"]["off"] > 1.0
    assert set(result.metric["groups"]) == {"short"}
    exported = export(make_plan("r", results_dir=tmp_path))
    assert exported.check.difference < 1e-4
    assert "how many words" in (exported.target / "README.md").read_text()


def test_a_schedule_trains_with_the_settings_of_its_own_section(tmp_path: Path) -> None:
    steps = trained(tmp_path, "r", schedule={"name": "stairs", "warmup_steps": 0, "stairs": {"height": 0.75}})
    assert [event["lr"] for event in steps] == [1e-2, 2.5e-3]


def test_a_method_trains_and_is_saved(tmp_path: Path) -> None:
    trained(tmp_path, "plain")
    for name, draw in (("frozen", 1.0), ("small", 0.5)):
        trained(tmp_path, name, method="frozen_a", frozen={"draw": draw})
    plain, frozen, small = (weights(tmp_path / name) for name in ("plain", "frozen", "small"))
    names = [name for name in frozen if ".lora_A." in name]
    assert names
    for name in names:
        assert torch.equal(small[name], frozen[name] / 2)
        assert not torch.equal(plain[name], frozen[name])
    assert any(frozen[name].any() for name in frozen if ".lora_B." in name)


def test_an_optimizer_trains_with_the_settings_of_its_own_section(tmp_path: Path) -> None:
    for name, sign_only in (("all", False), ("sign", True)):
        trained(tmp_path, name, optimizer={"name": "descent", "descent": {"sign_only": sign_only}})
    moved = torch.cat([t.flatten() for name, t in weights(tmp_path / "sign").items() if ".lora_B." in name])
    assert {round(value, 4) for value in moved.tolist()} <= {-0.02, -0.01, 0.0, 0.01, 0.02}
    assert any(value.abs().max() < 0.01 for name, value in weights(tmp_path / "all").items() if ".lora_B." in name)


def test_a_tracker_gets_every_row_in_a_process_of_its_own(tmp_path: Path) -> None:
    heard = Listener()
    base = {"budget": "2steps", "schedule": {"warmup_steps": 0}, "lines": {"enabled": True, "file": "seen.txt"}}
    train(tiny_run(tmp_path, **base), results_dir=tmp_path, name="r", reporter=heard)
    assert heard.warnings() == []
    assert "lines: seen.txt" in heard.said
    losses = [event["loss"] for event in strict_events(tmp_path / "r") if event["type"] == "step"]
    assert (tmp_path / "r" / "seen.txt").read_text() == f"1 {losses[0]}\n2 {losses[1]}\n"


def test_a_run_file_takes_their_sections_and_keeps_them(tmp_path: Path) -> None:
    given = ["schedule.name=stairs", "schedule.stairs.height=0.25", "lines.file=x.txt"]
    run = load_run("lora_mnli", given)
    save_run(run, tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == run
    stored = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert stored["schedule"]["stairs"] == {"height": 0.25, "width": 0.5}
    assert stored["lines"] == {"enabled": False, "file": "x.txt"}
    assert "did you mean height?" in one_problem("lora_mnli", ["schedule.stairs.heigth=0.25"])
    assert "schedule.stairs.height: expected less than 1" in one_problem("lora_mnli", ["schedule.stairs.height=2"])


def test_the_schema_tells_of_them_and_still_of_the_rest() -> None:
    schema = json_schema()
    sections = schema["$defs"]
    assert sections["StairsConfig"]["properties"]["height"]["description"] == "Share of the rate that a stair takes."
    assert "stairs" in sections["ScheduleConfig"]["properties"]["name"]["enum"]
    assert sections["ScheduleConfig"]["properties"]["warmup_steps"]["description"].startswith("Linear warm-up")
    assert schema["properties"]["run_id"]["description"].startswith("Name of this configuration")


def test_a_trial_and_the_checks_ask_the_chosen_member() -> None:
    chosen = {"schedule.name": "stairs"}
    assert trial_run(load_run("lora_mnli", chosen)).schedule.stairs.width == 0.125
    assert trial_run(load_run("lora_mnli")).schedule.stairs.width == 0.5
    assert "no stair is left" in one_problem("lora_mnli", chosen | {"schedule.warmup_steps": 2000})
    assert load_run("lora_mnli", {"schedule.warmup_steps": 2000}).schedule.name == "linear"


def test_loops_that_are_not_ours_take_a_schedule_from_outside_too() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = BudgetLR(optimizer, "stairs", total_steps=4, stairs={"height": 0.5, "width": 0.25})
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 0.5, 0.25, 0.125]


def test_one_that_was_taken_back_is_refused_like_any_unknown_name() -> None:
    registry, entry = MEMBERS[0]
    assert isinstance(load_run("lora_mnli", ["schedule.name=stairs"]).schedule, ScheduleConfig)
    registry.remove(entry.name)
    assert "'stairs' is not one of" in one_problem("lora_mnli", ["schedule.name=stairs"])
    registry.add(entry)
