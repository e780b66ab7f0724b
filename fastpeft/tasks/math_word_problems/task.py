"""Word problems: cross entropy of the worked answers, exact match of the decoded numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from fastpeft.config.schema import DatasetConfig, EvaluationConfig, ModelConfig
from fastpeft.data.fingerprint import ReadRow
from fastpeft.data.source import TEST, TRAIN, VALIDATION, Source
from fastpeft.data.splitting import sample_note
from fastpeft.device_memory import TokenLimits, unmeasured
from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone, load_causal_lm
from fastpeft.tasks.base import OtherSet, Score, Shrink, Stop
from fastpeft.tasks.causal_lm.answering import (
    Decoding,
    Sampling,
    expected_decode_s,
    largest_batch,
    reads_references,
    try_largest_batch,
)
from fastpeft.tasks.causal_lm.decode_batches import fastest_method
from fastpeft.tasks.causal_lm.decode_check import find_decode_method
from fastpeft.tasks.causal_lm.prompts import EncodedPrompts, Prompted, encode_prompts, writes_start
from fastpeft.tasks.causal_lm.task import CausalLMTask
from fastpeft.tasks.math_word_problems.answers import MARK
from fastpeft.tasks.math_word_problems.calculator import evaluate
from fastpeft.tasks.math_word_problems.datasets import DATASETS
from fastpeft.tasks.math_word_problems.exact_match import ProblemSet, score_problems
from fastpeft.tasks.math_word_problems.reading import (
    Problems,
    ProblemSplits,
    as_prompts,
    fill_prompt,
    problem_rows,
    read_problem_set,
    read_problem_splits,
)
from fastpeft.tasks.self_check import check_tokens

_PROMPT = """\
question = "Ann has 3 apples and buys 2 more. How many apples does she have?"
prompt = {prompt!r}.replace("{{question}}", question)
"""
_EXAMPLE = """\
batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False{options}).to(model.device)
answer = model.generate(
    **batch, max_new_tokens={max_new_tokens}, do_sample=False, eos_token_id={eos}, pad_token_id=tokenizer.pad_token_id
)
print(tokenizer.decode(answer[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
"""


class MathWordProblems(CausalLMTask[EncodedPrompts]):
    kind: ClassVar[str] = "word-problems"
    noun: ClassVar[str] = "problems"
    datasets = DATASETS
    scores_other_sets = True
    metric = "exact_match"

    def __init__(self, splits: ProblemSplits, config: DatasetConfig, evaluation: EvaluationConfig, seed: int) -> None:
        super().__init__(splits.name, config, unmeasured(evaluation.batch_tokens))
        self.splits, self.evaluation, self._seed = splits, evaluation, seed
        self._held_out = splits.validation.sample(evaluation.max_examples)
        self._test: ProblemSet | None = None
        self._writes_start = False
        self.has_test = splits.test is not None
        self.notes = [self.describe(), *splits.notes]
        self.notes += sample_note(len(splits.validation), evaluation.max_examples, "held-out problems")
        self.notes += sample_note(len(splits.test or ()), evaluation.max_test_examples, "test problems")

    @classmethod
    def load(cls, config: DatasetConfig, source: Source, evaluation: EvaluationConfig, seed: int) -> Self:
        return cls(read_problem_splits(config, source), config, evaluation, seed)

    def describe(self) -> str:
        splits = self.splits
        test = f", {len(splits.test):,} test problems" if splits.test else ""
        return (
            f"{self.name}: {len(splits.train):,} training problems, {len(splits.validation):,} held out of them{test}"
        )

    def rows_read(self) -> dict[str, Iterable[ReadRow]]:
        splits = {TRAIN: self.splits.train, VALIDATION: self.splits.validation, TEST: self.splits.test}
        return {name: problem_rows(split) for name, split in splits.items() if split is not None}

    def specimen(self) -> list[dict[str, Any]]:
        return [{"question": f"How many are {i}?", "answer": f"{i} are {i}.\n{MARK} {i}"} for i in range(1, 4)]

    def encode_first(self, count: int, tokenizer: Any, model: str) -> EncodedPrompts:
        first = self.splits.train.pick(range(min(count, len(self.splits.train))))
        return encode_prompts(as_prompts(first, self.config.prompt), tokenizer, self.config.max_length)

    def prompt_tokens(self, tokenizer: Any, model: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Of the last question alone: the model has learned from one at a time."""
        asked = Prompted([fill_prompt(self.config.prompt, messages[-1]["content"])], ["."], lambda row: "the question")
        return encode_prompts(asked, tokenizer, self.config.max_length, training=False).prompt(0).tolist()

    def encode(self, backbone: Backbone, device: torch.device) -> None:
        super().encode(backbone, device)
        config, evaluation, test = self.config, self.evaluation, self.splits.test
        max_length = self.max_length(backbone)
        self._plain = decoding_of(evaluation, backbone)
        self._sampled = decoding_of(evaluation, backbone, sampling_of(evaluation, self._seed))
        train = as_prompts(self.splits.train, config.prompt)
        self.train = encode_prompts(train, backbone.tokenizer, max_length).on(device)
        self._validation = make_problem_set(self._held_out, config, evaluation, backbone)
        self.validation = self._validation.encoded
        if test is not None:
            self._test = make_problem_set(test.sample(evaluation.max_test_examples), config, evaluation, backbone)
            samples = 1 + (self._sampled.sampling.num_samples if self._sampled.sampling else 0)
            self.test_cost = samples * len(self._test) / len(self._validation)
        self.notes += [*self.train.notes, *self.validation.notes, *(self._test.encoded.notes if self._test else ())]
        if max_length < config.max_length:
            self.notes.append(f"dataset.max_length is {config.max_length}, but the model takes {max_length} tokens")
        self.notes += _sampling_notes(evaluation, self.has_test)

    def check(self, model: nn.Module, backbone: Backbone) -> None:
        if self._test is not None:
            check_tokens(backbone, {"test": self._test.encoded})
        read = self.check_rows(model, backbone)
        self._validation = replace(self._validation, encoded=self.validation)
        if self._test is not None:
            encoded = replace(self._test.encoded, padded=self.validation.padded)
            self._test = replace(self._test, encoded=encoded)
        method, notes = find_decode_method(model, backbone, self.validation, self.evaluation.max_new_tokens, read)
        self._plain, self._sampled = replace(self._plain, method=method), replace(self._sampled, method=method)
        self.notes += notes

    # ---- evaluation ------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        return self._score(model, self._validation, self._plain, limits, stop, shrink)

    def evaluate_test(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        assert self._test is not None
        return self._score(model, self._test, self._sampled, limits, stop, shrink)

    def time_evaluation(self, model: nn.Module, limits: TokenLimits) -> float:
        """As if no answer ended by itself: an untrained model's may not."""
        decode_s = expected_decode_s(model, self.validation, self._plain, limits.evaluation)
        if reads_references(self.validation, self._plain):
            return decode_s
        return decode_s + self.answer_loss.expected_s(model, self.validation, limits)

    def sampled(self, num_rows: int, backbone: Backbone, device: torch.device) -> Self:
        smaller, problems = copy(self), self._held_out.sample(num_rows)
        found = make_problem_set(problems, self.config, self.evaluation, backbone)
        smaller.validation = replace(found.encoded, padded=self.validation.padded)
        smaller._held_out, smaller._validation = problems, replace(found, encoded=smaller.validation)
        return smaller

    def try_evaluation(self, model: nn.Module, limits: TokenLimits) -> None:
        """What decoding takes: the loss's passes need less than those of training."""
        try_largest_batch(model, self._largest_set(limits), self._plain, limits.evaluation)

    def largest_evaluation_batch(self, limits: TokenLimits) -> tuple[int, int]:
        return largest_batch(self._largest_set(limits), self._plain, limits.evaluation)

    def _largest_set(self, limits: TokenLimits) -> EncodedPrompts:
        """Validation or test, whichever has the largest batch to decode."""
        sets = [self.validation, *([self._test.encoded] if self._test else ())]
        return max(sets, key=lambda encoded: math.prod(largest_batch(encoded, self._plain, limits.evaluation)))

    def _score(
        self,
        model: nn.Module,
        problem_set: ProblemSet,
        decoding: Decoding,
        limits: TokenLimits,
        stop: Stop,
        shrink: Shrink | None,
    ) -> Score | None:
        def mean_loss() -> float | None:
            return self.answer_loss.mean(model, problem_set.encoded, limits, stop)

        return score_problems(model, problem_set, decoding, limits.evaluation, stop, shrink, mean_loss)

    @classmethod
    def read_set(cls, path: Path, config: DatasetConfig, evaluation: EvaluationConfig, seed: int) -> OtherSet:
        return _OtherProblems(read_problem_set(path, config), config, evaluation, seed)

    # ---- export ----------------------------------------------------------------------------

    def encode_validation(self, rows: Sequence[int] | None, tokenizer: Any, max_length: int) -> EncodedPrompts:
        problems = self._held_out if rows is None else self._held_out.pick(rows)
        self._writes_start = writes_start(self.config.prompt, tokenizer)
        return encode_prompts(as_prompts(problems, self.config.prompt), tokenizer, max_length)

    @property
    def num_validation(self) -> int:
        return len(self._held_out)

    def facts(self) -> dict[str, Any]:
        return {"prompt": self.config.prompt}

    def card_task(self) -> str:
        return f"{self.name}, word problems"

    def card_example(self, max_length: int, eos_token_ids: tuple[int, ...]) -> str:
        """After encode_validation, which has the tokenizer."""
        options = ", add_special_tokens=False" if self._writes_start else ""
        return self.card_prompt() + _EXAMPLE.format(options=options, max_new_tokens=max_length, eos=list(eos_token_ids))

    def card_prompt(self) -> str:
        return _PROMPT.format(prompt=self.config.prompt)


class _OtherProblems(OtherSet):
    def __init__(self, problems: Problems, config: DatasetConfig, evaluation: EvaluationConfig, seed: int) -> None:
        super().__init__(problems.source, problems.num_skipped, list(problems.notes))
        self._problems, self._config, self._evaluation, self._seed = problems, config, evaluation, seed

    def load_model(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, trained: bool) -> Backbone:
        return load_causal_lm(config, dtype, device, trained)

    def encode(self, backbone: Backbone) -> None:
        self._set = make_problem_set(self._problems, self._config, self._evaluation, backbone)
        self._decoding = decoding_of(self._evaluation, backbone, sampling_of(self._evaluation, self._seed))
        self.notes += self._set.encoded.notes

    def check(self, model: nn.Module, backbone: Backbone) -> None:
        check_tokens(backbone, {"test": self._set.encoded})
        method, notes = find_decode_method(model, backbone, self._set.encoded, self._decoding.max_new_tokens)
        self._decoding = replace(self._decoding, method=method)
        self.notes += notes

    def score(self, model: nn.Module, limits: TokenLimits, shrink: Shrink) -> Score:
        found = score_problems(model, self._set, self._decoding, limits.evaluation, shrink=shrink)
        assert found is not None
        return found

    def try_scoring(self, model: nn.Module, limits: TokenLimits) -> None:
        try_largest_batch(model, self._set.encoded, self._decoding, limits.evaluation)

    def largest_batch(self, limits: TokenLimits) -> tuple[int, int]:
        return largest_batch(self._set.encoded, self._decoding, limits.evaluation)


def make_problem_set(
    problems: Problems, config: DatasetConfig, evaluation: EvaluationConfig, backbone: Backbone
) -> ProblemSet:
    """Problems for a model to be scored on.

    Raises:
        UserError: no prompt leaves room for an answer.
    """
    max_length = min(config.max_length, backbone.max_positions or config.max_length)
    max_prompt = _max_prompt(config, evaluation, backbone)
    encoded = encode_prompts(
        as_prompts(problems, config.prompt), backbone.tokenizer, max_length, training=False, max_prompt=max_prompt
    )
    if len(encoded.unusable) == len(encoded):
        raise UserError(
            f"evaluation.max_new_tokens, dataset.max_length: none of {len(encoded):,} prompts of {problems.source} "
            f"leaves room for an answer; the shortest has {encoded.prompt_lengths.min()} tokens, and there is room "
            f"for {min(max_prompt, max_length - 1)}"
        )
    return ProblemSet(problems, encoded.on(backbone.model.device))


def decoding_of(config: EvaluationConfig, backbone: Backbone, sampling: Sampling | None = None) -> Decoding:
    method = fastest_method(backbone.model)
    complete = evaluate if config.calculator else None
    return Decoding(backbone.tokenizer, backbone.eos_token_ids, config.max_new_tokens, complete, sampling, method)


def sampling_of(config: EvaluationConfig, seed: int) -> Sampling | None:
    if not config.pass_at:
        return None
    return Sampling(config.pass_at, max(config.num_samples, config.pass_at), config.temperature, config.top_p, seed)


def _max_prompt(config: DatasetConfig, evaluation: EvaluationConfig, backbone: Backbone) -> int:
    """In tokens, so that the model's context has room for an answer of evaluation.max_new_tokens.

    Raises:
        UserError: it has none even for a prompt of one token.
    """
    if backbone.max_positions is None:
        return config.max_length
    longest = backbone.max_positions - evaluation.max_new_tokens
    if longest < 1:
        raise UserError(
            f"evaluation.max_new_tokens: model {backbone.model.name_or_path} takes {backbone.max_positions:,} tokens, "
            f"prompt and answer together, so that {evaluation.max_new_tokens:,} new ones leave no room for a prompt. "
            "Set it lower"
        )
    return longest


def _sampling_notes(config: EvaluationConfig, has_test: bool) -> Iterator[str]:
    """Settings that do nothing, or less than they say."""
    if config.num_samples and not config.pass_at:
        yield "evaluation.num_samples was set, but evaluation.pass_at is 0: no answer is sampled"
    if config.pass_at and not has_test:
        yield "evaluation.pass_at was set, but there is no test split: no answer is sampled"
    if 0 < config.num_samples < config.pass_at:
        k = config.pass_at
        yield f"evaluation.num_samples is {config.num_samples}, but pass@{k} needs {k} samples: so many are drawn"
