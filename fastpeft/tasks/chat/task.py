"""Conversations and instructions: cross entropy of the assistant's turns, and decoded answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from fastpeft.config.schema import DatasetConfig, EvaluationConfig, ModelConfig
from fastpeft.data.batches import evaluation_batches
from fastpeft.data.fingerprint import ReadRow
from fastpeft.data.predictions import Answer, AnsweredRows
from fastpeft.data.source import TEST, TRAIN, VALIDATION, Source
from fastpeft.data.splitting import sample_note
from fastpeft.device_memory import TokenLimits, unmeasured
from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone, load_causal_lm
from fastpeft.tasks.base import Score, Shrink, Stop
from fastpeft.tasks.causal_lm.answering import (
    Answers,
    Decoding,
    answer_prompts,
    expected_decode_s,
    largest_batch,
    try_largest_batch,
)
from fastpeft.tasks.causal_lm.decode_batches import fastest_method
from fastpeft.tasks.causal_lm.decode_check import find_decode_method
from fastpeft.tasks.causal_lm.generate import DecodeOptions
from fastpeft.tasks.causal_lm.loss import TokenScores
from fastpeft.tasks.causal_lm.prompts import EncodedPrompts
from fastpeft.tasks.causal_lm.task import CausalLMTask
from fastpeft.tasks.chat.chat_prompts import PromptSet, encode_chat_prompts, ending_token, prompt_tokens
from fastpeft.tasks.chat.chat_rows import ChatOptions, ChatRows, encode_chats
from fastpeft.tasks.chat.chat_scores import Reading, judge, reading_of, samples_of, token_answers
from fastpeft.tasks.chat.conversations import RowFault
from fastpeft.tasks.chat.datasets import DATASETS
from fastpeft.tasks.chat.packing import pack
from fastpeft.tasks.chat.reading import (
    ChatSplits,
    Conversations,
    conversation_rows,
    holds_conversations,
    read_chat_splits,
)
from fastpeft.tasks.chat.templates import FILE, ChatTemplate, checked, choose_template, template_file
from fastpeft.tasks.self_check import check_tokens

_PROMPT = """\
messages = [{"role": "user", "content": "What is a chat template?"}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
"""
_EXAMPLE = """\
batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False).to(model.device)
answer = model.generate(
    **batch, max_new_tokens={max_new_tokens}, do_sample=False, eos_token_id={eos}, pad_token_id=tokenizer.pad_token_id
)
print(tokenizer.decode(answer[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
"""


_LOOKED_AT = 8
"""So many conversations for each sample, of which those are asked whose prompt leaves room for an answer."""


class Chat(CausalLMTask[ChatRows]):
    kind: ClassVar[str] = "chat"
    noun: ClassVar[str] = "conversations"
    datasets = DATASETS

    def __init__(self, splits: ChatSplits, config: DatasetConfig, evaluation: EvaluationConfig) -> None:
        super().__init__(splits.name, config, unmeasured(evaluation.batch_tokens))
        self.splits, self.evaluation = splits, evaluation
        self._held_out = splits.validation.sample(evaluation.max_examples)
        self._test = splits.test.sample(evaluation.max_test_examples) if splits.test is not None else None
        self._template: ChatTemplate | None = None
        self._kept_template: str | None = None
        self._file_text = template_file(config.template)
        references = [row.turns[row.answers[-1]].text for row in self._held_out.rows]
        self._reading: Reading | None
        self._reading, said = reading_of(evaluation.exact_match, references)
        self.metric = "token_accuracy" if self._reading is None else "exact_match"
        self.has_test = splits.test is not None
        self.notes = [self.describe(), *splits.notes, *said]
        self.notes += sample_note(len(splits.validation), evaluation.max_examples, "held-out conversations")
        self.notes += sample_note(len(splits.test or ()), evaluation.max_test_examples, "test conversations")

    # ---- data ------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, config: DatasetConfig, source: Source) -> str | None:
        return holds_conversations(config, source)

    @classmethod
    def load(cls, config: DatasetConfig, source: Source, evaluation: EvaluationConfig, seed: int) -> Self:
        return cls(read_chat_splits(config, source), config, evaluation)

    def describe(self) -> str:
        splits = self.splits
        num_answers = sum(len(row.answers) for row in splits.train.rows)
        test = f", {len(splits.test):,} test ones" if splits.test else ""
        return (
            f"{self.name}: {len(splits.train):,} training conversations with {num_answers:,} answers, "
            f"{len(splits.validation):,} held-out ones{test}; {splits.form}"
        )

    def rows_read(self) -> dict[str, Iterable[ReadRow]]:
        splits = {TRAIN: self.splits.train, VALIDATION: self.splits.validation, TEST: self.splits.test}
        read = self._file_text
        return {name: conversation_rows(split, read) for name, split in splits.items() if split is not None}

    def specimen(self) -> list[dict[str, Any]]:
        turns = [("user", "How many are {}?"), ("assistant", "They are {}.")]
        return [
            {"messages": [{"role": role, "content": text.format(i)} for role, text in turns]}
            for i in (1, 22, 333, 4444)
        ]

    def encode_first(self, count: int, tokenizer: Any, model: str) -> ChatRows:
        first = self.splits.train.pick(range(min(count, len(self.splits.train))))
        return self._rows(first, self.use_template(tokenizer, model), self.config.max_length, "training")

    def prompt_tokens(self, tokenizer: Any, model: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
        try:
            return prompt_tokens(messages, self.use_template(tokenizer, model))
        except RowFault as fault:
            raise UserError(str(fault)) from None

    # ---- model and tokens ------------------------------------------------------------------

    def load_model(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, trained: bool = False
    ) -> Backbone:
        """The tokenizer carries the template, and the end of the assistant's turn is one of the ends."""
        backbone = load_causal_lm(config, dtype, device, trained)
        template = self.use_template(backbone.tokenizer, config.name)
        end = ending_token(template)
        if end is not None:
            backbone.eos_token_ids = tuple(dict.fromkeys((*backbone.eos_token_ids, end)))
        return backbone

    def use_template(self, tokenizer: Any, model: str) -> ChatTemplate:
        """Of the run, for a tokenizer, which has it from here on.

        Raises:
            UserError: as choose_template.
        """
        if self._kept_template is None:
            template = choose_template(self.config.template, tokenizer, model)
        else:
            template = checked(ChatTemplate(self._kept_template, tokenizer, "the run"))
        tokenizer.chat_template = template.text
        self._template = template
        return template

    def keep(self, folder: Path) -> None:
        assert self._template is not None, "load_model comes first"
        (folder / FILE).write_text(self._template.text, encoding="utf-8")

    def recall(self, folder: Path) -> None:
        path = folder / FILE
        if path.is_file():
            self._kept_template = path.read_text(encoding="utf-8")

    def encode(self, backbone: Backbone, device: torch.device) -> None:
        super().encode(backbone, device)
        template, max_length = self._known_template, self.max_length(backbone)
        self.train = self._rows(self.splits.train, template, max_length, "training").on(device)
        train_notes = self.train.notes
        if self.config.packing:
            self.train, note = pack(self.train, backbone)
            train_notes = (*train_notes, note)
        self.validation = self._rows(self._held_out, template, max_length, "validation").on(device)
        self._prompts = self._encode_prompts(self._held_out, backbone)
        if self._test is not None:
            self._test_rows = self._rows(self._test, template, max_length, "test").on(device)
            self._test_prompts = self._encode_prompts(self._test, backbone)
            self.test_cost = len(self._test) / len(self._held_out)
        ends = tuple(dict.fromkeys((*backbone.eos_token_ids, *self._prompts.ends)))
        self._decoding = Decoding(
            backbone.tokenizer, ends, self.evaluation.max_new_tokens, method=fastest_method(backbone.model)
        )
        self.notes += [*template.notes, *train_notes, *self.validation.notes]
        self.notes += self._prompts.encoded.notes if self._reading is not None else ()
        if max_length < self.config.max_length:
            self.notes.append(
                f"dataset.max_length is {self.config.max_length}, but the model takes {max_length} tokens"
            )

    @property
    def _known_template(self) -> ChatTemplate:
        assert self._template is not None, "load_model comes first"
        return self._template

    def _rows(self, chats: Conversations, template: ChatTemplate, max_length: int, what: str) -> ChatRows:
        config = self.config
        options = ChatOptions(
            max_length=max_length,
            train_on=config.train_on,
            overflow=config.overflow,
            on_bad_row=config.on_bad_row,
        )
        return encode_chats(chats, template, options, what)

    def _encode_prompts(self, chats: Conversations, backbone: Backbone) -> PromptSet:
        """Those that an evaluation has answered: all where answers are compared, else a few to look at."""
        positions, most = backbone.max_positions, self.evaluation.max_new_tokens
        max_length = self.max_length(backbone)
        longest = max_length if positions is None else positions - most
        if longest < 1:
            raise UserError(
                f"evaluation.max_new_tokens: model {backbone.model.name_or_path} takes {positions:,} tokens, prompt "
                f"and answer together, so that {most:,} new ones leave no room for a prompt. Set it lower"
            )
        template, pad = self._known_template, self.validation.pad_token
        if self._reading is None:
            samples = self.evaluation.samples
            some = chats.pick(range(min(samples * _LOOKED_AT, len(chats))))
            found = encode_chat_prompts(some, template, max_length, longest, pad)
            usable = np.setdiff1d(np.arange(len(found)), found.encoded.unusable)[:samples].tolist()
            chats = found.chats.pick(usable or range(min(samples, len(found))))
        return encode_chat_prompts(chats, template, max_length, longest, pad)

    def check(self, model: nn.Module, backbone: Backbone) -> None:
        splits = {"test": self._test_rows} if self._test is not None else {}
        check_tokens(backbone, splits)
        read = self.check_rows(model, backbone)
        if self._test is not None:
            self._test_rows = replace(self._test_rows, padded=self.validation.padded)
        if not self._asks_anything:
            return
        encoded, most = self._prompts.encoded, self.evaluation.max_new_tokens
        method, notes = find_decode_method(model, backbone, encoded, most, read)
        self._decoding = replace(self._decoding, method=method)
        self.notes += notes

    # ---- evaluation ------------------------------------------------------------------------

    @property
    def num_validation(self) -> int:
        return len(self._held_out)

    def evaluate(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        return self._score(model, self._held_out, self.validation, self._prompts, limits, stop, shrink)

    def evaluate_test(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        assert self._test is not None
        return self._score(model, self._test, self._test_rows, self._test_prompts, limits, stop, shrink)

    def _score(
        self,
        model: nn.Module,
        chats: Conversations,
        rows: ChatRows,
        prompts: PromptSet,
        limits: TokenLimits,
        stop: Stop,
        shrink: Shrink | None,
    ) -> Score | None:
        tokens = self.answer_loss.token_scores(model, rows, limits, stop)
        if tokens is None:
            return None
        more = {"token_accuracy": tokens.accuracy, "perplexity": tokens.perplexity}
        answers = self._answers(model, prompts, limits, stop, shrink) if len(prompts) else Answers([], 0, 0.0, 0)
        if answers is None:
            return None
        texts = [own[0] for own in answers.texts]
        decoded = {"decode_s": answers.seconds, "decode_tokens": answers.num_tokens} if texts else {}
        shown = samples_of(prompts.chats, texts, prompts.references)[: self.evaluation.samples]
        if self._reading is None:
            answered = partial(token_answers, chats, rows, tokens)
            return _token_score(tokens, len(chats), shown, decoded, answered)
        right, shares = judge(texts, prompts.references, self._reading)
        more |= shares | {"cut": answers.num_cut / len(prompts)}
        return Score(
            sum(right) / len(prompts),
            tokens.loss,
            len(prompts),
            more,
            samples=shown,
            answered=partial(_answered, prompts, texts, right),
            **decoded,
        )

    def _answers(
        self, model: nn.Module, asked: PromptSet, limits: TokenLimits, stop: Stop, shrink: Shrink | None
    ) -> Answers | None:
        options = DecodeOptions(self.evaluation.max_new_tokens)
        return answer_prompts(model, asked.encoded, self._decoding, options, limits.evaluation, stop, shrink)

    def time_evaluation(self, model: nn.Module, limits: TokenLimits) -> float:
        """As if no answer ended by itself: an untrained model's may not."""
        seconds = self.answer_loss.expected_s(model, self.validation, limits)
        if not self._asks_anything:
            return seconds
        return seconds + expected_decode_s(model, self._prompts.encoded, self._decoding, limits.evaluation)

    @property
    def _asks_anything(self) -> bool:
        return len(self._prompts.encoded.unusable) < len(self._prompts)

    def sampled(self, num_rows: int, backbone: Backbone, device: torch.device) -> Self:
        smaller, held_out = copy(self), self._held_out.sample(num_rows)
        rows = self._rows(held_out, self._known_template, self.max_length(backbone), "validation").on(device)
        smaller._held_out, smaller.validation = held_out, replace(rows, padded=self.validation.padded)
        if self._reading is not None:
            smaller._prompts = self._encode_prompts(held_out, backbone)
        return smaller

    def try_evaluation(self, model: nn.Module, limits: TokenLimits) -> None:
        if self._asks_anything:
            try_largest_batch(model, self._largest_prompts(limits), self._decoding, limits.evaluation)
        else:
            self.time_evaluation(model, limits)

    def largest_evaluation_batch(self, limits: TokenLimits) -> tuple[int, int]:
        if self._asks_anything:
            return largest_batch(self._largest_prompts(limits), self._decoding, limits.evaluation)
        batches = evaluation_batches(self.validation, min(limits.training, limits.evaluation))
        sizes = [(len(rows), int(self.validation.widths[rows].max())) for rows in batches]
        return max(sizes, key=lambda size: size[0] * size[1])

    def _largest_prompts(self, limits: TokenLimits) -> EncodedPrompts:
        """Validation's or the test's, whichever have the largest batch to decode."""
        sets = [self._prompts, *([self._test_prompts] if self._test is not None else ())]
        asked = [prompts.encoded for prompts in sets if len(prompts.encoded.unusable) < len(prompts)]
        return max(asked, key=lambda encoded: math.prod(largest_batch(encoded, self._decoding, limits.evaluation)))

    # ---- export ----------------------------------------------------------------------------

    def encode_validation(self, rows: Sequence[int] | None, tokenizer: Any, max_length: int) -> ChatRows:
        chats = self._held_out if rows is None else self._held_out.pick(rows)
        template = self._known_template
        own = ChatTemplate(tokenizer.chat_template or template.text, tokenizer, template.source)
        return self._rows(chats, own, max_length, "validation")

    def facts(self) -> dict[str, Any]:
        return {"template": self.config.template or "the model's own", "train_on": self.config.train_on}

    def card_task(self) -> str:
        return f"{self.name}, conversations"

    def card_example(self, max_length: int, eos_token_ids: tuple[int, ...]) -> str:
        return self.card_prompt() + _EXAMPLE.format(max_new_tokens=max_length, eos=list(eos_token_ids))

    def card_prompt(self) -> str:
        return _PROMPT


def _token_score(tokens: TokenScores, num_rows: int, shown: Any, decoded: dict[str, Any], answered: Any) -> Score:
    more = {"perplexity": tokens.perplexity}
    return Score(tokens.accuracy, tokens.loss, num_rows, more, samples=shown, answered=answered, **decoded)


def _answered(prompts: PromptSet, texts: Sequence[str], right: Sequence[bool]) -> AnsweredRows:
    def rows() -> Iterator[tuple[ReadRow, Answer]]:
        for row, reference, text, is_right in zip(
            conversation_rows(prompts.chats), prompts.references, texts, right, strict=True
        ):
            yield row, Answer(reference, text, correct=is_right)

    return rows()
