"""The sections of a run file, as frozen dataclasses. Nothing here imports torch or pydantic.

Sections of components are in methods.py, schedules.py, optimizers.py, trackers.py and tasks.py, beside the registry of
each family. A component receives only its own section. The docstring under a field is its documentation and appears in
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
    """nf4 stores a causal language model's frozen weights in 4 bits. It needs the package bitsandbytes."""
    fast_layers: bool = True
    """On a CPU, compute norms, attention, gated MLPs and dropout in fewer passes, where a check finds them equal to the
    model's own. On any device, compute the last layer only for the token that the head reads. off uses transformers'
    own layers."""
    check: bool = True
    """Before training, check on a few rows that batching, decoding, token ids and positions work with the model. off
    skips it."""


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Columns by name. By number, from 0, in a table without a header line."""

    __pydantic_config__ = STRICT_KEYS

    text: str | NonNegativeInt | None = None
    """Column of the text, a pair's first text, the question, the words, or a conversation's messages. When absent, it
    is found by the usual names."""
    text_pair: str | NonNegativeInt | None = None
    """Column of a pair's second text, a question's second half, or an instruction's input."""
    label: str | NonNegativeInt | list[str | NonNegativeInt] | None = None
    """Column of the label, the score, the words' tags, or the answer to a question. For several labels per text, a list
    of columns with zeros and ones."""


@dataclass(frozen=True, kw_only=True)
@with_sections(TASKS)
class DatasetConfig:
    __pydantic_config__ = STRICT_KEYS

    name: str = "local"
    """A dataset that the package knows, such as `mnli`, `conll2003` or `gsm8k`; a dataset of the hub, `owner/name`; or
    any name if `path` is set."""
    task: Annotated[str, OneOf(TASKS, also=("auto",))] = "auto"
    """Kind of task. auto: decided by the dataset's name, else by its rows, which the run reports."""
    config: str | None = None
    """Configuration of a hub dataset that has several, or a configuration's folder in a clone of the dataset."""
    revision: str = "main"
    """Branch, tag or commit of a hub dataset; for a GLUE task, of nyu-mll/glue."""
    train_split: str | None = None
    """Split of a hub dataset to train on; `train` when absent."""
    validation_split: str | None = None
    """Split of a hub dataset to choose the best weights on. When absent, `validation`, `dev` and the like are found,
    but never `test`. If there is none, `validation_fraction` of the training rows is held out."""
    path: str | None = None
    """A file, or a folder with train.* and dev.* (val.*, validation.*, ...) files, or shards of them, in jsonl, json,
    csv, tsv or parquet. A test.* with labels is scored once, at the end. For word problems train.* and an optional
    test.*."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    labels: list[str] | None = None
    """Label names in the order of their numbers. When absent, the dataset's own class names, or those in the training
    data."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A malformed row stops the run (error), or is skipped and counted (skip)."""
    validation_fraction: Annotated[float, Range(gt=0, lt=1)] = 0.1
    """Share of the training rows to hold out if there is no validation split, stratified by class. Held-out rows share
    no text with training rows, as far as the data allow."""
    max_length: Annotated[int, Range(ge=8, lt=2**31)] = 256
    """Longest sequence in tokens. A longer text is truncated, a longer word problem is left out of training; both are
    counted. A longer sentence with tagged words is read in several windows."""
    cache_tokens: bool = True
    """Cache token ids on disk, keyed by rows and tokenizer, and memory-map them the next time."""
    cut: Literal["longest", "text", "text_pair"] = "longest"
    """Which text of a pair is truncated if the pair is too long."""
    scheme: Literal["auto", "iob1", "iob2", "iobes", "bilou"] = "auto"
    """Tagged words: scheme by which tags mark where an entity begins. auto: inferred from the tags, and reported."""
    template: str | None = None
    """Conversations: chatml, alpaca or plain, or a Jinja file; the model's own chat template when absent."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Conversations: which tokens are trained on. All that the assistant says, its last answer only, or every token."""
    overflow: Literal["drop", "truncate_left", "split"] = "drop"
    """Conversations of more than max_length tokens are left out, lose their beginning, or become several rows. Each is
    counted."""
    packing: bool = False
    """Conversations: pack several into a row of max_length tokens, separated by their positions, if the model attends
    within them only. training.batch_size then counts packed rows."""
    held_out: PositiveInt = 512
    """Word problems: number of training rows to hold out for tuning and for choosing the best weights, the same for
    every seed. The test split is scored once, at the end."""
    prompt: Annotated[str, Parsed(check_prompt)] = "Question: {question}\nAnswer:"
    """Word problems: the prompt, with {question} in it once."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    __pydantic_config__ = STRICT_KEYS

    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step."""
    micro_batch_tokens: PositiveIntOrAuto = "auto"
    """Most padded tokens in one forward pass. Gradients of a larger batch are accumulated. auto: chosen for the device,
    and reported. A number that exceeds the free memory is lowered."""
    sampling: Literal["group_by_length", "random"] = "group_by_length"
    """Which rows share a batch: rows of similar length, or random ones."""
    padding: Literal["auto", "padded", "none"] = "auto"
    """padded: rows are padded to the longest of their micro-batch. none: rows are concatenated without padding, and
    attention stays within a row; models not known to support this are padded, which is reported. auto: none where it
    pays, by the share of padding and the device."""
    checkpoint_layers: SwitchOrAuto = "auto"
    """Activation checkpointing: keep only each layer's input, and recompute the rest in the backward pass. A third more
    compute for a fraction of the memory. auto: if the longest row does not fit otherwise."""
    shard_base: bool = False
    """On several ranks, for a base model that does not fit one device: each rank holds a shard of the frozen layers'
    weights, and a layer is gathered for its pass (FSDP2). off: every rank holds the whole base."""
    cuda_graphs: Annotated[Literal["off", "auto"], OrOff()] = "off"
    """auto: on a GPU, capture a whole step for each of a few batch shapes, and replay it as one launch. A run that
    cannot be captured launches each operation, and reports why."""
    epochs: PositiveFloat = 3.0
    """Passes over the data when no budget is given."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """dtype of frozen weights and activations; adapters, gradients and moments are fp32. auto: bf16 on a GPU that
    supports it, and on a CPU where matrix products of the model's shape are measured to be faster in it, else fp32."""
    checkpoint_steps: PositiveInt = 500
    """Steps between checkpoints."""
    seed: Annotated[int, Range(ge=0, lt=2**32)] = 42
    """Seed of the initial weights, the data order and dropout."""
    cache_prefix: bool | Literal["fp16"] = False
    """Adapters on upper layers only: cache each training row's hidden states below the first adapter in a file, in fp32
    or fp16, so that the lower layers run once per row. It changes the method: they have no dropout."""
    fit_head: bool = False
    """Classification, tagging and regression: before the first step, fit the head's output layer in closed form on the
    frozen model's features of 2,048 training rows, instead of starting from random weights (arXiv:2202.10054). Its time
    counts against the budget."""
    threads: NonNegativeInt = 0
    """CPU threads; 0 keeps torch's default."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    __pydantic_config__ = STRICT_KEYS

    every: Annotated[str, Parsed(parse_interval)] = "auto"
    """`20%` of the budget, `500steps`, `60s`, `epoch`, or `end` for the final one only. auto: every 20 %; if those
    before the end would take over a tenth of a budget in seconds or joules, on a sample of the rows, or less often."""
    max_examples: NonNegativeInt = 0
    """Evaluate on this many validation rows, a random sample that is the same for every seed; 0 takes all."""
    batch_tokens: PositiveIntOrAuto = "auto"
    """Most padded tokens in one evaluation batch; for word problems, the longest answers included. auto and numbers
    work as in training.micro_batch_tokens."""
    threshold: Annotated[float, Range(gt=0, lt=1)] = 0.5
    """Several labels per text: probability from which a label is predicted. The export keeps it."""
    max_test_examples: NonNegativeInt = 0
    """Score this many rows of the test split, sampled in the same way, once, at the end; 0 takes all."""
    samples: NonNegativeInt = 3
    """Conversations: at each evaluation, answer this many held-out prompts, always the same, and log the answers."""
    exact_match: Annotated[Literal["auto", "off", "boxed", "number"], OrOff()] = "auto"
    """Conversations: decode an answer to each held-out prompt, and compare its last \\boxed, or the number after its
    ####, with the reference's. auto: if the references have one."""
    max_new_tokens: PositiveInt = 256
    """Word problems and conversations: longest answer in tokens. An answer that is cut off is scored as it is."""
    calculator: bool = False
    """Word problems: while decoding, compute the result of each calculator annotation `<<48/2=` (arXiv:2110.14168)."""
    pass_at: NonNegativeInt = 0
    """Word problems: also report pass@k of the test split for this k (arXiv:2107.03374); 0 reports none."""
    num_samples: NonNegativeInt = 0
    """Samples per problem for pass@k; at least k are drawn."""
    temperature: PositiveFloat = 0.7
    """Temperature of those samples."""
    top_p: Annotated[float, Range(gt=0, le=1)] = 0.95
    """Nucleus of those samples: draw from the likeliest tokens that together have this probability."""


@dataclass(frozen=True, kw_only=True)
class StandInConfig:
    """Small model and data that a run uses, with a warning, if its own cannot be reached."""

    __pydantic_config__ = STRICT_KEYS

    model: str
    """Name of a small model shipped with the package."""
    dataset: str
    """Name of a generated task."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings for the small model, by dotted key."""


@dataclass(frozen=True, kw_only=True)
@with_sections(METHODS, after="adapter")
@with_sections(TRACKERS, after="optuna")
class RunConfig:
    """One run. `extends: NAME` in a file inherits another run's values."""

    __pydantic_config__ = STRICT_KEYS

    run_id: Annotated[str, Parsed(check_run_id)]
    """Name of this configuration. Without --name, a run is named after it and the time."""
    method: Annotated[str, OneOf(METHODS)]
    """lora, rslora (scaled by alpha / sqrt(rank)), iw_lora, adalora; unihyperlora, sat_lora and hf_sat_lora share atoms
    between matrices; full trains every weight."""
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    budget: Annotated[str, Parsed(parse_budget)] | None = None
    """What the run may spend: 90s, 30m, 2h, 2000steps, 5Mtok or 50kJ. When absent, training.epochs decides."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    optuna: OptunaConfig = field(default_factory=OptunaConfig)
    stand_in: StandInConfig | None = None
    """Used only if no override changes the file's model or dataset."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """The user's overrides of the file, by dotted key. Written by `fastpeft train`."""


FAMILIES: tuple[Registry[Any], ...] = (TASKS, METHODS, SCHEDULES, OPTIMIZERS, TRACKERS)
