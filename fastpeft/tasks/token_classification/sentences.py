"""Tagged sentences, and how they are read from rows with a list of words and a list of tags each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastpeft.data.rows import DataError, Row, Split, is_unicode
from fastpeft.data.splitting import sample

OnBadRow = Literal["error", "skip"]

_WORD_COLUMNS = ("tokens", "words", "sentence", "text")
_TAG_COLUMNS = ("ner_tags", "tags", "labels", "label", "ner")


@dataclass(frozen=True)
class Sentences:
    """Parallel lists: the words of each sentence, a tag a word, and where the sentence stands."""

    words: list[list[str]]
    tags: list[list[str]]
    where: list[str]
    """Names each sentence in messages: the source and the line or row of its first word."""
    source: str
    num_skipped: int = 0
    """Sentences left out under on_bad_row: skip."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the data were read."""

    def __len__(self) -> int:
        return len(self.words)

    def sample(self, limit: int) -> Sentences:
        """As many sentences, drawn at random, the same ones whatever the seed; 0 means all."""
        return self.pick(sample(len(self), limit)) if limit else self

    def pick(self, rows: Iterable[int]) -> Sentences:
        """The sentences at `rows`, in that order."""
        rows = list(rows)
        return replace(
            self,
            words=[self.words[i] for i in rows],
            tags=[self.tags[i] for i in rows],
            where=[self.where[i] for i in rows],
        )

    @property
    def texts(self) -> list[tuple[tuple[str, ...]]]:
        """Of each sentence its words, as one text."""
        return [(tuple(words),) for words in self.words]

    @property
    def num_words(self) -> int:
        return sum(map(len, self.words))


def sentences_from_rows(
    split: Split,
    words_column: str | None = None,
    tags_column: str | None = None,
    names: Sequence[str] | None = None,
    on_bad_row: OnBadRow = "error",
) -> Sentences:
    """Rows as jsonl, parquet and the hub give them.

    Args:
        words_column, tags_column: as the user named them; None picks the usual names.
        names: of the class numbers that the tags may be, in the order of the numbers.

    Raises:
        DataError: a missing column; a malformed row, unless it is to be skipped; no usable row.
    """
    if not split.rows:
        raise DataError(f"{split.source}: has no rows")
    columns = choose_columns(split, words_column, tags_column)
    words, tags, where = [], [], []
    for row in split.rows:
        place = f"{split.source}:{row.line}"
        fault = row.fault or _fault(row, columns, names)
        if fault is None:
            words.append(list(row.values[columns[0]]))
            tags.append([_tag(value, names) for value in row.values[columns[1]]])
            where.append(place)
        elif on_bad_row == "error":
            raise DataError(f"{place}: {fault}. Mend the row, or set dataset.on_bad_row=skip")
    if not words:
        raise DataError(f"{split.source}: all {len(split.rows):,} rows are malformed")
    return Sentences(words, tags, where, split.source, num_skipped=len(split.rows) - len(words))


def choose_columns(split: Split, words_column: str | None = None, tags_column: str | None = None) -> tuple[str, str]:
    """(words, tags): as named by the user, else the first usual name whose column holds lists."""
    have = list(dict.fromkeys(name for row in split.rows for name in row.values))
    if not have:
        first = split.rows[0]
        raise DataError(f"{split.source}:{first.line}: {first.fault or 'is empty'}, and so is every other row")
    for key, column in (("text", words_column), ("label", tags_column)):
        if column is not None and column not in have:
            raise DataError(
                f"{split.source}: dataset.columns.{key} is {column!r}, but the columns are {', '.join(have)}"
            )
    lists = {name for row in split.rows for name, value in row.values.items() if isinstance(value, (list, tuple))}
    words = words_column or next((name for name in _WORD_COLUMNS if name in lists), None)
    tags = tags_column or next((name for name in _TAG_COLUMNS if name in lists and name != words), None)
    for what, key, column in (("words", "text", words), ("tags", "label", tags)):
        if column is None:
            raise DataError(
                f"{split.source}: which column holds each row's list of {what}? Set dataset.columns.{key}; the columns "
                f"are {', '.join(have)}"
            )
    assert words is not None
    assert tags is not None
    return words, tags


def _fault(row: Row, columns: tuple[str, str], names: Sequence[str] | None) -> str | None:
    words, tags = (row.values.get(column) for column in columns)
    for column, value in zip(columns, (words, tags)):
        if not isinstance(value, (list, tuple)):
            return f"column {column!r} holds {value!r:.80}, expected a list"
    assert isinstance(words, (list, tuple))
    assert isinstance(tags, (list, tuple))
    if len(words) != len(tags):
        return f"column {columns[0]!r} holds {len(words)} words, but {columns[1]!r} {len(tags)} tags"
    if not words:
        return f"column {columns[0]!r} is an empty list"
    for number, word in enumerate(words, 1):
        if not isinstance(word, str):
            return f"word {number} is {word!r:.80}, expected text"
        if not is_unicode(word):
            return f"word {number} holds half of a surrogate pair, which is no character"
    faults = (fault for number, tag in enumerate(tags, 1) if (fault := _tag_fault(number, tag, names)))
    return next(faults, None)


def _tag_fault(number: int, tag: Any, names: Sequence[str] | None) -> str | None:
    if isinstance(tag, str):
        return None if tag else f"tag {number} is empty"
    if isinstance(tag, bool) or not isinstance(tag, int):
        return f"tag {number} is {tag!r:.80}, expected text or a class number"
    if names is None:
        return f"tag {number} is the class number {tag}, and nothing names the classes: name them in dataset.labels"
    if not 0 <= tag < len(names):
        return f"tag {number} is the class number {tag}, but the classes are 0 to {len(names) - 1}"
    return None


def _tag(value: str | int, names: Sequence[str] | None) -> str:
    if isinstance(value, str):
        return value
    assert names is not None
    return names[value]
