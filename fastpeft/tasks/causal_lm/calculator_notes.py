"""Calculator notes, `<<48/2=24>>`, whose results are computed and inserted during decoding (Cobbe et al.,
arXiv:2110.14168, section 2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_EXPRESSION = 200
"""Longest expression, in characters. The model itself finishes longer ones."""


class Notes:
    """The partial answers of a batch, and the tokens that are still to be inserted into them.

    A note is completed where the text of the answer, decoded, ends in `<<EXPRESSION=`, whatever tokens spell it, and
    `complete` knows the result: the next tokens are then those of `RESULT>>`. A token that has characters after the
    `=`, such as `=2`, is the model's own beginning of a result, and its note is left to it. So is one whose result the
    tokenizer cannot append without changing the text before it.
    """

    def __init__(
        self,
        complete: Callable[[str], str | None],
        tokenizer: PreTrainedTokenizerBase,
        num_rows: int,
        eos_tokens: Collection[int],
    ) -> None:
        self._complete = complete
        self._tokenizer = tokenizer
        self._eos_tokens = frozenset(eos_tokens)
        self._answers: list[list[int]] = [[] for _ in range(num_rows)]
        self._forced: list[deque[int]] = [deque() for _ in range(num_rows)]
        self._ends_open: dict[int, bool] = {}

    def read(self, chosen: list[int], rows: list[int]) -> list[int]:
        """The next token of each of these rows: the model's choice, unless a token is to be inserted."""
        return [self._next(row, token) for row, token in zip(rows, chosen, strict=True)]

    def _next(self, row: int, token: int) -> int:
        answer, forced = self._answers[row], self._forced[row]
        if answer and answer[-1] in self._eos_tokens:
            return token
        if forced:
            token = forced.popleft()
        answer.append(token)
        if not forced and self._ends_in_equals(token):
            forced.extend(self._result(answer))
        return token

    def _ends_in_equals(self, token: int) -> bool:
        if token not in self._ends_open:
            self._ends_open[token] = self._text([token]).endswith("=")
        return self._ends_open[token]

    def _result(self, answer: list[int]) -> list[int]:
        text = self._text(answer)
        expression = open_expression(text)
        result = None if expression is None else self._complete(expression)
        if result is None:
            return []
        wanted = text + result + ">>"
        return next((t for t in self._spellings(result + ">>") if self._text(answer + t) == wanted), [])

    def _spellings(self, text: str) -> list[list[int]]:
        """Of `text` after a `=`, and by itself: some tokenizers put a space before what they are given."""
        after = self._encode("=" + text)
        cut = next((i for i in range(1, len(after)) if self._text(after[:i]).strip() == "="), None)
        return [*([] if cut is None else [after[cut:]]), self._encode(text)]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _text(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def open_expression(text: str) -> str | None:
    """The text between the last `<<` and the `=` at the end of `text`, if that note is still open; else None."""
    _, opened, expression = text[-LONGEST_EXPRESSION - 3 : -1].rpartition("<<")
    return expression if opened and text.endswith("=") and expression and ">>" not in expression else None
