"""The number that an answer ends with: every real one, every way to write it, and nothing that is no number."""

from __future__ import annotations

import json
import random
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.tasks.math_word_problems.answers import MAX_LENGTH, final_number, number_text, parse_number, same_answer
from tests.support.real_data import DATA

GSM8K = DATA / "gsm8k"

NUMBERS = {
    "18": 18, "-5": -5, "+3": 3, "\u22125": -5, "1,234,567": 1_234_567, "-1,080": -1080, "1,234.50": "1234.5",
    "3.50": "3.5", ".5": "0.5", "-.5": "-0.5", "5.": 5, "0": 0, "-0": 0, "007": 7, "72.": 72, "72 .": 72, "  72\t": 72,
    "$18": 18, "$ 18": 18, "-$5": -5, "$-5": -5, "$.50": "0.5", "\u20ac5": 5, "US$5": 5, "USD 18": 18, "\uff0418": 18,
    "18 dollars": 18, "18 dollars.": 18, "18%": 18, "5kg": 5, "5 kg": 5, "60km/h": 60, "5/hour": 5, "50\u00a2": 50,
    "1,000\u00a0miles": 1000, "5 apples, no more": 5, "5-hour": 5, "72</s>": 72,
    "1/2": "1/2", "-3/4": "-3/4", "1 1/2": "3/2", "-1 1/2": "-3/2", "1 / 2 cup": "1/2", "1\u20442": "1/2", "6/3": 2,
    "\u0667\u0662": 72, "\uff11\uff18": 18, "\u0663.\u0665": "3.5",
}  # fmt: skip

NOT_ONE_NUMBER = [
    "", " ", "eighteen", "x5", "the answer is 5", "NaN", "Infinity", "-inf", "None", "$", "-", ".", ",", "#", "%",
    "1,2,3", "12,34", "1,23", "0,123", "1234,567", "1,2345", "1,,234", ",123", "1.2.3", "1.234,50", "1..5", "1 234",
    "--5", "+-5", "-+5", "-$-5", "- 5", "5 or 6", "5-6", "5 6", "5:30", "2x3", "2*3", "2^3", "2+3", "1e3", "0x10",
    "1/0", "1/2/3", "1.5/2", "1 1", "1 2 3/4", "\u00bd", "\u00b2",
    "1\u00bd", "5\u00b2", "\u4e94", "5\u4e94", "(5)", "= 5", "**5**",
    "5\n6",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers(text, value):
    expected = Fraction(value)
    assert parse_number(text) == expected
    assert final_number(f"So it is 7.\n#### {text}\n") == expected


@pytest.mark.parametrize("text", NOT_ONE_NUMBER)
def test_what_is_not_one_number_is_none(text):
    assert parse_number(text) is None
    assert final_number("#### " + text.replace("\n", " ")) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("72", None),
        ("The answer is 72.", None),
        ("### 72", None),
        ("# # # # 72", None),
        ("####", None),
        ("####\n72", None),
        ("####72", 72),
        ("#### 72", 72),
        ("so that makes #### 72 in all", 72),
        ("1 + 1 = 2\r\n#### 2\r\n", 2),
        ("#### 5\n#### 7", 5),
        ("#### 5\nQuestion: and 6?\nAnswer: #### 6", 5),
        ("#### Step one\nAdd.\n#### 7", 7),
        ("#### 5 #### 7", None),
        ("##### 5", None),
        ("#### 5 <<5=5>>", None),
    ],
)
def test_where_the_number_is_looked_for(text, value):
    assert final_number(text) == value


@pytest.mark.parametrize(
    "text",
    ["9" * 10**6, "#### " + "9" * 10**6, "#### 1" + ",000" * 10**5, "####" * 250_000, "#### 1\n" * 100_000 + "x",
     "#### " + " " * 10**6 + "5", "#### 1/" + "1" * 10**6, "#### x\n" * 150_000, "#### " + "$" * 10**6],
    ids=range(9),
)  # fmt: skip
def test_a_huge_text_takes_no_time(text):
    started = time.process_time()
    final_number(text)
    parse_number(text)
    assert time.process_time() - started < 2
    assert parse_number("9" * (MAX_LENGTH + 1)) is None
    assert parse_number("9" * MAX_LENGTH) == 10**MAX_LENGTH - 1


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("0123456789.,/+-# $%\n")), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_number_or_none(text):
    for value in (parse_number(text), final_number(text), final_number("#### " + text)):
        assert value is None or isinstance(value, Fraction)
    if not any(map(str.isdecimal, text)):
        assert parse_number(text) is None


@given(
    digits=st.integers(-(10**24), 10**24),
    places=st.integers(0, 9),
    before=st.sampled_from(["", "$", "\u20ac"]),
    after=st.sampled_from(["", "%", " kg", "."]),
)
@settings(max_examples=200, deadline=None)
def test_a_decimal_survives_being_written(digits, places, before, after):
    number, expected = Decimal(digits).scaleb(-places), Fraction(digits, 10**places)
    sign = "-" if number < 0 else ""
    for text in (f"{abs(number):f}", f"{abs(number):,f}"):
        assert parse_number(f"{sign}{before}{text}{after}") == expected
    assert Decimal(number_text(expected)) == number
    assert not number_text(expected).endswith(".")
    assert "." not in number_text(expected) or not number_text(expected).endswith("0")


@given(st.fractions())
@settings(max_examples=200, deadline=None)
def test_a_fraction_survives_being_written(value):
    assert parse_number(number_text(value)) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [("24", "24"), ("-7", "-7"), ("0", "0"), ("0.2", "0.2"), ("-0.05", "-0.05"), ("12.50", "12.5"), ("1/8", "0.125"),
     ("1/3", "1/3"), ("-2/3", "-2/3"), ("120", "120"), ("1e10", "10000000000")],
)  # fmt: skip
def test_how_a_number_is_written(value, text):
    assert number_text(Fraction(value)) == text


# ---- real answers --------------------------------------------------------------------------


def real_answers() -> list[str]:
    if not GSM8K.is_dir():
        pytest.skip(f"no real data at {GSM8K}")
    lines = [line for split in ("train", "test") for line in (GSM8K / f"{split}.jsonl").open(encoding="utf-8")]
    return [json.loads(line)["answer"] for line in lines]


def test_every_real_answer():
    answers = real_answers()
    assert len(answers) == 8_792
    for answer in answers:
        assert final_number(answer) == int(answer.rpartition("####")[2].replace(",", ""))


def rewritten(rng: random.Random, value: int) -> str:
    """The same number as a model might put it."""
    digits = rng.choice([f"{abs(value)}", f"{abs(value):,}", f"{abs(value)}.0", f"{abs(value):,}.00", f"{abs(value)}.",
                         f"{3 * abs(value)}/3", f"0{abs(value)}"])  # fmt: skip
    if rng.random() < 0.2:
        digits = digits.translate({ord("0") + i: 0x0660 + i for i in range(10)})
    sign = rng.choice(["-", "\u2212"]) if value < 0 else rng.choice(["", "", "+"])
    before = rng.choice(["", "", "$", "\u20ac", "US$", "EUR "])
    number = rng.choice([sign + before + digits, before + sign + digits])
    after = rng.choice(["", ".", "%", " dollars", "kg", " apples left.", "</s>", "\r", "\n\nQuestion: 1 + 1?\n#### 2"])
    steps = rng.choice(["", "Nothing to say.\n", "#### Steps\n2 + 2 = <<2+2=4>>4.\n"])
    return f"{steps}####{rng.choice(['', ' ', '  '])}{number}{after}"


def test_real_answers_written_otherwise(seed):
    rng = random.Random(seed)
    for answer in rng.sample(real_answers(), 200):
        value = int(answer.rpartition("####")[2].replace(",", ""))
        text = rewritten(rng, value)
        assert same_answer(text, answer), (text, answer[-20:])
        for other in {value + 1, value - 1, value * 10 + 1, value + 1000, -value or 1}:
            assert not same_answer(rewritten(rng, other), answer), (other, value)
        assert not same_answer(text.replace("####", "###"), answer)


def test_no_number_is_the_same_as_none():
    assert not same_answer("5", "5")
    assert not same_answer("#### five", "#### five")
    assert not same_answer("#### 5", "five")
    assert same_answer("#### 1/2", "#### 0.50")
    assert not same_answer("#### 0.33333333333333333333", "#### 1/3")
