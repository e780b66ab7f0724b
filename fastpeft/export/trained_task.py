"""The task that a run was trained on, as the run notes it: what its file of data says today is not believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastpeft.data.rows import DataError
from fastpeft.data.source import VALIDATION
from fastpeft.errors import UnavailableError
from fastpeft.export.plan import ExportError, Plan
from fastpeft.models.backbone import Backbone
from fastpeft.tasks import Task, load_task, restore_task
from fastpeft.tasks.base import ExportCheck
from fastpeft.tasks.trained_on import TrainedOn, changed_since
from fastpeft.trainer.resolve import check_model, resolve

MADE_UP = "made-up rows"


@dataclass(frozen=True)
class TrainedTask:
    task: Task
    noted: TrainedOn
    """What the run was trained on; of a run of an earlier version, which noted no hash, what its data are now."""
    stand_in: bool
    has_rows: bool = True
    """The task has the rows that the run was scored on. Else made-up ones, for a look at what a model answers."""

    def export_check(self, backbone: Backbone) -> ExportCheck:
        """The task's, which may not say of made-up rows that they are the run's own."""
        check = self.task.export_check(backbone)
        if not self.has_rows:
            check.where = MADE_UP
        return check

    def num_scored(self, max_examples: int) -> int:
        """Validation rows that the run's own score is of."""
        rows = self.noted.data.splits[VALIDATION].rows
        return min(rows, max_examples or rows)


def trained_task(plan: Plan, say: Callable[[str], None]) -> TrainedTask:
    """Its labels and kind are those that were trained. Data that are gone or have changed are said, and not used.

    Raises:
        UserError: data that cannot be used, or other labels, where the run notes no hash of its data.
        UnavailableError: a model that cannot be had.
    """
    run, noted = plan.run, TrainedOn.read(plan.folder.path)
    say(f"loading {run.model.name} and {run.dataset.name}")
    try:
        resolved = resolve(run)
        task = load_task(run.dataset, run.evaluation, run.training.seed)
    except (DataError, UnavailableError) as error:
        if noted is None:
            raise
        check_model(run.model)
        fault = f"the data that the run was trained on cannot be read: {error}"
    else:
        now = task.trained_on()
        found = changed_since(plan.folder, now)
        fault = f"the data are not those that the run was trained on: {'; '.join(found)}"
        if found and noted is None:
            raise ExportError(f"{plan.folder.path}: {fault}. Put back the data as they were")
        if noted is None:
            say("the run does not say which data it was trained on: whether these are the same, nobody can tell")
        if not found:
            task.recall(plan.source)
            return TrainedTask(task, noted or now, resolved.stand_in)
    assert noted is not None
    say(f"{fault}. Labels and kind of task are those that were trained; the check is made on {MADE_UP}")
    restored = restore_task(noted, run.dataset, run.evaluation, run.training.seed)
    restored.recall(plan.source)
    return TrainedTask(restored, noted, plan.result is not None and plan.result.stand_in, has_rows=False)
