"""Answers in LaTeX: the last box, and what is the same, trap by trap; with a time limit in any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fastpeft.errors import UserError
from fastpeft.tasks.chat import boxed as module
from fastpeft.tasks.chat.boxed import MathVerifier, as_words, last_boxed, plain
from fastpeft.tasks.chat.chat_scores import judge, reading_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5.", "5."),
        (r"\boxed {x}", "x"),
        (r"\boxed{cut off", None),
        (r"\boxed{1} and \boxed{cut", "1"),
        ("no box", None),
        (r"\boxed{}", ""),
        (r"\boxed{a \} b}", r"a \} b"),
    ],
)
def test_the_last_whole_box_counts(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


def test_what_only_sets_an_answer_is_no_part_of_it() -> None:
    assert plain(r"50\%") == ("50", "")
    assert plain(r"\$18.90") == ("18.90", "")
    assert plain(r"90^\circ") == ("90", "")
    assert plain(r"1,\!234") == ("1,234", "")
    assert plain(r"\dfrac{1}{2}") == (r"\frac{1}{2}", "")
    assert plain(r"5\text{ cm}") == ("5", "cm")
    assert plain(r"5\text{ cm}^2") == ("5", "cm")
    assert plain(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}") == (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "")


def test_words_are_told_from_mathematics() -> None:
    assert as_words(r"\text{Evelyn}") == "evelyn"
    assert as_words("(A)") == "a"
    assert as_words("no") == "no"
    assert as_words("x") is None
    assert as_words("x+y") is None
    assert as_words(r"\sin x") is None


# ---- the same ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    pytest.importorskip("math_verify")
    with MathVerifier() as found:
        yield found


SAME = [
    (r"0.5", r"\frac12"), (r"50\%", "50"), (r"5\text{ cm}", "5"), ("5", r"5\text{ m}"), (r"\text{no}", "No"),
    ("(A)", "A"), ("A", r"\text{(A)}"), ("1,234", "1234"), (r"1{,}234", "1234"), ("x^2+2x+1", "(x+1)^2"),
    (r"\{1,2\}", r"\{2,1\}"), ("1,2", "2,1"), (r"\sqrt{8}", r"2\sqrt2"), ("10^5", "100000"), ("6 - 5i", "6-5i"),
    (r"90^\circ", "90"), (r"x \in [1,2]", "[1,2]"), ("5", "x=5"), (r"\text{Tuesday}", "tuesday"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]  # fmt: skip
OTHER = [
    (r"50\%", "0.5"),  # a share is not its percentage
    (r"5\text{ cm}", r"5\text{ m}"),  # a unit that is named has to be the same
    ("no", "on"),  # letters are no product where they are words
    ("1, 234", "1234"),  # two numbers
    ("(1,2)", "(2,1)"), ("-1", "1"), (r"\frac13", "0.333"), (r"\text{east}", "west"), ("", ""), ("B", "(A)"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_the_same(answer: str, reference: str, verifier: MathVerifier) -> None:
    assert verifier.same(answer, reference)


@pytest.mark.parametrize(("answer", "reference"), OTHER)
def test_another(answer: str, reference: str, verifier: MathVerifier) -> None:
    assert not verifier.same(answer, reference)


def test_the_reference_comes_first(verifier: MathVerifier) -> None:
    """An interval answers an inequality. An inequality, which may be the question's own, answers no interval."""
    assert verifier.same("(1,2)", "1<x<2")
    assert not verifier.same("1<x<2", "(1,2)")


def test_no_answer_is_wrong(verifier: MathVerifier) -> None:
    assert not verifier.same(None, "1")
    assert not verifier.same("1", None)
    right, shares = judge([r"\boxed{1}", "1", r"\boxed{2}"], [r"\boxed{1.0}"] * 3, "boxed")
    assert right == [True, False, False]
    assert shares == {"no_answer": pytest.approx(1 / 3)}


def test_what_takes_too_long_ends_outside_the_main_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    found: list[object] = []

    def ask() -> None:
        with MathVerifier(limit_s=0.001) as verifier:  # no answer comes in so little
            found.append(verifier.same("9^{9^{9^{9}}}", "3"))
            found.append(verifier.num_late)
            verifier._limit_s = 5.0
            found.append(verifier.same("x^2+2x+1", "(x+1)^2"))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(timeout=280)
    assert found == [False, 1, True]


# ---- how answers are read ------------------------------------------------------------------------


def test_how_answers_are_read_is_told_from_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    boxed, numbers = [r"\boxed{1}"] * 9 + ["no"], ["so\n#### 5"] * 10
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert reading_of("auto", boxed)[0] == "boxed"
    assert reading_of("auto", numbers)[0] == "number"
    assert reading_of("auto", ["plain"] * 10) == (None, [])
    assert reading_of("off", boxed) == (None, [])
    assert reading_of("number", boxed) == (
        "number",
        ["answers are compared by the number behind ####, which 0% of the references have"],
    )
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    reading, notes = reading_of("auto", boxed)
    assert reading is None
    assert "pip install 'fastpeft[math]'" in notes[0]
    with pytest.raises(UserError, match="math-verify"):
        reading_of("boxed", boxed)


def test_numbers_are_compared_as_gsm8ks_are() -> None:
    answers, references = ["so\n#### $1,000.00", "#### 6", "6"], ["#### 1000", "#### 5", "#### 6"]
    assert judge(answers, references, "number") == ([True, False, False], {"no_answer": pytest.approx(1 / 3)})
