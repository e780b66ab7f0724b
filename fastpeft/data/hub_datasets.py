"""Data from the hub, through `datasets`, which runs no code of a repository."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fastpeft import hub
from fastpeft.config.schema import DatasetConfig
from fastpeft.data.known import KnownDataset
from fastpeft.data.rows import DataError, Row, Split
from fastpeft.data.source import TEST, TRAIN, VALIDATION, Source
from fastpeft.errors import UnavailableError, UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder, DatasetDict

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


def hub_dataset(config: DatasetConfig, known: KnownDataset | None, names: Iterable[str] = ()) -> HubDataset:
    """Where on the hub a `dataset` section points.

    Args:
        names: of all datasets that are known by name, for the message.

    Raises:
        UserError: another configuration than the name stands for.
        UnavailableError: a name that cannot be on the hub.
    """
    if known is not None and known.repository is not None:
        if known.one_config and config.config not in (None, known.config):
            raise UserError(
                f"dataset.config {config.config!r}: dataset.name {config.name} is one configuration already"
            )
        revision = known.revision if config.revision == "main" else config.revision
        return HubDataset(known.repository, config.config or known.config, revision)
    if config.name.count("/") == 1:
        return HubDataset(config.name, config.config, config.revision)
    names = list(names)
    close = difflib.get_close_matches(config.name, names, n=1)
    raise UnavailableError(
        f"dataset.name {config.name!r} is no dataset that this package knows ({', '.join(names)})"
        f"{f'; did you mean {close[0]}?' if close else ''}; a dataset of the hub is written owner/name; "
        "for files of your own set dataset.path"
    )


def is_cached(source: HubDataset) -> bool:
    return _prepared(source) is not None


class HubSource(Source):
    """Read from the cache if it holds this revision, else from the hub, when the first of it is asked for.

    Whatever reads it raises UnavailableError where it cannot be had, or its download broke off, and DataError for a
    split that is not there.
    """

    def __init__(self, config: DatasetConfig, known: KnownDataset | None, names: Iterable[str] = ()) -> None:
        self.dataset = hub_dataset(config, known, names)
        super().__init__(config.name if known else str(self.dataset), known)
        self._config = config

    @cached_property
    def _data(self) -> DatasetDict:
        return _read(self.dataset)

    @cached_property
    def _names(self) -> dict[str, str]:
        usual = self.known.validation if self.known else None
        return _choose_splits(self._config, self.dataset, [str(split) for split in self._data], usual)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._names)

    def columns(self, split: str) -> list[str]:
        return self._data[self._names[split]].column_names

    def describe_split(self, split: str) -> str:
        return f"dataset {self.dataset}"

    def class_names(self, split: str, column: str) -> tuple[str, ...] | None:
        feature = self._data[self._names[split]].features[column]
        names = getattr(getattr(feature, "feature", feature), "names", None)
        return None if names is None else tuple(names)

    def _rows(self, split: str, columns: tuple[str, ...] | None) -> Split:
        name = self._names[split]
        data = self._data[name]
        if columns is not None:
            data = data.select_columns([column for column in columns if column in data.column_names])
        return Split(f"{self.dataset} {name}", [Row(line, values) for line, values in enumerate(data.to_list(), 1)])


def _read(source: HubDataset) -> DatasetDict:
    data = (_cached_builder(source) or _download(source)).as_dataset()
    return cast("DatasetDict", data)  # as no split is asked for


# ---- the cache -----------------------------------------------------------------------------


def _prepared(source: HubDataset) -> Path | None:
    """The folder of Arrow files that `datasets` has made of exactly this commit and configuration."""
    commit = hub.cached_commit("dataset", source.repository, source.revision)
    if commit is None:
        return None
    from datasets import config as settings
    from datasets.naming import camelcase_to_snakecase

    config = source.config or _default_config(hub.snapshot("dataset", source.repository, commit) / hub.CARD)
    if config is None:
        return None
    owner, name = source.repository.split("/")
    cache = Path(settings.HF_DATASETS_CACHE).expanduser()
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


def _choose_splits(config: DatasetConfig, source: HubDataset, have: list[str], usual: str | None) -> dict[str, str]:
    """What a split is for -> its name there."""
    for key in ("train_split", "validation_split"):
        name = getattr(config, key)
        if name is not None and name not in have:
            raise DataError(f"dataset.{key}: {source} has no split {name!r}; it has {', '.join(have)}")
    train = config.train_split or TRAIN
    if train not in have:
        raise DataError(f"dataset {source} has no split {train!r}: set dataset.train_split to one of {', '.join(have)}")
    usual_names = (usual,) if usual else _VALIDATION
    validation = config.validation_split or next((n for n in usual_names if n in have and n != train), None)
    test = TEST if TEST in have and TEST not in (train, validation) else None
    return {split: name for split, name in ((TRAIN, train), (VALIDATION, validation), (TEST, test)) if name}
