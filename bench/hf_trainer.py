"""Training of a run's rows, model and settings with Hugging Face's Trainer and PEFT, as in their documentation."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastpeft.config import RunConfig
from fastpeft.data.batches import IGNORE
from fastpeft.models.precision import DTYPES
from fastpeft.models.targets import match_targets
from fastpeft.tasks import Task, load_task
from fastpeft.tasks.regression.task import Regression
from fastpeft.tasks.sequences.examples import Examples
from fastpeft.tasks.sequences.scoring import Answers
from fastpeft.tasks.sequences.task import SequenceTask
from fastpeft.tasks.token_classification.score import score_entities
from fastpeft.tasks.token_classification.sentences import Sentences
from fastpeft.tasks.token_classification.task import TokenClassification

_CUT = {"longest": True, "text": "only_first", "text_pair": "only_second"}
_FIRST_WORDS = "words"
"""Column with the word index of each labelled token, which is the word's first."""


@dataclass(frozen=True)
class Trained:
    value: float
    """The task's metric on the validation rows."""
    test: float | None
    """The same metric on the test rows; None without test rows."""
    steps: int
    train_s: float
    """Seconds of the training loop, without loading, tokenising and evaluation."""


def train_with_trainer(run: RunConfig, sampling: str = "random") -> Trained:
    """Train on the rows that the run reads, tokenised and batched by transformers.

    Args:
        sampling: train_sampling_strategy of TrainingArguments.

    Raises:
        AssertionError: the task's metric differs from that of seqeval, scipy or a plain mean on the same predictions.
    """
    import transformers

    task = load_task(run.dataset, run.evaluation, run.training.seed)
    assert isinstance(task, (SequenceTask, TokenClassification)), f"no rows of a Trainer for {task.kind}"
    transformers.set_seed(run.training.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model.name)
    model = with_lora(load_model(task, run), task, run)
    if isinstance(task, TokenClassification):
        splits = _TaggedRows(task, tokenizer, run)
        collator: Any = transformers.DataCollatorForTokenClassification(tokenizer)
    else:
        splits = _TextRows(task, tokenizer, run)
        collator = transformers.DataCollatorWithPadding(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=_arguments(run, Path(folder), sampling),
            train_dataset=splits.train,
            data_collator=collator,
            processing_class=tokenizer,
        )
        found = trainer.train()
        trainer.args.train_sampling_strategy = "sequential"  # by length, predictions would come back in that order too
        value = splits.score(trainer.predict)
        test = splits.score_test(trainer.predict)
    return Trained(value, test, found.global_step, found.metrics["train_runtime"])


def load_model(task: Task, run: RunConfig) -> nn.Module:
    import transformers

    settings = (
        task.load_arguments() | task.model_settings() | {"dtype": DTYPES.get(run.training.precision, torch.float32)}
    )
    return getattr(transformers, task.auto_class).from_pretrained(run.model.name, **settings)


def with_lora(model: nn.Module, task: Task, run: RunConfig) -> nn.Module:
    """LoRA on the layers that the run adapts. PEFT trains the whole classifier by default, but not a pooler without
    pretrained weights, which fastpeft trains. So compare on a model with a pretrained pooler."""
    import peft

    head = [name for name, _ in model.named_children() if name in ("classifier", "score")]
    config = peft.LoraConfig(
        task_type=peft.TaskType(task.peft_task_type),
        r=run.adapter.rank,
        lora_alpha=run.adapter.alpha,
        lora_dropout=run.adapter.dropout,
        target_modules=match_targets(model, head, run.adapter.target_modules),
    )
    return peft.get_peft_model(model, config)


def _arguments(run: RunConfig, folder: Path, sampling: str) -> Any:
    import transformers

    return transformers.TrainingArguments(**trainer_settings(run, folder, sampling))


def trainer_settings(run: RunConfig, folder: Path, sampling: str) -> dict[str, Any]:
    """Arguments of TrainingArguments."""
    training, optimizer = run.training, run.optimizer
    return {
        "output_dir": str(folder),
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": run.schedule.warmup_steps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "train_sampling_strategy": sampling,
        "seed": training.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


Predict = Callable[[Any], Any]
"""Trainer.predict."""


class _TextRows:
    """Rows of one text or a pair of texts, each with one answer."""

    def __init__(self, task: SequenceTask, tokenizer: Any, run: RunConfig) -> None:
        self._task, self._tokenizer = task, tokenizer
        self._cut = {"truncation": _CUT[run.dataset.cut], "max_length": run.dataset.max_length}
        self._most = run.evaluation
        self.train = self._dataset(task.texts.train)

    def _dataset(self, examples: Examples) -> Any:
        import datasets

        columns: dict[str, Any] = {"text": examples.text, "label": list(examples.labels)}
        if examples.text_pair is not None:
            columns["text_pair"] = examples.text_pair

        def tokenise(batch: dict[str, Any]) -> Any:
            return self._tokenizer(batch["text"], batch.get("text_pair"), **self._cut)

        made = datasets.Dataset.from_dict(columns)
        return made.map(tokenise, batched=True, remove_columns=[name for name in columns if name != "label"])

    def score(self, predict: Predict) -> float:
        return self._score(self._task.texts.validation.sample(self._most.max_examples), predict)

    def score_test(self, predict: Predict) -> float | None:
        test = self._task.texts.test
        return None if test is None else self._score(test.sample(self._most.max_test_examples), predict)

    def _score(self, rows: Examples, predict: Predict) -> float:
        found = predict(self._dataset(rows))
        logits, labels = torch.from_numpy(found.predictions), np.array(rows.labels)
        assert np.array_equal(found.label_ids, labels.astype(found.label_ids.dtype)), "predictions of another order"
        value = self._task.metrics(Answers(logits, math.nan), labels)[0]
        _same(value, _plain_metric(self._task, found.predictions, labels))
        return value


class _TaggedRows:
    """Rows of one sentence, with each word's label on its first token. Sentences that are too long are cut."""

    def __init__(self, task: TokenClassification, tokenizer: Any, run: RunConfig) -> None:
        self._task, self._tokenizer, self._max_length = task, tokenizer, run.dataset.max_length
        self._numbers = {name: number for number, name in enumerate(task.label_names)}
        self._splits = task.splits
        self._most = run.evaluation
        self.train = self._dataset(task.splits.train).remove_columns(_FIRST_WORDS)

    def _dataset(self, sentences: Sentences) -> Any:
        import datasets

        made = datasets.Dataset.from_dict({"tokens": sentences.words, "tags": sentences.tags})
        return made.map(self._tokenise, batched=True, remove_columns=["tokens", "tags"])

    def _tokenise(self, batch: dict[str, Any]) -> Any:
        encoded = self._tokenizer(
            batch["tokens"], truncation=True, max_length=self._max_length, is_split_into_words=True
        )
        encoded["labels"], encoded[_FIRST_WORDS] = [], []
        for row, tags in enumerate(batch["tags"]):
            words = encoded.word_ids(row)
            begins = [word is not None and word not in words[:i] for i, word in enumerate(words)]
            labels = [self._numbers[tags[word]] if first else IGNORE for word, first in zip(words, begins)]
            encoded["labels"].append(labels)
            encoded[_FIRST_WORDS].append([word for word, first in zip(words, begins) if first])
        return encoded

    def score(self, predict: Predict) -> float:
        return self._score(self._splits.validation.sample(self._most.max_examples), predict)

    def score_test(self, predict: Predict) -> float | None:
        test = self._splits.test
        return None if test is None else self._score(test.sample(self._most.max_test_examples), predict)

    def _score(self, sentences: Sentences, predict: Predict) -> float:
        from seqeval.metrics import f1_score
        from seqeval.scheme import IOB2

        rows = self._dataset(sentences)
        found = predict(rows.remove_columns(_FIRST_WORDS))
        tags = [["O"] * len(words) for words in sentences.words]
        for row, (logits, labels) in enumerate(zip(found.predictions, found.label_ids)):
            assert labels[: len(rows[row]["labels"])].tolist() == rows[row]["labels"], "predictions of another order"
            for word, number in zip(rows[row][_FIRST_WORDS], logits[labels != IGNORE].argmax(-1)):
                tags[row][word] = self._task.label_names[number]
        value = score_entities(sentences.tags, tags, self._task.label_names).f1
        _same(value, float(f1_score(sentences.tags, tags, mode="strict", scheme=IOB2, zero_division=0)))
        return value


def _plain_metric(task: SequenceTask, logits: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import spearmanr

    if isinstance(task, Regression):
        predicted = logits[:, 0].astype(np.float64)
        return 0.0 if np.ptp(predicted) == 0 else float(spearmanr(predicted, labels.astype(np.float64)).statistic)
    return float(np.mean(logits.argmax(-1) == labels))


def _same(value: float, other: float) -> None:
    assert abs(value - other) < 1e-9, f"the task scores {value}, and a direct computation {other}"
