"""The interface of a kind of task: how its rows are read, learned and scored, and what an export says of it.

A new kind is a folder in fastpeft/tasks with a Task in it, an entry in config/tasks.py, and a preset. The trainer, the
export and the comparison know this interface and no kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import nn

from fastpeft.config.schema import DatasetConfig, EvaluationConfig, ModelConfig
from fastpeft.data.batches import Batch, TokenRows
from fastpeft.data.fingerprint import Fingerprint, ReadRow
from fastpeft.data.known import KnownDataset
from fastpeft.data.predictions import AnsweredRows
from fastpeft.data.source import TRAIN, Source
from fastpeft.device_memory import TokenLimits
from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone, load_classifier
from fastpeft.signals import Need
from fastpeft.tasks.trained_on import TrainedOn

Stop = Callable[[], bool]
Shrink = Callable[[int, int], int]
"""Told the rows and the width of an evaluation batch that ran out of memory; returns a smaller limit of tokens."""
Count = int | torch.Tensor
"""Of items; a scalar on the device where a step is captured once and replayed with other batches."""
Rows = TypeVar("Rows", bound=TokenRows)
"""What a kind's splits become by `encode`."""


@dataclass
class BatchLoss:
    loss: torch.Tensor
    """Scalar with a gradient: the sum over the micro-batch's items over the number of items of the batch."""
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars by the names of signals.Measured, as shares of the batch's mean: micro-batches add up to it."""


class Sample(NamedTuple):
    """What a model answers to one of a few prompts, the same ones at each evaluation."""

    prompt: str
    answer: str
    reference: str


class FirstRows(NamedTuple):
    rows: list[list[Piece]]
    notes: tuple[str, ...]
    """What is to be told of these rows alone."""


class Piece(NamedTuple):
    """Of a row as text."""

    text: str
    is_learned: bool
    """It is predicted from what stands before it. Else it is read."""


@dataclass(frozen=True)
class Score:
    value: float
    """The task's metric; more is better."""
    loss: float
    """Mean loss of an item, in the loss's own unit."""
    num_rows: int
    more: dict[str, float] = field(default_factory=dict)
    """Further metrics by name; under runs.store.MAJORITY what an answer that looks at no row would score."""
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of parts of the data by the part's name, such as one entity type's precision, recall and f1."""
    decode_s: float | None = None
    """Seconds spent decoding, where answers are decoded; they are on the budget's clock."""
    decode_tokens: int | None = None
    samples: tuple[Sample, ...] = ()
    answered: Callable[[], AnsweredRows | None] = field(default=lambda: None, compare=False, repr=False)
    """Every row that was scored, in order, with what was answered to it; made when called for. None where the kind does
    not tell."""


class ExportCheck(ABC):
    """A sample of validation rows that the trained and the exported model both answer, and the score of all of them."""

    where: str
    """What a logit belongs to, in words, behind a number."""
    metric: str
    """What `score` measures."""
    max_length: int
    """Tokens that rows were cut to."""
    num_validation: int

    @abstractmethod
    def answers(self, model: nn.Module, tokenizer: Any, device: torch.device) -> torch.Tensor:
        """Logits on a fixed sample, in the given tokenizer's numbers: N x classes, fp32, on the CPU."""

    @abstractmethod
    def score(self, model: nn.Module, device: torch.device) -> float:
        """`metric` over all validation rows."""


class OtherSet(ABC):
    """Rows of a file that a trained model is scored on."""

    def __init__(self, source: str, num_skipped: int, notes: list[str]) -> None:
        self.source, self.num_skipped, self.notes = source, num_skipped, notes

    @abstractmethod
    def load_model(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, trained: bool) -> Backbone:
        """As Task.load_model."""

    @abstractmethod
    def encode(self, backbone: Backbone) -> None:
        """Raises UserError for rows that the model cannot take."""

    @abstractmethod
    def check(self, model: nn.Module, backbone: Backbone) -> None:
        """As Task.check, of what scoring takes for granted."""

    @abstractmethod
    def score(self, model: nn.Module, limits: TokenLimits, shrink: Shrink) -> Score: ...

    @abstractmethod
    def try_scoring(self, model: nn.Module, limits: TokenLimits) -> None:
        """As Task.try_evaluation."""

    @abstractmethod
    def largest_batch(self, limits: TokenLimits) -> tuple[int, int]:
        """As Task.largest_evaluation_batch."""


class Task(ABC, Generic[Rows]):
    """One kind of task with its data. `load` reads the rows; `encode` makes tokens of them for a model."""

    kind: ClassVar[str]
    """As in dataset.task."""
    auto_class: ClassVar[str]
    """The class of transformers that loads a model for it."""
    peft_task_type: ClassVar[str]
    pipeline_tag: ClassVar[str]
    """Of the hub."""
    datasets: ClassVar[Mapping[str, KnownDataset]] = {}
    """Those that are known by name."""
    predicts_tokens: ClassVar[bool] = False
    """What is learned stands in the rows themselves, as with language models."""
    scores_other_sets: ClassVar[bool] = False
    """A trained model can be scored on files that it was not trained with: `read_set` is there."""

    name: str
    """Of the dataset."""
    metric: str
    notes: list[str]
    """What the user should know of how the data were read and encoded."""
    label_names: tuple[str, ...] = ()
    train: Rows
    validation: Rows
    has_test: bool = False
    """A test split is there, to be scored once, at the end."""
    test_cost: float = 0.0
    """Cost of scoring the test split, in units of an evaluation."""

    # ---- data ------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, config: DatasetConfig, source: Source) -> str | None:
        """Why the training rows are of this kind, where dataset.task leaves it open; None where they are not."""
        return None

    @classmethod
    @abstractmethod
    def load(cls, config: DatasetConfig, source: Source, evaluation: EvaluationConfig, seed: int) -> Self:
        """Read the rows.

        Args:
            seed: of what an evaluation draws.

        Raises:
            DataError: a missing split or column, a malformed row, labels that cannot be used.
        """

    @abstractmethod
    def describe(self) -> str:
        """The data in one line."""

    @abstractmethod
    def rows_read(self) -> dict[str, Iterable[ReadRow]]:
        """Every row of each split, in order, before anything is left out of an evaluation."""

    @abstractmethod
    def specimen(self) -> list[dict[str, Any]]:
        """Made-up rows, three or more, as `load` takes them with the columns' usual names. A task that is loaded from
        them says of its labels what this one says: an export needs no more, so that it can do without the data."""

    def trained_on(self) -> TrainedOn:
        """Reads every row once."""
        return TrainedOn(
            dataset=self.name,
            kind=self.kind,
            labels=self.label_names,
            data=Fingerprint.of(self.rows_read()),
            specimen=tuple(self.specimen()),
        )

    def first_rows(self, tokenizer: Any, model: str, count: int) -> FirstRows:
        """The first training rows: what is read of each, and what is learned.

        Args:
            tokenizer: of the model of this name.
        """
        rows = islice(iter(self.rows_read()[TRAIN]), count)
        return FirstRows([[Piece(" ".join(row.given), False), Piece(" ".join(row.wanted), True)] for row in rows], ())

    def warnings(self) -> list[str]:
        """What makes the scores say little, or the labels look wrong."""
        return []

    # ---- model and tokens ------------------------------------------------------------------

    @property
    def num_outputs(self) -> int:
        """Of the head that the task puts on an encoder."""
        return len(self.label_names)

    def load_model(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, trained: bool = False
    ) -> Backbone:
        """The pretrained model with a head for this task: here an encoder with a head of `num_outputs`.

        Raises:
            UnavailableError: a folder or repository that holds no usable model.
            UserError: settings that do not go with this task.
        """
        return load_classifier(
            config,
            auto_class=self.auto_class,
            task_type=self.peft_task_type,
            settings=self.model_settings() | {"num_labels": self.num_outputs},
            dtype=dtype,
            device=device,
            trained=trained,
        )

    @abstractmethod
    def encode(self, backbone: Backbone, device: torch.device) -> None:
        """Set `train`, `validation` and what a test needs, once, before training. Adds to `notes`.

        Raises:
            UserError: rows that the model cannot take.
        """

    @abstractmethod
    def check(self, model: nn.Module, backbone: Backbone) -> None:
        """Try on a few rows, after `encode`, that the model does with them what training and scoring take for granted.

        Where a slower way is exact, the task goes that way from here on and says so in `notes`. Leaves the model and
        global random numbers as they were.

        Args:
            model: the backbone's, with the adapter in it.

        Raises:
            UserError: a model that no way is right for, and what differed.
        """

    def check_varlen(self, model: nn.Module, backbone: Backbone) -> str | None:
        """Try on a few rows, after `check`, what training would make of them one behind another, without padding.

        `collate` makes such batches where `train.varlen` is set. Leaves the model and global random numbers as they
        were.

        Args:
            model: the backbone's, with the adapter in it, which takes Sequences in place of a mask (models.varlen).

        Returns:
            Why it is not to be, in words; None where each row's outputs are those that it has alone.
        """
        return f"the task kind {self.kind} makes no such batches"

    def keep(self, folder: Path) -> None:
        """Write beside the weights what they mean and no data tell, such as a chat template."""

    def recall(self, folder: Path) -> None:
        """Go by what `keep` wrote there, before `load_model`."""

    # ---- training --------------------------------------------------------------------------

    @abstractmethod
    def num_items(self, rows: np.ndarray) -> int:
        """What the loss of a batch of these training rows is a mean over."""

    @abstractmethod
    def collate(self, rows: np.ndarray, device: torch.device) -> Batch:
        """These training rows, padded, on the device."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, num_items: Count, needs: Collection[Need] = ()) -> BatchLoss:
        """Of a micro-batch of a batch of `num_items`."""

    # ---- evaluation ------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        """Score the validation split; None if `stop` said so before the end. Draws no global random numbers."""

    def evaluate_test(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        """Score the test split, where there is one."""
        raise AssertionError("this task has no test split")

    @abstractmethod
    def time_evaluation(self, model: nn.Module, limits: TokenLimits) -> float:
        """Seconds that `evaluate` is expected to take, from a few batches. RuntimeError where the memory is short."""

    @property
    @abstractmethod
    def num_validation(self) -> int:
        """Rows that an evaluation scores."""

    @abstractmethod
    def sampled(self, num_rows: int, backbone: Backbone, device: torch.device) -> Self:
        """After `encode` and `check`: this task with a sample of its validation rows, the same whatever the seed."""

    def try_evaluation(self, model: nn.Module, limits: TokenLimits) -> None:
        """Take the largest batch of an evaluation as far as it takes to need all of its memory. `model` evaluates."""
        self.time_evaluation(model, limits)

    @abstractmethod
    def largest_evaluation_batch(self, limits: TokenLimits) -> tuple[int, int]:
        """Rows and width of the batch that `try_evaluation` takes: of the validation and the test split the largest."""

    @classmethod
    def read_set(cls, path: Path, config: DatasetConfig, evaluation: EvaluationConfig, seed: int) -> OtherSet:
        """A file, or a folder with a test.* file, to score a trained model on.

        Raises:
            DataError: no such file, a malformed row.
        """
        raise AssertionError("this task is scored on its own splits only")

    def prompt_tokens(self, tokenizer: Any, model: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """What a trained model is given to answer the last of the messages, each with role and content.

        Raises:
            UserError: messages that the task has no prompt for.
        """
        raise UserError(f"a run of the kind {self.kind} answers no questions: only language models talk")

    # ---- export ----------------------------------------------------------------------------

    @abstractmethod
    def export_check(self, backbone: Backbone) -> ExportCheck: ...

    def load_arguments(self) -> dict[str, Any]:
        """Of `auto_class.from_pretrained`, for a base model without this task's head."""
        return {}

    def model_settings(self) -> dict[str, Any]:
        """Of a merged model's config: what a reader has to find there, such as id2label."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What export.json and result.json say of the task, such as its label names."""
        return {"labels": list(self.label_names)} if self.label_names else {}

    @abstractmethod
    def card_task(self) -> str:
        """The task in a few words, for a model card's table."""

    @abstractmethod
    def card_example(self, max_length: int, eos_token_ids: tuple[int, ...]) -> str:
        """Python that asks the model something; `model` and `tokenizer` are loaded."""

    def card_prompt(self) -> str:
        """Python that sets `prompt` to a text that a language model is to continue."""
        return 'prompt = "one text"\n'

    def card_pipeline(self) -> str:
        """How transformers' own pipeline answers from a merged model, and where that is not as it was scored."""
        return ""
