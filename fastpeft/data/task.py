"""What a task is: labelled texts in two splits, and the error that bad data raises."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fastpeft.config.schema import DatasetConfig
from fastpeft.errors import UserError

EMBEDDED = "embedded-nli"
"""The generated task that the encoders' stand-ins train on."""

EMBEDDED_WORD_PROBLEMS = "embedded-word-problems"
"""The generated task that the causal language models' stand-ins train on."""

GSM8K = "gsm8k"


class DataError(UserError):
    """Data that cannot be used; the message names the file, the line and what was found."""


@dataclass(frozen=True)
class Examples:
    """Parallel columns; `text_pair` is None for single texts."""

    text: list[str]
    text_pair: list[str] | None
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, num_rows: int) -> Examples:
        """The first rows; 0 means all."""
        if not num_rows:
            return self
        pair = None if self.text_pair is None else self.text_pair[:num_rows]
        return Examples(self.text[:num_rows], pair, self.labels[:num_rows])


@dataclass(frozen=True)
class ClassificationTask:
    name: str
    label_names: tuple[str, ...]
    train: Examples
    validation: Examples
    metric: str = "accuracy"
    skipped_rows: dict[str, int] = field(default_factory=dict)
    """Split -> rows left out under on_bad_row: skip."""
    f1_label: str | None = None
    """The class whose F1 is reported beside the metric."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the data were read."""

    def __post_init__(self) -> None:
        for split, examples in (("training", self.train), ("validation", self.validation)):
            if not len(examples):
                raise DataError(f"dataset {self.name}: the {split} split is empty")

    @property
    def f1_class(self) -> int | None:
        return None if self.f1_label is None else self.label_names.index(self.f1_label)

    def describe(self) -> str:
        shares = Counter(self.train.labels)
        labels = ", ".join(f"{name} {shares[i] / len(self.train):.0%}" for i, name in enumerate(self.label_names))
        return f"{self.name}: {len(self.train):,} training rows ({labels}), {len(self.validation):,} validation rows"


def is_generated(config: DatasetConfig) -> bool:
    """Whether the task is made by the package, from no file."""
    return config.path is None and config.name in (EMBEDDED, EMBEDDED_WORD_PROBLEMS)


def is_word_problems(config: DatasetConfig) -> bool:
    """Whether a `dataset` section names word problems, else labelled texts."""
    if config.task == "auto":
        return config.name in (GSM8K, EMBEDDED_WORD_PROBLEMS)
    return config.task == "word-problems"


class LabelIndex:
    """Label names to numbers. Takes a name, or a name's number if no name is itself a number."""

    MISSING = (None, "", "-", "-1")
    """What datasets write where there is no gold label."""

    def __init__(self, names: tuple[str, ...], take_numbers: bool = True) -> None:
        self.names = names
        self._numbers = {name: i for i, name in enumerate(names)}
        if take_numbers and not any(map(_is_whole_number, names)):
            self._numbers |= {str(i): i for i in range(len(names))}

    @classmethod
    def from_values(cls, values: set[str]) -> LabelIndex:
        """Labels found in training data, sorted; whole numbers by value. Their order is nobody's
        numbering, so that a number does not stand for a name."""
        key: Callable = int if all(map(_is_whole_number, values)) else str
        return cls(tuple(sorted(values, key=key)), take_numbers=False)

    def __call__(self, value: str) -> int | None:
        return self._numbers.get(value)


def _is_whole_number(name: str) -> bool:
    return re.fullmatch(r"-?[0-9]+", name) is not None
