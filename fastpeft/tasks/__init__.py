"""Kinds of task. `load_task` finds the kind that a `dataset` section selects, and reads its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastpeft.config.schema import ColumnsConfig, DatasetConfig, EvaluationConfig
from fastpeft.config.tasks import TASKS
from fastpeft.data.known import KnownDataset
from fastpeft.data.opening import open_source
from fastpeft.data.rows import DataError
from fastpeft.data.source import TRAIN, VALIDATION, RowsSource, Source
from fastpeft.tasks.base import Task
from fastpeft.tasks.trained_on import TrainedOn

__all__ = [
    "Known",
    "Task",
    "choose_kind",
    "find_known",
    "is_generated",
    "kind_of",
    "known_names",
    "load_task",
    "restore_task",
    "task_class",
]

AUTO = "auto"


@dataclass(frozen=True)
class Known:
    """A dataset with built-in settings, and its kind of task."""

    kind: str
    dataset: KnownDataset


def task_class(kind: str) -> type[Task]:
    return TASKS.load(kind)


def known_names() -> list[str]:
    return [name for kind in TASKS.names for name in task_class(kind).datasets]


def find_known(config: DatasetConfig) -> Known | None:
    """What is known of `dataset.name`; of a dataset of another kind than dataset.task, only where it is.

    Raises:
        DataError: dataset.task names another kind than a dataset that the package makes itself.
    """
    found = [Known(kind, known) for kind in TASKS.names if (known := task_class(kind).datasets.get(config.name))]
    asked = [known for known in found if known.kind == config.task]
    known = next(iter(asked or found), None)
    if known and not asked and config.task != AUTO:
        if is_generated(config, known):
            raise DataError(
                f"dataset.task={config.task}: {config.name} is of the kind {known.kind}; leave dataset.task out"
            )
        return Known(config.task, replace(known.dataset, labels=None, columns={}, f1_label=None))
    return known


def is_generated(config: DatasetConfig, known: Known | None) -> bool:
    """Whether the package generates the rows itself, without a file."""
    return config.path is None and known is not None and known.dataset.generated is not None


def load_task(config: DatasetConfig, evaluation: EvaluationConfig | None = None, seed: int = 0) -> Task:
    """The task that a `dataset` section selects, with its rows.

    Args:
        seed: seed of the random choices of an evaluation.

    Raises:
        DataError: the data are unusable.
        UnavailableError: the dataset cannot be found or downloaded.
    """
    known = find_known(config)
    source = open_source(config, known.dataset if known else None, known_names())
    kind, why = choose_kind(config, source, known)
    task = task_class(kind).load(config, source, evaluation or EvaluationConfig(), seed)
    if why:
        task.notes.insert(1, f"dataset.task is {kind}: {why}")
    return task


def restore_task(trained: TrainedOn, config: DatasetConfig, evaluation: EvaluationConfig, seed: int = 0) -> Task:
    """The task of a run whose data are missing or have changed, restored from the run's record over made-up rows.

    Its labels and its facts for an export are those of the training. Its rows serve only to run the model.

    Args:
        config: the run's section `dataset`, of which only settings that concern no data are read, such as max_length
            and prompt.
    """
    rows = list(trained.specimen)
    plain = replace(
        config,
        path=None,
        columns=ColumnsConfig(),
        labels=list(trained.labels) or None,
        validation_split=None,
        scheme="auto",
        held_out=1,
    )
    source = RowsSource(trained.dataset, {TRAIN: rows, VALIDATION: rows})
    return task_class(trained.kind).load(plain, source, evaluation, seed)


def choose_kind(config: DatasetConfig, source: Source, known: Known | None) -> tuple[str, str]:
    """(the kind; the reason, if the rows decided)."""
    if config.task != AUTO:
        return config.task, ""
    if known is not None:
        return known.kind, ""
    for kind in TASKS.names:
        reason = task_class(kind).recognises(config, source)
        if reason:
            return kind, reason
    return TASKS.names[0], ""


def kind_of(config: DatasetConfig, noted: str = "") -> str:
    """The kind of a run's task, from its result if stored there; the rows are read only if nothing else decides."""
    known = find_known(config)
    if noted or known is not None or config.task != AUTO:
        return noted or (known.kind if known is not None else config.task)
    return choose_kind(config, open_source(config, None, known_names()), None)[0]
