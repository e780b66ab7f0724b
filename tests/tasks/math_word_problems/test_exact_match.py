"""What is counted of the answers: right ones, none, cut ones, problems without room; and what decoding will take."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from fastpeft.models.merge import Merged
from fastpeft.tasks.causal_lm import answering as module
from fastpeft.tasks.causal_lm.answering import Decoding, Sampling, expected_decode_s, largest_batch
from fastpeft.tasks.causal_lm.generate import CHECK_EVERY, Answer, Decoded
from fastpeft.tasks.causal_lm.prompts import EncodedPrompts
from fastpeft.tasks.math_word_problems.calculator import evaluate
from fastpeft.tasks.math_word_problems.exact_match import ProblemSet, score_problems
from fastpeft.tasks.math_word_problems.reading import Problems

EOS = 0


class Characters:
    """A tokenizer of one token a character."""

    def batch_decode(self, tokens: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(map(chr, some)) for some in tokens]


def problem_set(references: list[str], unusable: tuple[int, ...] = (), lengths: list[int] | None = None) -> ProblemSet:
    """Row i's prompt is the token i, over and over."""
    lengths = lengths or [1] * len(references)
    encoded = EncodedPrompts(
        tokens=np.repeat(np.arange(len(references)), lengths).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_token=0,
        max_length=1000,
        prompt_lengths=np.array(lengths),
        rows=np.arange(len(references)),
        unusable=np.array(unusable, dtype=np.int64),
        notes=(),
    )
    return ProblemSet(Problems([f"{i}" for i in range(len(references))], references), encoded)


def decoding(**more) -> Decoding:
    return Decoding(Characters(), (EOS,), **{"max_new_tokens": 40} | more)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch):
    """Answers that are written instead of a model's: greedy ones, then the samples of each problem; with the calls."""

    def rig(greedy: list[tuple[str, bool]], samples: list[list[str]] = ()) -> list[dict]:
        calls: list[dict] = []

        def decode(model, prompts, *, options, **more):
            calls.append({"rows": [int(prompt[0]) for prompt in prompts], "options": options, **more})
            rows = calls[-1]["rows"]
            texts = [[greedy[row]] if not options.temperature else [(s, True) for s in samples[row]] for row in rows]
            assert all(len(own) == options.num_samples for own in texts)
            answers = [[Answer([ord(c) for c in text], ended) for text, ended in own] for own in texts]
            return Decoded(answers, sum(a.num_tokens for own in answers for a in own), 0.5, Merged())

        monkeypatch.setattr(module, "decode", decode)
        return calls

    return rig


def test_counts_what_answers_are_worth(writes) -> None:
    references = ["so\n#### 1,000", "#### 5", "#### 6", "#### 7", "#### 8", "#### -3/2"]
    calls = writes(
        [
            ("it is\n#### $1000.00\nand on", True),  # right: the first number that follows a mark
            ("five\n#### 5", False),  # right and cut
            ("6", True),  # no mark: no answer
            ("#### seven", True),  # no number: no answer
            ("never asked", True),
            ("#### 1.5", True),  # an answer, and wrong
        ]
    )
    problems = problem_set(references, unusable=(4,))
    score = score_problems(nn.Identity(), problems, decoding(), 100, mean_loss=lambda: 1.5)
    assert calls[0]["rows"] == [0, 1, 2, 3, 5]
    assert score.value == 2 / 6
    assert score.more == {"no_answer": 3 / 6, "cut": 1 / 6, "no_room": 1 / 6}
    assert (score.num_rows, score.loss, score.decode_s) == (6, 1.5, 0.5)
    assert score.decode_tokens == sum(map(len, ("it is\n#### $1000.00\nand on", "five\n#### 5", "6", "#### seven"))) + (
        len("#### 1.5") + 4
    )


def test_where_nothing_has_room_nothing_is_decoded(writes) -> None:
    calls = writes([])
    score = score_problems(nn.Identity(), problem_set(["#### 1"] * 2, unusable=(0, 1)), decoding(), 100)
    assert (score.value, score.more) == (0.0, {"no_answer": 1.0, "cut": 0.0, "no_room": 1.0})
    assert not calls
    assert math.isnan(score.loss)


def test_pass_at_k_is_over_all_problems(writes) -> None:
    sampling = Sampling(k=2, num_samples=4, temperature=0.7, top_p=0.9, seed=3)
    one, two = "#### 1", "#### 2"
    calls = writes(
        [(one, True)] * 4, [[one, two, one, two], [two] * 4, [one] * 4, [one, one, one, two]]
    )  # the last has no room
    found = problem_set([one] * 4, unusable=(3,))
    score = score_problems(nn.Identity(), found, decoding(sampling=sampling), 100)
    assert score.more["pass@2"] == pytest.approx((1 - 1 / 6 + 0 + 1 + 0) / 4)  # 1 - C(2,2)/C(4,2)
    assert score.value == 3 / 4
    options = calls[1]["options"]
    assert (options.temperature, options.top_p, options.num_samples, options.seed) == (0.7, 0.9, 4, 3)
    assert calls[0]["options"].temperature == 0
    assert score.decode_s == 1.0


@pytest.mark.parametrize("stopped_at", [0, 1])
def test_a_stop_gives_no_score(stopped_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def decode(model, prompts, *, options, **more):
        calls.append(0)
        answers = [[Answer([49], True)] * options.num_samples for _ in prompts]
        return None if len(calls) > stopped_at else Decoded(answers, 1, 0.1, Merged())

    monkeypatch.setattr(module, "decode", decode)
    sampling = Sampling(1, 1, 0.7, 1.0, 0)
    assert score_problems(nn.Identity(), problem_set(["#### 1"]), decoding(sampling=sampling), 10) is None
    assert len(calls) == stopped_at + 1


@pytest.mark.parametrize("calculator", [True, False])
def test_the_calculator_is_on_where_it_is_asked_for(calculator: bool, writes) -> None:
    calls = writes([("#### 1", True)])
    score_problems(nn.Identity(), problem_set(["#### 1"]), decoding(complete=evaluate if calculator else None), 10)
    assert (calls[0]["complete"] is not None, calls[0]["tokenizer"] is not None) == (calculator, calculator)
    if calculator:
        assert calls[0]["complete"]("6*7") == "42"


# ---- what it will take -----------------------------------------------------------------------

MERGE_S, PREFILL_S, STEP_S = 3.0, 2.0, 0.25


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Decoding that takes as long as it is said to; the first call takes a minute more, as compiling does."""
    now, calls = [100.0], []

    def decode(model, prompts, *, options, stop, max_tokens, eos_tokens, **more):
        assert eos_tokens == (-1,)  # no answer ends
        calls.append({"rows": len(prompts), "max_tokens": max_tokens})
        now[0] += MERGE_S + (60 if len(calls) == 1 else 0)
        if stop():
            return None
        now[0] += PREFILL_S
        for step in range(options.max_new_tokens):
            now[0] += STEP_S
            last = step + 1 == options.max_new_tokens
            if not last and step % CHECK_EVERY == CHECK_EVERY - 1 and stop():
                return None
        return Decoded([], 0, 0.0, Merged())

    monkeypatch.setattr(module, "decode", decode)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return calls


@pytest.mark.parametrize("most", [1, 7, 8, 9, 16, 17, 100])
@pytest.mark.parametrize(("max_tokens", "batches"), [(10**6, 1), (1, 5)])
def test_expects_every_step_of_every_batch(most: int, max_tokens: int, batches: int, simulated: list[dict]) -> None:
    some = problem_set(["#### 1"] * 5, lengths=[3, 30, 9, 17, 24])
    found = expected_decode_s(nn.Linear(1, 1), some.encoded, decoding(max_new_tokens=most), max_tokens)
    assert found == pytest.approx(MERGE_S + batches * (PREFILL_S + most * STEP_S))
    assert len(simulated) == 2
    rows, width = largest_batch(some.encoded, decoding(max_new_tokens=most), max_tokens)
    assert simulated[1] == {"rows": rows, "max_tokens": rows * width}
    assert rows == 5 // batches


def test_problems_without_room_are_not_reckoned_with(simulated: list[dict]) -> None:
    some = problem_set(["#### 1"] * 3, unusable=(1,), lengths=[3, 900, 9])
    assert largest_batch(some.encoded, decoding(), 10**6) == (2, 16 + 40)
    expected_decode_s(nn.Linear(1, 1), some.encoded, decoding(), 10**6)
    assert simulated[1]["rows"] == 2
