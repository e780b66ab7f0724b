"""Arithmetic for the calculator notes `<<48/2=24>>` that GSM8K's answers are annotated with.

As in Cobbe et al. (arXiv:2110.14168), what a model writes between `<<` and `=` is computed for it while it decodes. It
is untrusted text, which Python itself never reads: a parser of + - * / ( ) and plain decimals, on exact fractions.
"""

from __future__ import annotations

import re
from fractions import Fraction

from fastpeft.tasks.math_word_problems.answers import num_places, number_text

MAX_LENGTH = 100
"""The longest note of GSM8K has 45 characters. Without powers, the length bounds the numbers and so the time."""
MAX_DEPTH = 16

EXACT_PLACES, REPEATING_PLACES = 8, 12
_TOKEN = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+|[-+*/()])")


def evaluate(expression: str) -> str | None:
    """The value of `expression` as a note writes it, such as 24, 0.2 or -1.5; None for what is no arithmetic.

    Operators have their usual precedence, and + and - may be signs. Powers, names, percent signs, a division by zero,
    more than MAX_LENGTH characters or MAX_DEPTH parentheses in one another: None.

    A value is exact up to EXACT_PLACES decimals. What has more, as 10/3, gets REPEATING_PLACES, and what is that close
    to a shorter number is taken for it: 3.333333333333*3 is 10 again.
    """
    if len(expression) > MAX_LENGTH:
        return None
    try:
        value = _Parser(expression).value()
    except (_NoArithmetic, ZeroDivisionError):
        return None
    places = num_places(value)
    if places is None or places > EXACT_PLACES:
        short = round(value, EXACT_PLACES)
        is_near = short and abs(value - short) < Fraction(10, 10**REPEATING_PLACES)
        value = short if is_near else round(value, REPEATING_PLACES)
    return number_text(value)


class _NoArithmetic(Exception):
    pass


class _Parser:
    """Recursive descent; every call either takes a token or returns."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        position, text = 0, text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise _NoArithmetic
            self._tokens.append(match[1])
            position = match.end()
        self._tokens.reverse()
        self._depth = 0

    def value(self) -> Fraction:
        value = self._sum()
        if self._tokens:
            raise _NoArithmetic
        return value

    def _next(self) -> str | None:
        return self._tokens[-1] if self._tokens else None

    def _sum(self) -> Fraction:
        value = self._product()
        while self._next() in ("+", "-"):
            value = value + self._product() if self._tokens.pop() == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while self._next() in ("*", "/"):
            value = value * self._signed() if self._tokens.pop() == "*" else value / self._signed()
        return value

    def _signed(self) -> Fraction:
        negative = False
        while self._next() in ("+", "-"):
            negative ^= self._tokens.pop() == "-"
        value = self._atom()
        return -value if negative else value

    def _atom(self) -> Fraction:
        token = self._tokens.pop() if self._tokens else None
        if token == "(":
            self._depth += 1
            value = self._sum() if self._depth <= MAX_DEPTH else None
            if value is None or self._next() != ")":
                raise _NoArithmetic
            self._tokens.pop()
            self._depth -= 1
            return value
        if token is None or token in "+-*/)":
            raise _NoArithmetic
        return Fraction(token.removesuffix("."))
