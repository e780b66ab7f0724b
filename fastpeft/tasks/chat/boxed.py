"""Whether two answers in LaTeX are the same: the last box of each, through the library math-verify.

Where that library takes too much or too little for the same, MATH (Hendrycks et al., arXiv:2103.03874) decides: a
percent sign is no part of a number; a unit may be left out, but not be another one; words are compared as words.
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from fastpeft.errors import UserError

LIMIT_S = 5.0
"""Of CPU time, for one pair: a busy machine makes no answer wrong. Some expressions keep SymPy busy for ever."""
_START_S, _LOOK_EVERY_S = 60.0, 0.1
_PACKAGE = "math_verify"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|textrm|mathbf)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d})\]])\s*\\(?:text|mbox|mathrm|textrm)\s*\{\s*([^{}]*?)\s*\}\s*(?:\^\{?[23]\}?)?\s*$")
_DEGREES = re.compile(r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°)")
_WORDS = re.compile(r"\(?[^\W\d_]{2,}(?:[ ,.'-]+[^\W\d_]+)*\)?|\([^\W\d_]\)")
_LAYOUT = (
    (re.compile(r"(?<!\\)\\(?:(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|[,!;:])"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\?%|\\?\$"), ""),
    (re.compile(r"~|(?<!\\)\\ "), " "),
)


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed or \\fbox of a text, braces within it counted; None where none is whole."""
    for match in reversed(list(_BOX.finditer(text))):
        inner = _braced(text, match.end())
        if inner is not None:
            return inner.strip()
    return None


def _braced(text: str, start: int) -> str | None:
    if not text.startswith("{", start):
        bare = re.compile(r"\s*([^\s{}$]+)").match(text, start)  # \boxed 5
        return bare[1] if bare else None
    depth, skip = 0, False
    for at in range(start, len(text)):
        if skip or text[at] == "\\":
            skip = not skip
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start + 1 : at]
    return None


def plain(latex: str) -> tuple[str, str]:
    """(an answer without what only sets it, its unit; empty for none)."""
    text = latex.strip().strip("$").rstrip(".")
    for pattern, instead in _LAYOUT:
        text = pattern.sub(instead, text)
    text = _DEGREES.sub("", text)
    unit = _UNIT.search(text)
    if unit is None:
        return text.strip(), ""
    return text[: unit.start()].strip(), unit[1].strip().rstrip(".").lower()


def as_words(text: str) -> str | None:
    """An answer that is words, such as a name, a weekday or a choice's letter in brackets; None for mathematics."""
    told = _TEXT.sub(lambda match: f" {match[1]} ", text).strip()
    is_text = _TEXT.fullmatch(text.strip()) is not None
    if not (is_text or _WORDS.fullmatch(told)) or "\\" in told:
        return None
    return " ".join(told.lower().strip("().").split())


class MathVerifier:
    """Compares answers in a process of its own, which is ended where a pair takes too long: whatever thread asks.

    The library's own time limits are alarms, which Python allows in a main thread only.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.require()
        self._limit_s, self._process = limit_s, None
        self.num_late = 0
        """Pairs that took too long, and count as different."""

    @staticmethod
    def is_installed() -> bool:
        return find_spec(_PACKAGE) is not None

    @classmethod
    def require(cls) -> None:
        """Raises UserError where the library is not installed."""
        if not cls.is_installed():
            raise UserError(
                "evaluation.exact_match boxed: compares answers with the package math-verify: pip install "
                "'fastpeft[math]'; or set evaluation.exact_match=off"
            )

    def same(self, answer: str | None, reference: str | None) -> bool:
        """Whether the answer of one text is that of the reference. The order matters: see verify_answers."""
        if answer is None or reference is None:
            return False
        (given, unit), (wanted, wanted_unit) = plain(answer), plain(reference)
        if unit and wanted_unit and unit != wanted_unit:
            return False
        if given == wanted:
            return bool(wanted)
        words, wanted_words = as_words(given), as_words(wanted)
        if words is not None or wanted_words is not None:
            return (words or _letter(given)) == (wanted_words or _letter(wanted))
        return self._ask(given, wanted)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, given: str, wanted: str) -> bool:
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([wanted, given]).encode() + b"\n")
            found = self._read(self._limit_s)
        except BrokenPipeError:
            found = None
        if found is None:
            self.num_late += 1
            self.close()
        return found == b"1"

    def _start(self) -> None:
        """By its path: as a module it would import all that its package does."""
        command = [sys.executable, "-P", str(Path(__file__).with_name("verify_answers.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        if self._read(_START_S) is None:
            self.close()
            raise UserError(
                f"math-verify could not be loaded within {_START_S:.0f} s of CPU time to compare answers with; set "
                "evaluation.exact_match=off"
            )

    def _read(self, limit_s: float) -> bytes | None:
        """One line; None where it does not come within so much CPU time, or the process has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        began_s = self._cpu_s()
        while not select.select([self._process.stdout], [], [], min(limit_s, _LOOK_EVERY_S))[0]:
            if self._cpu_s() - began_s > limit_s:
                return None
        return self._process.stdout.readline().strip() or None

    def _cpu_s(self) -> float:
        """That the process has used."""
        assert self._process is not None
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system


def _letter(text: str) -> str:
    """A single letter is a choice where the other side is one in brackets. Anything else is no word."""
    return text.lower() if len(text) == 1 and text.isalpha() else f"no word: {text}"
