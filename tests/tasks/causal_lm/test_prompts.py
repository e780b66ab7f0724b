"""Word problems as tokens: what is read, what is predicted and where, and what does not fit."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.config.schema import DatasetConfig
from fastpeft.data.batches import IGNORE, Batches, evaluation_batches, micro_batches
from fastpeft.errors import UserError
from fastpeft.tasks.causal_lm.labelled_rows import collate_labelled
from fastpeft.tasks.causal_lm.prompts import writes_start
from fastpeft.tasks.math_word_problems.reading import Problems
from tests.support.problem_runs import encode_problems
from tests.support.tiny import causal_model

CPU = torch.device("cpu")
PROMPT = DatasetConfig().prompt
PAD, START, END = 0, 1, 2


@cache
def tokenizer(special: str = "none"):
    """A byte-level BPE without merges, so that a token is a byte; `special` says what it puts around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}
    vocab = {token: i for i, token in enumerate([*names.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    if special != "none":
        around = {"start": "<s> $A", "both": "<s> $A </s>", "end": "$A </s>"}[special]
        model.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokens = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=model, **tokens)


def some_problems(rng: np.random.Generator, count: int, longest: int = 30) -> Problems:
    def text() -> str:
        return "".join(rng.choice(list("abc 12+{}é"), rng.integers(1, longest))) + "x"

    return Problems([text() for _ in range(count)], [f"{text()}\n#### {i}" for i in range(count)])


def text_of(problems: Problems, row: int) -> str:
    return f"Question: {problems.question[row]}\nAnswer: {problems.answer[row]}"


@pytest.mark.parametrize("special", ["none", "start", "both", "end"])
def test_a_row_is_prompt_answer_and_end(special, seed):
    problems = some_problems(np.random.default_rng(seed), 20)
    encoded = encode_problems(problems, tokenizer(special), PROMPT, 512)
    start = [START] if special in ("start", "both") else []
    plain = tokenizer("none")
    assert len(encoded) == 20
    for row in range(20):
        tokens = encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]].tolist()
        assert tokens == start + plain(text_of(problems, row))["input_ids"] + [END]
        prompt = encoded.prompt(row).tolist()
        assert prompt == start + plain(f"Question: {problems.question[row]}\nAnswer:")["input_ids"]
        assert tokens[: len(prompt)] == prompt
        assert encoded.num_labelled[row] == len(tokens) - len(prompt)
    assert encoded.tokens.dtype == np.int32
    assert (encoded.unusable.tolist(), encoded.notes) == ([], ())


@given(draw=st.integers(0, 2**31), num_rows=st.integers(1, 12), special=st.sampled_from(["none", "start"]))
@settings(max_examples=30, deadline=None)
def test_labels_are_the_next_tokens_of_the_answer(draw, num_rows, special):
    rng = np.random.default_rng(draw)
    problems = some_problems(rng, num_rows)
    encoded = encode_problems(problems, tokenizer(special), PROMPT, 512)
    rows = rng.permutation(num_rows)[: rng.integers(1, num_rows + 1)]
    batch = collate_labelled(encoded, rows, CPU)
    tokens, labels = batch.inputs["input_ids"], batch.labels
    assert set(batch.inputs) == {"input_ids"}
    assert tokens.shape == labels.shape == (len(rows), encoded.widths[rows].max())
    assert {t.dtype for t in (tokens, labels, batch.rows)} == {torch.int64}
    for i, row in enumerate(rows):
        length, prompt = encoded.lengths[row], encoded.prompt_lengths[row]
        for t in range(tokens.shape[1]):
            predicted = prompt - 1 <= t < length - 1
            assert labels[i, t] == (tokens[i, t + 1] if predicted else IGNORE)
            assert t < length or tokens[i, t] == PAD
        answer = tokenizer()(" " + problems.answer[row])["input_ids"]
        assert labels[i][labels[i] != IGNORE].tolist() == [*answer, END]
    assert batch.num_tokens == encoded.lengths[rows].sum()
    assert batch.rows.tolist() == torch.nonzero(labels.flatten() != IGNORE).flatten().tolist()
    assert len(batch.rows) == encoded.num_labelled[rows].sum()


def test_the_loss_is_that_of_transformers_own_shift(seed):
    """Which gets labels in place, shifts them itself and takes its loss in fp32."""
    problems = some_problems(np.random.default_rng(seed), 6, longest=8)
    encoded = encode_problems(problems, tokenizer(), PROMPT, 128)
    batch = collate_labelled(encoded, np.arange(6), CPU)
    model = causal_model(vocab_size=300, max_position_embeddings=128).double().eval()
    in_place = batch.inputs["input_ids"].clone()
    for i in range(6):
        in_place[i, : encoded.prompt_lengths[i]] = IGNORE
        in_place[i, encoded.lengths[i] :] = IGNORE
    with torch.no_grad():
        expected = model(**batch.inputs, labels=in_place)
        picked = expected.logits.flatten(0, 1)[batch.rows]
    loss = torch.nn.functional.cross_entropy(picked.float(), batch.labels.flatten()[batch.rows])
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0)


def test_batches_take_word_problems(seed):
    encoded = encode_problems(some_problems(np.random.default_rng(seed), 70), tokenizer(), PROMPT, 512)
    order = Batches(encoded, 8, seed=3).epoch(1)
    assert sorted(np.concatenate(order)) == list(range(70))
    parts = [part for rows in order for part in micro_batches(encoded, rows, 400)]
    for part in [*parts, *evaluation_batches(encoded, 400)]:
        shape = collate_labelled(encoded, part, CPU).labels.shape
        assert len(part) == 1 or shape[0] * shape[1] <= 400


# ---- what does not fit ---------------------------------------------------------------------


def lengths_of(problems: Problems) -> list[int]:
    return [len(text_of(problems, row).encode()) + 1 for row in range(len(problems))]


def test_training_rows_that_are_too_long_are_left_out_and_named():
    where = [f"train.jsonl:{2 * i + 1}" for i in range(7)]
    long = [0, 90, 0, 91, 92, 93, 0]
    problems = Problems([f"q{'x' * n}" for n in long], ["#### 1"] * 7, where)
    limit = lengths_of(problems)[0]
    encoded = encode_problems(problems, tokenizer(), PROMPT, limit)
    assert encoded.rows.tolist() == [0, 2, 6]
    assert encoded.unusable.tolist() == [1, 3, 4, 5]
    assert len(encoded) == 3
    assert encoded.lengths.tolist() == [limit] * 3
    assert encoded.widths.max() == limit
    assert encoded.notes == (
        f"4 training problems are longer than {limit} tokens and left out: train.jsonl:3 ({limit + 90} tokens), "
        f"train.jsonl:7 ({limit + 91} tokens), train.jsonl:9 ({limit + 92} tokens), ...",
    )
    assert encode_problems(problems, tokenizer(), PROMPT, limit + 93).notes == ()


def test_no_training_row_fits():
    with pytest.raises(
        UserError, match=r"dataset\.max_length: none of 2 training problems fits into 8 tokens"
    ) as error:
        encode_problems(Problems(["q", "qq"], ["#### 1"] * 2), tokenizer(), PROMPT, 8)
    assert f"the shortest has {len('Question: q Answer: #### 1') + 1}" in str(error.value)


def test_evaluation_keeps_every_row_and_names_those_without_room():
    problems = Problems(["q", "q" * 10, "q" * 11, "q" * 99], ["a long answer #### 1"] * 4)
    limit = len("Question: \nAnswer:") + 11
    encoded = encode_problems(problems, tokenizer(), PROMPT, limit, training=False)
    assert encoded.rows.tolist() == [0, 1, 2, 3]
    assert encoded.unusable.tolist() == [2, 3]
    assert encoded.prompt_lengths.tolist() == [limit - 10, limit - 1, limit, limit]
    assert encoded.num_labelled.tolist() == [10, 1, 0, 0]
    assert encoded.lengths.max() == limit
    assert encoded.notes == (
        f"2 prompts leave no room for an answer in {limit} tokens and count as wrong: row 3 ({limit} tokens), "
        f"row 4 ({limit + 88} tokens)",
    )
    batch = collate_labelled(encoded, np.arange(4), CPU)
    assert len(batch.rows) == 11


# ---- tokenizers ----------------------------------------------------------------------------


def test_special_tokens_that_are_written_in_an_answer_are_text():
    """Else a row would end before its end; a prompt may name them on purpose."""
    problems = Problems(["q"], ["a</s>b #### 1"])
    encoded = encode_problems(problems, tokenizer(), "<s>{question}", 512)
    tokens = encoded.tokens.tolist()
    assert [i for i, token in enumerate(tokens) if token in (PAD, START, END)] == [0, len(tokens) - 1]
    assert tokenizer().decode(tokens) == "<s>q a</s>b #### 1</s>"


@pytest.mark.parametrize("special", ["start", "both"])
def test_a_prompt_that_begins_with_the_start_has_it_once(special):
    problems = Problems(["q", "qq"], ["#### 1"] * 2)
    written = encode_problems(problems, tokenizer(special), "<s>Question: {question}", 64)
    plain = encode_problems(problems, tokenizer(special), "Question: {question}", 64)
    assert written.tokens.tolist() == plain.tokens.tolist()
    assert [written.prompt(row).tolist().count(START) for row in range(2)] == [1, 1]
    assert written.notes == ("2 prompts begin with '<s>', which the tokenizer puts there itself: it stands there once",)
    assert plain.notes == ()
    assert encode_problems(problems, tokenizer(special), "<s>{question}", 64, training=False).notes == ()


def test_a_start_that_the_tokenizer_does_not_put_there_stays():
    encoded = encode_problems(Problems(["q"], ["#### 1"]), tokenizer(), "<s><s>{question}", 64)
    assert encoded.prompt(0).tolist()[:2] == [START, START]
    assert encoded.notes == ()
    assert writes_start("<s>Q: {question}", tokenizer("start"))
    assert not writes_start("<s>Q: {question}", tokenizer())
    assert not writes_start("Q: {question}", tokenizer("start"))


def test_a_tokenizer_without_padding_or_end():
    unpadded = deepcopy(tokenizer())
    unpadded.pad_token = None
    encoded = encode_problems(Problems(["q", "qqq"], ["#### 1"] * 2), unpadded, PROMPT, 64)
    assert encoded.pad_token == END
    batch = collate_labelled(encoded, np.arange(2), CPU)
    short, real = batch.inputs["input_ids"][0], int(encoded.lengths[0])
    assert short[:real].tolist() == encoded.tokens[:real].tolist()
    assert set(short[real:].tolist()) == {END}
    unpadded.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        encode_problems(Problems(["q"], ["#### 1"]), unpadded, PROMPT, 64)


def test_a_prompt_that_no_token_stands_for():
    with pytest.raises(UserError, match=r"row 2: no token"):
        encode_problems(Problems(["q", ""], ["#### 1"] * 2), tokenizer(), "{question}", 64)
