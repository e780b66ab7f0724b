"""The number that an answer to a word problem ends with, exactly.

GSM8K (Cobbe et al., arXiv:2110.14168) writes it after `####`, and its authors score the first `####` that a number
follows: a model that runs on past its answer is judged by the answer. So do these functions. They are stricter about
what a number is: the authors' take `1,2,3` for 123; here a text that is not plainly one number is none.
"""

from __future__ import annotations

import re
from fractions import Fraction

MARK = "####"

MAX_LENGTH = 400
"""A longer line holds no answer. Bounds the time and the size of numbers."""

_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>[+-]?)
    (?:[A-Z]{{3}}\ |[A-Z]{{0,3}}[$¢£¤¥€₩₪₫₱₴₹₺₽₿]\ ?)?(?P<inner>[+-]?)
    (?:(?P<decimal>{_INTEGER}\.[0-9]*|\.[0-9]+)
      |(?:(?P<whole>{_INTEGER})\ (?=[0-9]+\ ?/))?(?P<over>{_INTEGER})(?:\ ?/\ ?(?P<under>{_INTEGER}))?)
    (?P<unit>.*)
    """,
    re.VERBOSE | re.DOTALL,
)
# Minus as Unicode has it, the slash of typeset fractions, spaces that do not break, full-width forms.
_SIGNS = str.maketrans("\u2212\u2044\u00a0\u202f\uff0b\uff0d\uff0c\uff0e\uff0f\uff04\uff05", "-/  +-,./$%")


def parse_number(text: str) -> Fraction | None:
    """The number that `text` consists of, between an optional currency and an optional unit; None for anything else.

    Takes -5, +3, 1,234,567, 3.50, .5, 5., 1/2, 1 1/2, $18, -$5, US$5, USD 5, 18%, 5kg, `18 dollars.`, U+2212 as minus
    and decimal digits of every script. Units are not read: 50% is 50, `5 million` is 5. A second number, a digit group
    that is not of three, an exponent or a second sign make it None, as does a denominator of 0.
    """
    if len(text) > MAX_LENGTH:
        return None
    match = _NUMBER.fullmatch("".join(map(_plain_digit, text.strip().translate(_SIGNS))))
    if match is None or (match["sign"] and match["inner"]) or any(map(str.isnumeric, match["unit"])):
        return None
    if match["decimal"]:
        value = _decimal(match["decimal"])
    else:
        under = int(match["under"].replace(",", "")) if match["under"] else 1
        if not under:
            return None
        value = _decimal(match["whole"] or "0") + Fraction(int(match["over"].replace(",", "")), under)
    return -value if "-" in (match["sign"], match["inner"]) else value


def final_number(text: str) -> Fraction | None:
    """The number after the first `####` that a number follows on its line; None where there is none."""
    for line in text.split("\n"):
        _, mark, rest = line.partition(MARK)
        value = parse_number(rest) if mark else None
        if value is not None:
            return value
    return None


def same_answer(text: str, reference: str) -> bool:
    """Whether both texts end in the same number. False where either has none."""
    value = final_number(text)
    return value is not None and value == final_number(reference)


def number_text(value: Fraction) -> str:
    """As GSM8K writes numbers: integers plain, decimals in full where they end, else a fraction."""
    places = num_places(value)
    if places is None:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def num_places(value: Fraction) -> int | None:
    """Digits after the decimal point; None if they never end."""
    rest, counts = value.denominator, []
    for factor in (2, 5):
        count = 0
        while rest % factor == 0:
            rest, count = rest // factor, count + 1
        counts.append(count)
    return max(counts) if rest == 1 else None


def _decimal(text: str) -> Fraction:
    whole, _, places = text.replace(",", "").partition(".")
    return Fraction(int(whole + places or "0"), 10 ** len(places))


def _plain_digit(character: str) -> str:
    return str(int(character)) if character.isdecimal() else character
