"""The sections of a run file, as frozen dataclasses. Nothing here imports torch or pydantic.

Those of a family's members are in methods.py, schedules.py, optimizers.py, trackers.py and tasks.py, beside the
family's table. A component takes its own section only. The docstring under a field is its documentation and appears in
`fastpeft runs schema`. Validation is in load.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastpeft.config.fields import (
    STRICT_KEYS,
    NonNegativeInt,
    OneOf,
    OrOff,
    Parsed,
    PositiveFloat,
    PositiveInt,
    PositiveIntOrAuto,
    Range,
    SwitchOrAuto,
)
from fastpeft.config.methods import METHODS, AdapterConfig
from fastpeft.config.optimizers import OPTIMIZERS, OptimizerConfig
from fastpeft.config.registry import Registry, with_sections
from fastpeft.config.schedules import SCHEDULES, ScheduleConfig
from fastpeft.config.search import OptunaConfig
from fastpeft.config.tasks import TASKS
from fastpeft.config.trackers import TRACKERS
from fastpeft.config.units import parse_budget, parse_interval


def check_run_id(text: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise ValueError(
            f"{text!r} cannot begin a folder's name; write letters, digits, '.', '_' and '-', at most 100 of them, "
            "and a letter or a digit first"
        )


def check_prompt(text: str) -> None:
    if text.count("{question}") != 1:
        raise ValueError(f"expected {{question}} once, where the question goes, got {text!r}; in YAML quote it")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    __pydantic_config__ = STRICT_KEYS

    name: str
    """A local folder, or a Hugging Face model name. Code from a repository is never run."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""
    quantisation: Literal["none", "nf4"] = "none"
    """nf4 holds a causal language model's frozen weights in 4 bits; needs the package bitsandbytes."""
    fast_layers: bool = True
    """On a CPU: compute norms, attention, gated networks and dropout in fewer passes, where the model's own forms are
    tried and found equal. off takes transformers' own. On any device: the last layer for the token that the head reads
    alone."""
    check: bool = True
    """Before training, try on a few rows that batches, decoding, token numbers and positions suit the model. off skips
    it."""


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Columns by name; by number, from 0, in a table whose first line is a row and no header."""

    __pydantic_config__ = STRICT_KEYS

    text: str | NonNegativeInt | None = None
    """Column of the text, of a pair's first text, of the question, of the words, or of a conversation's messages.
    Guessed from the usual names when absent."""
    text_pair: str | NonNegativeInt | None = None
    """Column of a pair's second text, of a question's second half, or of what an instruction is about."""
    label: str | NonNegativeInt | list[str | NonNegativeInt] | None = None
    """Column of the label, of the score, of the words' tags, or of the answer to a question. A list: one column of
    zeros and ones for each of several labels."""


@dataclass(frozen=True, kw_only=True)
@with_sections(TASKS)
class DatasetConfig:
    __pydantic_config__ = STRICT_KEYS

    name: str = "local"
    """A dataset the package knows, such as `mnli`, `conll2003` or `gsm8k`; a dataset of the hub, `owner/name`; or any
    name when `path` is given."""
    task: Annotated[str, OneOf(TASKS, also=("auto",))] = "auto"
    """What the rows are. auto: what the name says, or else the rows, which the run then says."""
    config: str | None = None
    """Configuration of a hub dataset that has several, or the folder of one in a clone of it."""
    revision: str = "main"
    """Branch, tag or commit of a hub dataset; of nyu-mll/glue for a GLUE task."""
    train_split: str | None = None
    """Split of a hub dataset to train on; `train` when absent."""
    validation_split: str | None = None
    """Split of a hub dataset to choose weights on. `validation`, `dev` and the like are found; `test` is one only
    when named here. Where there is none, `validation_fraction` of the rows is held out."""
    path: str | None = None
    """A file, or a folder that holds train.* and dev.* (val.*, validation.*, ...) files, or shards of them, in jsonl,
    json, csv, tsv or parquet. A test.* with labels is scored once, at the end. Of word problems, train.* and
    test.*, the latter optional."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    labels: list[str] | None = None
    """Label names in the order of their numbers; taken from the dataset's own class names, or from
    the training data, when absent."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A malformed row stops the run, or is skipped and counted."""
    validation_fraction: Annotated[float, Range(gt=0, lt=1)] = 0.1
    """Share of the training rows held out where there is no validation split. No text of them is trained on, and each
    class has its share."""
    max_length: Annotated[int, Range(ge=8, lt=2**31)] = 256
    """Longest sequence in tokens. A longer text is cut, a longer word problem is left out of training; both are
    counted. A longer sentence with tagged words is read in several windows."""
    cache_tokens: bool = True
    """Keep the tokens in the user's cache, by the rows and the tokenizer that they come from, and read them from there
    the next time, page by page."""
    cut: Literal["longest", "text", "text_pair"] = "longest"
    """Of a pair that is too long, which text gives way."""
    scheme: Literal["auto", "iob1", "iob2", "iobes", "bilou"] = "auto"
    """Of tagged words: how tags mark where an entity begins. auto: told from the tags, and said."""
    template: str | None = None
    """Conversations: chatml, alpaca or plain, or a Jinja file; the model's own chat template when absent."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Conversations: what is learned. Everything that the assistant says, its last answer alone, or every token."""
    overflow: Literal["drop", "truncate_left", "split"] = "drop"
    """Conversations of more than max_length tokens are left out, lose their beginning, or become several rows; each is
    counted."""
    packing: bool = False
    """Conversations: put several into a row of max_length tokens, kept apart by their positions, where the model keeps
    them apart. A row of training.batch_size is then a full one."""
    held_out: PositiveInt = 512
    """Word problems: training rows that are held out, the same ones whatever the seed, to tune and to choose
    the best weights on. The test split is scored once, at the end."""
    prompt: Annotated[str, Parsed(check_prompt)] = "Question: {question}\nAnswer:"
    """Word problems: what the model reads before it answers, with {question} in it once."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    __pydantic_config__ = STRICT_KEYS

    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    batch_size: PositiveInt = 32
    """Sequences an optimizer step."""
    micro_batch_tokens: PositiveIntOrAuto = "auto"
    """Most padded tokens in one forward pass; a larger batch is accumulated. auto: as many as suit the device, which
    the run says. No number makes a pass larger than the memory that is free."""
    sampling: Literal["group_by_length", "random"] = "group_by_length"
    """Which rows share a batch: rows of nearly one length, or any."""
    padding: Literal["auto", "padded", "none"] = "auto"
    """padded: rows are padded to the longest of their micro-batch. none: they lie one behind another, without padding,
    and attention stays within a row; models that are not known to take that are padded, which the run says. auto: none
    where it pays, by the share of padding and the device."""
    checkpoint_layers: SwitchOrAuto = "auto"
    """Keep of each layer its input alone, and compute the rest again in the backward pass: a third more work for a
    fraction of the memory. auto: where the longest row does not fit otherwise."""
    shard_base: bool = False
    """On several ranks, for a base that does not fit one device: each holds a part of the frozen layers' weights, and a
    layer's are gathered for its pass (FSDP2). off: every rank has the whole base."""
    cuda_graphs: Annotated[Literal["off", "auto"], OrOff()] = "off"
    """auto: on a GPU a whole step is captured once for each of a few shapes of batches, and replayed as one launch. A
    run that cannot be captured launches each operation, and says why."""
    epochs: PositiveFloat = 3.0
    """Passes over the data when no budget is given."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the frozen weights and activations; adapters, gradients and moments are fp32. auto: bf16 on a GPU that has it,
    and on a CPU where products of the model's shape are measured to be faster in it, else fp32."""
    checkpoint_steps: PositiveInt = 500
    """Steps between checkpoints."""
    seed: Annotated[int, Range(ge=0, lt=2**32)] = 42
    """Of the initial weights, the data order and dropout."""
    cache_prefix: bool | Literal["fp16"] = False
    """Adapters on upper layers only: keep in a file, in fp32 or in fp16, what the layers below make of each training
    row, and compute these layers once a row. It changes the method: below the first adapter there is no dropout."""
    fit_head: bool = False
    """Of classifiers, tags and scores: before the first step, fit the head's output layer in closed form to what the
    frozen model makes of 2,048 training rows, where it would begin with drawn weights (arXiv:2202.10054). The budget
    pays for it."""
    threads: NonNegativeInt = 0
    """CPU threads; 0 leaves torch's choice."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    __pydantic_config__ = STRICT_KEYS

    every: Annotated[str, Parsed(parse_interval)] = "auto"
    """`20%` of the budget, `500steps`, `60s`, `epoch`, or `end` for the final one only. auto: every 20 %; where those
    before the end would take over a tenth of a budget in seconds or joules, on a sample of the rows, or fewer."""
    max_examples: NonNegativeInt = 0
    """Evaluate on this many validation rows, drawn at random, the same ones for every seed; 0 takes all."""
    batch_tokens: PositiveIntOrAuto = "auto"
    """Most padded tokens in one evaluation batch; of word problems, with the answers' longest. auto and a number: as
    training.micro_batch_tokens."""
    threshold: Annotated[float, Range(gt=0, lt=1)] = 0.5
    """Several labels a text: the probability from which a label is given; kept in the export."""
    max_test_examples: NonNegativeInt = 0
    """Score this many rows of the test split, drawn likewise, once, at the end; 0 takes all."""
    samples: NonNegativeInt = 3
    """Conversations: answer this many held-out prompts, the same ones each time, and write the answers to the log."""
    exact_match: Annotated[Literal["auto", "off", "boxed", "number"], OrOff()] = "auto"
    """Conversations: decode an answer to each held-out prompt and compare its last \\boxed, or the number behind its
    ####, with the reference's. auto: where the references have one."""
    max_new_tokens: PositiveInt = 256
    """Word problems and conversations: longest answer in tokens; one without an end by then counts as it stands."""
    calculator: bool = False
    """Word problems: while decoding, compute the result of each calculator note `<<48/2=` as in arXiv:2110.14168."""
    pass_at: NonNegativeInt = 0
    """Word problems: also report pass@k of the test split for this k (arXiv:2107.03374); 0: not."""
    num_samples: NonNegativeInt = 0
    """Samples a problem for pass@k; at least k are drawn."""
    temperature: PositiveFloat = 0.7
    """Of those samples."""
    top_p: Annotated[float, Range(gt=0, le=1)] = 0.95
    """Of those samples: draw from the likeliest tokens that together have this probability."""


@dataclass(frozen=True, kw_only=True)
class StandInConfig:
    """What a run uses, said loudly, when its model and data cannot be reached."""

    __pydantic_config__ = STRICT_KEYS

    model: str
    """Name of a small model shipped with the package."""
    dataset: str
    """Name of a generated task."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Dotted keys that suit the small model."""


@dataclass(frozen=True, kw_only=True)
@with_sections(METHODS, after="adapter")
@with_sections(TRACKERS, after="optuna")
class RunConfig:
    """One run. `extends: NAME` in a file inherits another run's values."""

    __pydantic_config__ = STRICT_KEYS

    run_id: Annotated[str, Parsed(check_run_id)]
    """Name of the run's kind; the default for --name, followed by the time."""
    method: Annotated[str, OneOf(METHODS)]
    """lora, rslora (alpha / sqrt(rank) as the scale), iw_lora, adalora; unihyperlora, sat_lora and hf_sat_lora share
    atoms between matrices; full trains every weight."""
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    budget: Annotated[str, Parsed(parse_budget)] | None = None
    """90s, 30m, 2h, 2000steps, 5Mtok, 50kJ; without one, training.epochs decides."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    optuna: OptunaConfig = field(default_factory=OptunaConfig)
    stand_in: StandInConfig | None = None
    """Applies only while the names of model and dataset are the file's own."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """What the user set over the file, by dotted key; written by `fastpeft train`."""


FAMILIES: tuple[Registry[Any], ...] = (TASKS, METHODS, SCHEDULES, OPTIMIZERS, TRACKERS)
