"""Sentences from CoNLL-style files: one word per line in columns, a blank line after each sentence.

Columns are parted by tabs if most lines hold one, else by runs of spaces. Only the ASCII space, the tab and the line
feed part anything: a word may consist of other white space, or of a variation selector, and stays a word.

A line that begins with `# ` or `#` and a tab is a comment if it stands before a sentence's first word and does not
look like the file's other lines: it has another number of columns, or its tag is no tag. So `#` may be a word.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from fastpeft.data.rows import DataError
from fastpeft.data.text_files import open_bytes, read_text
from fastpeft.tasks.token_classification.sentences import OnBadRow, Sentences

CONLL_SUFFIXES = (".conll", ".conll2003", ".annotated", ".bio", ".iob", ".iob2", ".ner")
"""Of files that are nothing else; of others looks_like_conll tells."""

WORD_COLUMN, TAG_COLUMN = 0, -1
"""The columns where nobody says otherwise: first the word, last the tag."""

_SPACE = " \t"
_RUNS = re.compile(r"[ \t]+")
_TAG = re.compile(r"O|[BIESLU](-.+)?")
_DOCUMENT = re.compile(r"-DOCSTART-(?=[ \t]|$)")
_COMMENT = re.compile(r"#([ \t]|$)")
_NUM_LOOKED_AT = 200
_NUM_BYTES_LOOKED_AT = 1 << 16


def looks_like_conll(path: Path) -> bool:
    """Whether the last column of the file's first lines holds tags such as O and B-PER.

    A header, or a few lines of another kind, do not change the answer: nine lines in ten decide, and one of them has
    to have O for a tag.
    """
    try:
        with open_bytes(path) as file:
            start = file.read(_NUM_BYTES_LOOKED_AT)
    except (OSError, EOFError, zlib.error):
        return False
    if len(start) == _NUM_BYTES_LOOKED_AT:
        start = start.rpartition(b"\n")[0]  # the last line is cut
    text = start.decode("utf-8-sig", errors="ignore")
    lines = list(islice((line for line in _lines(text) if not _is_other(line)), _NUM_LOOKED_AT))
    separator = _separator(lines)
    fields = [_columns(line, separator) for line in lines]
    tags = [columns[-1] for columns in fields if len(columns) > 1]
    num_tags = sum(_TAG.fullmatch(tag) is not None for tag in tags)
    return num_tags > 0 and num_tags >= 0.9 * len(fields) and "O" in tags


def read_conll(
    path: Path, word_column: int = WORD_COLUMN, tag_column: int = TAG_COLUMN, on_bad_row: OnBadRow = "error"
) -> Sentences:
    """The sentences of a file; those that mark a document's beginning (-DOCSTART-) are left out, and counted in a note.

    Args:
        word_column, tag_column: numbers from 0; a negative one counts from the end.
        on_bad_row: "skip" leaves out a sentence with a malformed line, and counts it.

    Raises:
        DataError: a file that cannot be read or has no sentence; columns that it lacks; a malformed line, unless its
            sentence is to be skipped. A line is malformed without its word or tag, and with another number of columns
            than most lines if one of the two is counted from the end: which column is meant would be a guess.
    """
    text, notes = read_text(path)
    lines = _lines(text)
    form = _Form.of(path, lines, word_column, tag_column)
    reader = _Reader(path, form, on_bad_row, notes)
    for number, line in enumerate(lines, 1):
        reader.take(number, line)
    reader.end_sentence()
    return reader.sentences()


@dataclass(frozen=True)
class _Form:
    """How a file's lines are to be read."""

    separator: str
    """A tab, or a space for runs of either."""
    width: int
    """Columns of most lines."""
    word_column: int
    tag_column: int
    tags: frozenset[str]
    """What stands in the tag column of lines that begin with no `#`."""

    @classmethod
    def of(cls, path: Path, lines: list[str], word_column: int, tag_column: int) -> _Form:
        usual = [line for line in lines if not _is_other(line)]
        if not usual:
            raise DataError(f"{path}: has no sentences")
        separator = _separator(usual)
        fields = [_columns(line, separator) for line in usual]
        [(width, _)] = Counter(map(len, fields)).most_common(1)
        for key, column in (("text", word_column), ("label", tag_column)):
            if not -width <= column < width:
                raise DataError(
                    f"{path}: dataset.columns.{key} is {column}, but the lines have {width} columns, from 0"
                )
        if word_column % width == tag_column % width:
            only = (
                "have one column only" if width == 1 else f"are to have words and tags in column {word_column % width}"
            )
            raise DataError(f"{path}: the lines {only}; expected a word and its tag")
        tags = frozenset(columns[tag_column] for columns in fields if len(columns) == width)
        return cls(separator, width, word_column, tag_column, tags)

    def word_and_tag(self, line: str) -> tuple[str, str] | str:
        """Of a line; or what is wrong with it."""
        columns = _columns(line, self.separator)
        if len(columns) != self.width:
            has = f"has {len(columns)} column{'s' * (len(columns) != 1)}, most lines {self.width}"
            needed = max(self.word_column, self.tag_column)
            if min(self.word_column, self.tag_column) < 0 or len(columns) <= needed:
                return has
        word, tag = columns[self.word_column], columns[self.tag_column]
        if not word or not tag:
            return f"has no {'tag' if word else 'word'}"
        return word, tag

    def is_comment(self, line: str) -> bool:
        """Of a line before the first word of a sentence."""
        if not _COMMENT.match(line):
            return False
        columns = _columns(line, self.separator)
        if len(columns) != self.width:
            return True
        tag = columns[self.tag_column]
        return tag not in self.tags and _TAG.fullmatch(tag) is None


@dataclass
class _Reader:
    path: Path
    form: _Form
    on_bad_row: OnBadRow
    notes: tuple[str, ...] = ()
    """Of how the text was read."""
    words: list[list[str]] = field(default_factory=list)
    tags: list[list[str]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    num_skipped: int = 0
    num_documents: int = 0
    num_comments: int = 0
    _current: list[tuple[str, str]] = field(default_factory=list)
    _first_line: int = 0
    _is_bad: bool = False

    def take(self, number: int, line: str) -> None:
        if not line.strip(_SPACE):
            self.end_sentence()
        elif _DOCUMENT.match(line):
            self.end_sentence()
            self.num_documents += 1
        elif not self._current and not self._is_bad and self.form.is_comment(line):
            self.num_comments += 1
        else:
            self._take_word(number, line)

    def _take_word(self, number: int, line: str) -> None:
        found = self.form.word_and_tag(line)
        if isinstance(found, str):
            if self.on_bad_row == "error":
                raise DataError(
                    f"{self.path}:{number}: {found}: {line!r:.80}. Mend the line, name the columns in dataset.columns, "
                    "or set dataset.on_bad_row=skip to leave out its sentence"
                )
            self._is_bad = True
            return
        if not self._current:
            self._first_line = number
        self._current.append(found)

    def end_sentence(self) -> None:
        if self._is_bad:
            self.num_skipped += 1
        elif self._current:
            self.words.append([word for word, _ in self._current])
            self.tags.append([tag for _, tag in self._current])
            self.where.append(f"{self.path}:{self._first_line}")
        self._current, self._is_bad = [], False

    def sentences(self) -> Sentences:
        if not self.words:
            raise DataError(f"{self.path}: all {self.num_skipped:,} sentences are malformed")
        counts = ((self.num_documents, "-DOCSTART-"), (self.num_comments, "comment"))
        notes = tuple(
            f"{self.path}: {count:,} {what} line{'s' * (count != 1)} left out" for count, what in counts if count
        )
        every = (*self.notes, *notes)
        return Sentences(self.words, self.tags, self.where, str(self.path), self.num_skipped, every)


def _lines(text: str) -> list[str]:
    """Lines end in a line feed, with or without a carriage return before it; str.splitlines would end one at U+2028."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _is_other(line: str) -> bool:
    """Whether the line is no example of a word's line: blank, a document's mark, or perhaps a comment."""
    return not line.strip(_SPACE) or _DOCUMENT.match(line) is not None or _COMMENT.match(line) is not None


def _separator(lines: list[str]) -> str:
    return "\t" if 2 * sum("\t" in line for line in lines) > len(lines) else " "


def _columns(line: str, separator: str) -> list[str]:
    """Between tabs an empty column is one; spaces at the ends and beside a tab belong to none."""
    if separator == " ":
        return _RUNS.split(line.strip(_SPACE))
    return [column.strip(" ") for column in line.rstrip(_SPACE).split("\t")]
