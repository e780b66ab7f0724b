"""`fastpeft evaluate --rescore`: a run's weights, loaded with transformers and PEFT alone, scored again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from fastpeft.config.methods import METHODS
from fastpeft.data.predictions import Answer, read_predictions
from fastpeft.device_memory import TokenLimits, unmeasured
from fastpeft.export.loading import load_adapter, load_base, load_whole
from fastpeft.export.plan import ExportError, Plan, Weights, plan_reading
from fastpeft.export.trained_task import trained_task
from fastpeft.models.backbone import Backbone
from fastpeft.runs.events import number
from fastpeft.runs.store import RunFolder, write_json

RESCORED = "rescored.json"


@dataclass(frozen=True)
class Rescored:
    weights: Weights
    metric: str
    value: float
    noted: float
    """As the run has it."""
    num: int
    num_alike: int | None
    """Rows that are answered as in the run; None where it kept no answers."""

    def __str__(self) -> str:
        alike = "" if self.num_alike is None else f", {self.num_alike:,} of {self.num:,} rows answered alike"
        return (
            f"{self.metric} {self.value:.4f} by PEFT alone, {self.noted:.4f} in the run{alike} ({self.weights} weights)"
        )


def rescore(folder: RunFolder, say: Callable[[str], None], weights: Weights | None = None) -> Rescored:
    """Score the validation rows, in fp32, with the model's own layers, and write RUN/rescored.json.

    Args:
        weights: best or last; the best, if there are any, when None.

    Raises:
        UserError: no weights, no such base, other data than those that the run was scored on.
    """
    plan = plan_reading(folder, weights)
    trained = trained_task(plan, say)
    if not trained.has_rows:
        raise ExportError(
            f"{folder.path}: the rows that it was scored on are gone or others: it cannot be scored again"
        )
    task, run = trained.task, plan.run
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, model = _load(plan, task, device)
    task.encode(backbone, device)
    if run.model.check:
        task.check(model, backbone)
    limits = TokenLimits(unmeasured(run.evaluation.batch_tokens), unmeasured(run.evaluation.batch_tokens))

    def shrink(num_rows: int, width: int) -> int:
        say(limits.halve_evaluation(num_rows, width, "while a run was scored again"))
        return limits.evaluation

    say(f"scoring {plan.source} with PEFT {metadata.version('peft')} alone")
    score = task.evaluate(model, limits, lambda: False, shrink)
    assert score is not None
    kept = read_predictions(folder.predictions(plan.weights))
    answers = [answer for _, answer in score.answered() or ()]
    found = Rescored(
        weights=plan.weights,
        metric=task.metric,
        value=score.value,
        noted=number(plan.metric.get("value", "nan")),
        num=score.num_rows,
        num_alike=None if kept is None or not answers else sum(map(_is_alike, answers, kept.answers)),
    )
    write_json(folder.path / RESCORED, _facts(found, score.more))
    return found


def _load(plan: Plan, task: Any, device: torch.device) -> tuple[Backbone, nn.Module]:
    if plan.full:
        backbone = load_whole(plan.source, task, device)
        return backbone, backbone.model.eval()
    if METHODS[plan.run.method].routes:
        raise ExportError(f"{plan.source}: PEFT knows no adapter of {plan.run.method}; score it without --rescore")
    backbone = load_base(plan.run.model, task, device)
    return backbone, load_adapter(backbone.model, plan.source).eval()


def _is_alike(answer: Answer, kept: Answer) -> bool:
    """Numbers up to the digits that bf16 has."""
    ours, theirs = answer.predicted, kept.predicted
    if isinstance(theirs, list):
        return list(ours) == theirs
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) <= 1e-2 * max(1.0, abs(theirs))
    return ours == theirs


def _facts(found: Rescored, more: dict[str, float]) -> dict[str, Any]:
    versions = {package: metadata.version(package) for package in ("torch", "transformers", "peft")}
    return vars(found) | {"difference": found.value - found.noted, "more": more, "versions": versions}
