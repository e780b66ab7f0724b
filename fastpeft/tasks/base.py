"""The interface of a kind of task: reading its rows, training, scoring, and the facts for an export.

A new kind takes a folder in fastpeft/tasks with a Task, an entry in config/tasks.py, and a preset. The trainer, the
export and the comparison depend on this interface only, and on no kind.
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
"""Called with the rows and the width of an evaluation batch that ran out of memory; returns a smaller token limit."""
Count = int | torch.Tensor
"""Number of items; a scalar on the device if the step is captured and replayed with other batches."""
Rows = TypeVar("Rows", bound=TokenRows)
"""The type of a kind's encoded splits."""


@dataclass
class BatchLoss:
    loss: torch.Tensor
    """Scalar with a gradient: the sum over the micro-batch's items, divided by the number of items of the batch."""
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars by the names of signals.Measured. The values of all micro-batches add up to the mean of the batch."""


class Sample(NamedTuple):
    """A model's answer to one of a few fixed prompts, the same in every evaluation."""

    prompt: str
    answer: str
    reference: str


class FirstRows(NamedTuple):
    rows: list[list[Piece]]
    notes: tuple[str, ...]
    """Messages about these rows only."""


class Piece(NamedTuple):
    """A part of a row, as text."""

    text: str
    is_learned: bool
    """True if the loss includes it; False if it is context only."""


@dataclass(frozen=True)
class Score:
    value: float
    """The task's metric; higher is better."""
    loss: float
    """Mean loss per item, in the unit of the loss."""
    num_rows: int
    more: dict[str, float] = field(default_factory=dict)
    """Further metrics by name; runs.store.MAJORITY is the score of an answer that does not depend on the row."""
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of subsets of the data by name, such as precision, recall and f1 of an entity type."""
    decode_s: float | None = None
    """Seconds spent decoding, if answers are decoded. They count towards the budget."""
    decode_tokens: int | None = None
    samples: tuple[Sample, ...] = ()
    answered: Callable[[], AnsweredRows | None] = field(default=lambda: None, compare=False, repr=False)
    """Computes every scored row with its answer, in order; returns None if the kind does not support it."""


class ExportCheck(ABC):
    """Comparison of the trained and the exported model: logits on a sample of validation rows, and the score of all."""

    where: str
    """Noun for the unit that a logit belongs to, printed after a number."""
    metric: str
    """Name of the metric that `score` returns."""
    max_length: int
    """Maximum row length, in tokens."""
    num_validation: int

    @abstractmethod
    def answers(self, model: nn.Module, tokenizer: Any, device: torch.device) -> torch.Tensor:
        """Logits on a fixed sample, tokenised by `tokenizer`: (N, classes), fp32, on the CPU."""

    @abstractmethod
    def score(self, model: nn.Module, device: torch.device) -> float:
        """`metric` over all validation rows."""


class OtherSet(ABC):
    """Rows of a further file on which a trained model is scored."""

    def __init__(self, source: str, num_skipped: int, notes: list[str]) -> None:
        self.source, self.num_skipped, self.notes = source, num_skipped, notes

    @abstractmethod
    def load_model(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, trained: bool) -> Backbone:
        """As Task.load_model."""

    @abstractmethod
    def encode(self, backbone: Backbone) -> None:
        """Raises UserError for rows that the model does not support."""

    @abstractmethod
    def check(self, model: nn.Module, backbone: Backbone) -> None:
        """As Task.check, for the assumptions of scoring."""

    @abstractmethod
    def score(self, model: nn.Module, limits: TokenLimits, shrink: Shrink) -> Score: ...

    @abstractmethod
    def try_scoring(self, model: nn.Module, limits: TokenLimits) -> None:
        """As Task.try_evaluation."""

    @abstractmethod
    def largest_batch(self, limits: TokenLimits) -> tuple[int, int]:
        """As Task.largest_evaluation_batch."""


class Task(ABC, Generic[Rows]):
    """One kind of task with its data. `load` reads the rows; `encode` tokenises them for a model."""

    kind: ClassVar[str]
    """Its name in dataset.task."""
    auto_class: ClassVar[str]
    """The class of transformers that loads its models."""
    peft_task_type: ClassVar[str]
    pipeline_tag: ClassVar[str]
    """The hub's pipeline tag."""
    datasets: ClassVar[Mapping[str, KnownDataset]] = {}
    """Datasets with built-in settings, by name."""
    predicts_tokens: ClassVar[bool] = False
    """True if the targets are tokens of the rows, as in language modelling."""
    scores_other_sets: ClassVar[bool] = False
    """True if `read_set` is implemented, so that a trained model can be scored on further files."""

    name: str
    """Name of the dataset."""
    metric: str
    notes: list[str]
    """Messages for the user on how the data were read and encoded."""
    label_names: tuple[str, ...] = ()
    train: Rows
    validation: Rows
    has_test: bool = False
    """True if there is a test split, which is scored once, at the end."""
    test_cost: float = 0.0
    """Cost of scoring the test split, relative to an evaluation."""

    # ---- data ------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, config: DatasetConfig, source: Source) -> str | None:
        """Why the training rows are of this kind, if dataset.task does not say; None if they are not."""
        return None

    @classmethod
    @abstractmethod
    def load(cls, config: DatasetConfig, source: Source, evaluation: EvaluationConfig, seed: int) -> Self:
        """Read the rows.

        Args:
            seed: seed of the random choices of an evaluation.

        Raises:
            DataError: a missing split or column, a malformed row, unusable labels.
        """

    @abstractmethod
    def describe(self) -> str:
        """Description of the data in one line."""

    @abstractmethod
    def rows_read(self) -> dict[str, Iterable[ReadRow]]:
        """Every row of each split, in order, before rows are left out of an evaluation."""

    @abstractmethod
    def specimen(self) -> list[dict[str, Any]]:
        """Three or more made-up rows in the form that `load` reads, with the usual column names. A task loaded from
        them has this task's labels, which is all that an export needs if the data are missing."""

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
        """The first training rows, split into context and learned parts.

        Args:
            tokenizer: tokenizer of `model`.
        """
        rows = islice(iter(self.rows_read()[TRAIN]), count)
        return FirstRows([[Piece(" ".join(row.given), False), Piece(" ".join(row.wanted), True)] for row in rows], ())

    def warnings(self) -> list[str]:
        """Warnings about unreliable scores or suspicious labels."""
        return []

    # ---- model and tokens ------------------------------------------------------------------

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the task's head on an encoder."""
        return len(self.label_names)

    def load_model(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, trained: bool = False
    ) -> Backbone:
        """The pretrained model with a head for this task: here an encoder with a head of `num_outputs`.

        Raises:
            UnavailableError: the folder or repository holds no usable model.
            UserError: settings that this task does not support.
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
        """Set `train`, `validation` and the encoded test split, once, before training. Adds to `notes`.

        Raises:
            UserError: rows that the model does not support.
        """

    @abstractmethod
    def check(self, model: nn.Module, backbone: Backbone) -> None:
        """Check the assumptions of training and scoring about the model on a few rows, after `encode`.

        If only a slower method is exact, the task uses it from here on and says so in `notes`. Does not change the
        model or the global random state.

        Args:
            model: the backbone's model with the adapter.

        Raises:
            UserError: no method is exact for this model; the message says what differed.
        """

    def check_varlen(self, model: nn.Module, backbone: Backbone) -> str | None:
        """Check packed batches, without padding, on a few rows, after `check`.

        `collate` makes packed batches if `train.varlen` is set. Does not change the model or the global random state.

        Args:
            model: the backbone's model with the adapter, patched to accept Sequences in place of a mask
                (models.varlen).

        Returns:
            Why the model cannot use packed batches; None if each row's outputs equal those of the row alone.
        """
        return f"the task kind {self.kind} makes no such batches"

    def keep(self, folder: Path) -> None:
        """Write facts about the weights that the data do not contain, such as a chat template, beside them."""

    def recall(self, folder: Path) -> None:
        """Read what `keep` wrote, before `load_model`."""

    # ---- training --------------------------------------------------------------------------

    @abstractmethod
    def num_items(self, rows: np.ndarray) -> int:
        """Number of items that the mean loss of these training rows is taken over."""

    @abstractmethod
    def collate(self, rows: np.ndarray, device: torch.device) -> Batch:
        """Batch of these training rows on the device, padded, or packed if `train.varlen` is set."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, num_items: Count, needs: Collection[Need] = ()) -> BatchLoss:
        """Loss of a micro-batch that belongs to a batch of `num_items`."""

    # ---- evaluation ------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        """Score the validation split; None if `stop` ended it early. Does not use the global random state."""

    def evaluate_test(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        """Score the test split, if there is one."""
        raise AssertionError("this task has no test split")

    @abstractmethod
    def time_evaluation(self, model: nn.Module, limits: TokenLimits) -> float:
        """Estimated seconds of `evaluate`, from a few batches. Raises RuntimeError if out of memory."""

    @property
    @abstractmethod
    def num_validation(self) -> int:
        """Rows that an evaluation scores."""

    @abstractmethod
    def sampled(self, num_rows: int, backbone: Backbone, device: torch.device) -> Self:
        """After `encode` and `check`: this task with a sample of its validation rows, independent of the seed."""

    def try_evaluation(self, model: nn.Module, limits: TokenLimits) -> None:
        """Run the largest batch of an evaluation up to its peak of memory. `model` is in eval mode."""
        self.time_evaluation(model, limits)

    @abstractmethod
    def largest_evaluation_batch(self, limits: TokenLimits) -> tuple[int, int]:
        """Rows and width of the largest batch of the validation and test splits, which `try_evaluation` runs."""

    @classmethod
    def read_set(cls, path: Path, config: DatasetConfig, evaluation: EvaluationConfig, seed: int) -> OtherSet:
        """A file, or a folder with a test.* file, to score a trained model on.

        Raises:
            DataError: the file is missing, or a row is malformed.
        """
        raise AssertionError("this task is scored on its own splits only")

    def prompt_tokens(self, tokenizer: Any, model: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the prompt with which a trained model answers the last message. Messages have role and content.

        Raises:
            UserError: the task has no prompt for these messages.
        """
        raise UserError(f"a run of the kind {self.kind} answers no questions: only language models talk")

    # ---- export ----------------------------------------------------------------------------

    @abstractmethod
    def export_check(self, backbone: Backbone) -> ExportCheck: ...

    def load_arguments(self) -> dict[str, Any]:
        """Arguments of `auto_class.from_pretrained`, for a base model without this task's head."""
        return {}

    def model_settings(self) -> dict[str, Any]:
        """Values for a merged model's config that its users need, such as id2label."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Entries about the task in export.json and result.json, such as its label names."""
        return {"labels": list(self.label_names)} if self.label_names else {}

    @abstractmethod
    def card_task(self) -> str:
        """Short name of the task for a model card's table."""

    @abstractmethod
    def card_example(self, max_length: int, eos_token_ids: tuple[int, ...]) -> str:
        """Python code that queries the model; `model` and `tokenizer` are loaded."""

    def card_prompt(self) -> str:
        """Python code that sets `prompt` to a text for a language model to continue."""
        return 'prompt = "one text"\n'

    def card_pipeline(self) -> str:
        """How to use a merged model with transformers' pipeline, and how its answers differ from the scored ones."""
        return ""
