"""The generated word problems: what they promise, and their answers against a second evaluation."""

import re
from fractions import Fraction
from string import Formatter

import pytest

from fastpeft.standins import problems as embedded_problems
from fastpeft.standins.problem_grammar import FRAMES, KINDS, NOUNS
from fastpeft.standins.problem_text import raw_text

OPERATIONS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
LINE = re.compile(r"[A-Z][a-z ]+ (\d+) ([-+*/]) (\d+) = <<(\d+)([-+*/])(\d+)=(\d+)>>(\d+) [a-z]+( left)?\.")
WORDS = {split: nouns.words() for split, nouns in NOUNS.items()}


@pytest.fixture(scope="module")
def problems():
    return {"train": embedded_problems.train_problems(), "test": embedded_problems.test_problems()}


@pytest.fixture(scope="module")
def raw():
    return list(raw_text(20_000, 0))


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.?\n]+[.?]", text)


def skeleton(sentence: str) -> str:
    """The sentence with its numbers and content words replaced by their kinds."""
    kinds = {word: kind for nouns in NOUNS.values() for kind in vars(nouns) for word in getattr(nouns, kind)}
    kinds |= dict.fromkeys(("she", "he"), "women")
    words = ("0" if word.isdigit() else kinds.get(word, word) for word in re.findall(r"\d+|\w+", sentence))
    return " ".join(words).replace("women", "men").lower()


def test_sizes_and_shape(problems):
    for split, num_problems in (("train", 8_000), ("test", 1_000)):
        rows = problems[split]
        assert len(rows) == len({question for question, _ in rows}) == num_problems
        num_steps = [answer.count("<<") for _, answer in rows]
        assert [num_steps.count(n) / num_problems for n in (1, 2, 3)] == [0.2, 0.4, 0.4]
        for question, _ in rows:
            assert 2 <= len(sentences(question)) <= 4
            assert question.endswith("?")
            assert not re.search(r"[{}]|\?.", question)
        operations = {mark for _, answer in rows for mark in re.findall(r"<<\d+(\D)", answer)}
        assert operations == set(OPERATIONS)


def test_same_every_time(problems):
    assert embedded_problems.train_problems() == problems["train"]
    assert embedded_problems.test_problems() == problems["test"]
    assert list(raw_text(500, 3)) == list(raw_text(500, 3))
    assert list(raw_text(500, 3)) != list(raw_text(500, 4))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_adds_up(problems, split):
    """Each line states its step twice, uses numbers that are known by then, and the last one's result is the answer."""
    for question, answer in problems[split]:
        *lines, last = answer.split("\n")
        known = {int(number) for number in re.findall(r"\d+", question)}
        for line in lines:
            a, operation, b, *note, value, shown, _ = LINE.fullmatch(line).groups()
            assert [a, operation, b] == note
            assert OPERATIONS[operation](Fraction(a), Fraction(b)) == int(value) == int(shown) >= 2
            assert {int(a), int(b)} <= known, answer
            known.add(int(value))
        assert last == f"#### {value}"


def test_splits_share_no_content_word(problems):
    assert not WORDS["train"] & WORDS["test"]
    for split, other in (("train", "test"), ("test", "train")):
        seen = {word for row in problems[split] for text in row for word in re.findall(r"\w+", text)}
        assert WORDS[split] <= seen
        assert not WORDS[other] & seen


def test_splits_share_no_frame(problems):
    seen = {split: {skeleton(s) for q, _ in rows for s in sentences(q)} for split, rows in problems.items()}
    assert len(seen["test"]) > 300
    assert not seen["train"] & seen["test"]
    for kind in KINDS:
        slots = {name for frame in FRAMES["test"][kind] for _, name, _, _ in Formatter().parse(frame) if name}
        assert slots == {name for frame in FRAMES["train"][kind] for _, name, _, _ in Formatter().parse(frame) if name}


def test_raw_text_holds_no_problem(problems, raw):
    """No question, no worked answer, no note, and no sentence in a frame of the test."""
    text = "\n".join(raw)
    assert not re.search(r"[?<>#]|Question|Answer", text)
    held_out = {skeleton(s) for question, _ in problems["test"] for s in sentences(question)}
    assert not held_out & {skeleton(s) for s in sentences(text)}
    words = {word for line in raw for word in re.findall(r"\w+", line)}
    assert WORDS["train"] | WORDS["test"] <= words
    assert {w.lower() for q, _ in problems["test"] for w in re.findall(r"[A-Za-z]+", q)} <= {w.lower() for w in words}


def test_every_equation_in_the_raw_text_holds(raw):
    found = [match for text in raw for match in re.findall(r"(\d+) ?([-+*/]) ?(\d+) ?= ?(\d+)\b(?! ?[-+*/])", text)]
    assert len(found) > 10_000
    assert all(OPERATIONS[operation](Fraction(a), Fraction(b)) == int(c) for a, operation, b, c in found)


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_shortcut_from_the_numbers_alone(problems, split):
    """Adding or multiplying all numbers of the question, or naming the commonest answer, is rarely right."""
    rows = [([int(n) for n in re.findall(r"\d+", q)], int(a.split("#### ")[1])) for q, a in problems[split]]
    totals = sum(sum(numbers) == answer for numbers, answer in rows) / len(rows)
    answers = [answer for _, answer in rows]
    commonest = max(answers.count(answer) for answer in set(answers)) / len(rows)
    print(f"sum of all numbers {totals:.3f}, commonest answer {commonest:.3f}")
    assert totals < 0.15
    assert commonest < 0.08
