"""Data from the hub, through `datasets`, which runs no code of a repository."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft import hub
from fastpeft.config.schema import DatasetConfig
from fastpeft.data.rows import Row, Split, build_task, choose_columns
from fastpeft.data.task import EMBEDDED, EMBEDDED_WORD_PROBLEMS, GSM8K, ClassificationTask, DataError
from fastpeft.errors import UnavailableError, UserError
from fastpeft.tasks.sequence_classification.glue import GLUE, REPOSITORY

if TYPE_CHECKING:
    from datasets import ClassLabel, Dataset, DatasetBuilder, DatasetDict

GSM8K_REPOSITORY = "openai/gsm8k"

_TRAIN, _TEST = "train", "test"
_VALIDATION = ("validation", "dev", "valid", "val", "validation_matched", "eval")
"""`test` is none of them: the best weights are chosen on the validation split."""


@dataclass(frozen=True)
class HubDataset:
    repository: str
    config: str | None
    """None: the repository's default."""
    revision: str

    def __str__(self) -> str:
        return f"{self.repository}/{self.config}" if self.config else self.repository


@dataclass(frozen=True)
class HubProblems:
    name: str
    train: Split
    test: Split | None


def hub_dataset(config: DatasetConfig) -> HubDataset:
    """Where on the hub a `dataset` section points. Raises UnavailableError for a name that cannot be on it."""
    if config.name in GLUE:
        if config.config not in (None, config.name):
            raise UserError(
                f"dataset.config {config.config!r}: dataset.name {config.name} is one configuration already"
            )
        return HubDataset(REPOSITORY, config.name, config.revision)
    if config.name == GSM8K:
        return HubDataset(GSM8K_REPOSITORY, config.config or "main", config.revision)
    if config.name.count("/") == 1:
        return HubDataset(config.name, config.config, config.revision)
    known = [*GLUE, GSM8K, EMBEDDED, EMBEDDED_WORD_PROBLEMS]
    close = difflib.get_close_matches(config.name, known, n=1)
    raise UnavailableError(
        f"dataset.name {config.name!r} is no task of this package ({', '.join(known)})"
        f"{f'; did you mean {close[0]}?' if close else ''}; a dataset of the hub is written owner/name; "
        "for files of your own set dataset.path"
    )


def is_cached(source: HubDataset) -> bool:
    return _prepared(source) is not None


def load_hub(config: DatasetConfig) -> ClassificationTask:
    """Read a hub dataset: from the cache if it holds this revision, else from the hub.

    Raises:
        UnavailableError: it cannot be had, or its download broke off.
        DataError: a split, column or label that is not there, a malformed row.
    """
    source = hub_dataset(config)
    known = GLUE.get(config.name)
    splits = _read(source)
    train_name, validation_name = _choose_splits(config, source, list(splits), known.validation if known else None)
    train = splits[train_name]
    columns = choose_columns(f"dataset {source}", train.column_names, config.columns)
    labels = tuple(config.labels) if config.labels else known.labels if known else None
    names = _class_names(source, columns[2], train, labels)

    def split(name: str) -> Split:
        return Split(f"{source} {name}", list(_rows(splits[name], columns, names)))

    task_name = config.name if known else str(source)
    validation = split(validation_name) if validation_name else None
    return build_task(config, task_name, split(train_name), validation, labels or names)


def load_hub_problems(config: DatasetConfig, columns: Callable[[str, list[str]], Sequence[str]]) -> HubProblems:
    """The rows of the training split and of the split `test`, of the columns that `columns(source, have)` chooses.

    Raises UnavailableError and DataError as load_hub does.
    """
    source = hub_dataset(config)
    splits = _read(source)
    train_name, _ = _choose_splits(config, source, list(splits), None)

    def split(name: str) -> Split:
        wanted = columns(f"{source} {name}", splits[name].column_names)
        rows = splits[name].select_columns(list(wanted)).to_list()
        return Split(f"{source} {name}", [Row(line, values) for line, values in enumerate(rows, 1)])

    test = split(_TEST) if _TEST in splits and train_name != _TEST else None
    return HubProblems(config.name if config.name == GSM8K else str(source), split(train_name), test)


def _read(source: HubDataset) -> DatasetDict:
    return (_cached_builder(source) or _download(source)).as_dataset()


# ---- the cache -----------------------------------------------------------------------------


def _prepared(source: HubDataset) -> Path | None:
    """The folder of Arrow files that `datasets` has made of exactly this commit and configuration."""
    commit = hub.cached_commit("dataset", source.repository, source.revision)
    if commit is None:
        return None
    import datasets
    from datasets.naming import camelcase_to_snakecase

    config = source.config or _default_config(hub.snapshot("dataset", source.repository, commit) / hub.CARD)
    if config is None:
        return None
    owner, name = source.repository.split("/")
    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    folder = cache / f"{owner}___{camelcase_to_snakecase(name)}" / config
    return next((p for p in folder.glob(f"*/{commit}") if (p / "dataset_info.json").is_file()), None)


def _default_config(card: Path) -> str | None:
    """The configuration that a dataset's card makes the default; None if it leaves the choice open, or is malformed."""
    import yaml
    from huggingface_hub import DatasetCard

    try:
        about = DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
    except (ValueError, yaml.YAMLError):
        return None
    configs = about.get("configs") or about.get("dataset_info") or []
    configs = [configs] if isinstance(configs, dict) else configs
    if not (isinstance(configs, list) and all(isinstance(config, dict) for config in configs)):
        return None
    names = [config.get("config_name", "default") for config in configs] or ["default"]
    chosen = [config.get("config_name", "default") for config in configs if config.get("default")]
    if chosen or "default" in names:
        return chosen[0] if chosen else "default"
    return names[0] if len(names) == 1 else None


def _cached_builder(source: HubDataset) -> DatasetBuilder | None:
    folder = _prepared(source)
    if folder is None:
        return None
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    config, version, commit = folder.parts[-3:]
    name = camelcase_to_snakecase(source.repository.split("/")[1])
    return Cache(dataset_name=name, config_name=config, version=version, hash=commit, repo_id=source.repository)


# ---- the hub -------------------------------------------------------------------------------


def _download(source: HubDataset) -> DatasetBuilder:
    import datasets
    from huggingface_hub import utils

    name = source.repository
    try:
        there = hub.look_up("dataset", name, source.revision)
    except hub.Unreachable as error:
        raise UnavailableError(str(error)) from None
    commit = hub.note_revision("dataset", name, source.revision) or there.commit
    try:
        with hub.progress_bars(utils), hub.progress_bars(datasets):
            builder = datasets.load_dataset_builder(f"hf://datasets/{name}", source.config, revision=commit)
            if builder.hash == commit:
                builder.download_and_prepare()
    except Exception as error:  # connection, parquet, metadata: each layer has its own classes
        raise _explain(source, error) from error
    if builder.hash != commit:  # `datasets` falls back on whatever revision it has
        raise UnavailableError(f"dataset {name}: the hub broke off while it was read. Run the same again")
    return builder


def _explain(source: HubDataset, error: Exception) -> UnavailableError:
    text = " ".join(str(error).split())
    if hub.is_network_error(error):
        return hub.download_error("dataset", source.repository, source.revision, error)
    if isinstance(error, ValueError) and ("Config name is missing" in text or "BuilderConfig" in text):
        configs = text.partition("[")[2].partition("]")[0].replace("'", "")
        problem = f"it has no configuration {source.config!r}" if source.config else "it has several configurations"
        return UnavailableError(f"dataset {source.repository}: {problem}; set dataset.config to one of {configs}")
    if "scripts are no longer supported" in text:
        return UnavailableError(
            f"dataset {source}: its rows come from a script, and code of a repository is never run. "
            "Where the hub has converted it, dataset.revision=refs/convert/parquet takes that"
        )
    return UnavailableError(f"dataset {source}: cannot be read: {text}")


# ---- rows ----------------------------------------------------------------------------------


def _choose_splits(
    config: DatasetConfig, source: HubDataset, have: list[str], usual: str | None
) -> tuple[str, str | None]:
    """The training split, and the validation split if there is one."""
    for key in ("train_split", "validation_split"):
        name = getattr(config, key)
        if name is not None and name not in have:
            raise DataError(f"dataset.{key}: {source} has no split {name!r}; it has {', '.join(have)}")
    train = config.train_split or _TRAIN
    if train not in have:
        raise DataError(f"dataset {source} has no split {train!r}: set dataset.train_split to one of {', '.join(have)}")
    usual_names = (usual,) if usual else _VALIDATION
    validation = config.validation_split or next((n for n in usual_names if n in have and n != train), None)
    return train, validation


def _class_names(
    source: HubDataset, column: str, train: Dataset, labels: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    """Name of each label number; None for a column that holds the labels themselves."""
    feature: ClassLabel | Any = train.features[column]
    names = getattr(feature, "names", None)
    if names is None or labels is None or set(labels) == set(names):
        return None if names is None else tuple(names)
    if len(labels) != len(names):
        raise DataError(
            f"dataset.labels: {len(labels)} names are given, but column {column!r} of {source} has {len(names)} "
            f"classes: {', '.join(names)}"
        )
    return labels


def _rows(split: Dataset, columns: tuple[str, str | None, str], names: tuple[str, ...] | None) -> Iterator[Row]:
    """Rows from 1, with class numbers as names; a number that is no class stays as it is."""
    label_column = columns[2]
    wanted = [column for column in columns if column in split.column_names]
    for line, values in enumerate(split.select_columns(wanted).to_list(), 1):
        yield Row(line, _named(values, label_column, names) if names else values)


def _named(values: Mapping[str, Any], column: str, names: tuple[str, ...]) -> dict[str, Any]:
    number = values.get(column)
    known = isinstance(number, int) and 0 <= number < len(names)
    return {**values, column: names[number]} if known else dict(values)
