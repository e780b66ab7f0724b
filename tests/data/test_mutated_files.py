"""Damaged files of rows: all rows come out, or those that do not are counted, or the file is refused in words."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpeft.config.schema import DatasetConfig
from fastpeft.errors import UserError
from fastpeft.tasks import load_task

SLOWER_S = 1.0
"""What a damaged file may take beyond an honest one's hundredths, in seconds of this process's CPU."""

WORDS = ("good", "bad", "film", "book", "a", "very", "long", "day;", "night,", "5", "don't", "so-so", "café")
LABELS = {"no": ("No", "NO", " no", "no "), "yes": ("Yes", "YES", "yes  ", "\tyes")}


@dataclass
class File:
    """Rows, and how they are written."""

    rng: random.Random
    rows: list[tuple[str, str]]
    suffix: str = "csv"
    delimiter: str = ","
    quoting: int = csv.QUOTE_MINIMAL
    is_plain: bool = False
    """A line a row, nothing enclosed and nothing doubled."""
    line_end: str = "\n"
    encoding: str = "utf-8"
    is_packed: bool = False
    num_short: int = 0
    """Rows with a field too many or too few."""
    blank_lines: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        lines = [self._line(row) for row in [("text", "label"), *self.rows]] if self.suffix != "jsonl" else [
            json.dumps({"text": text, "label": label}) for text, label in self.rows
        ]  # fmt: skip
        for place in self.rng.sample(range(1, len(lines)), self.num_short):
            cut = self.rng.random() < 0.5
            if self.suffix == "jsonl":
                lines[place] = lines[place][: len(lines[place]) // 2]
            else:
                lines[place] = "cut" if cut else f"{lines[place]}{self.delimiter}more"
        for blank in self.blank_lines:
            lines.insert(self.rng.randint(0, len(lines)), blank)
        data = (self.line_end.join(lines) + self.line_end).encode(self.encoding)
        path = folder / f"train.{self.suffix}{'.gz' * self.is_packed}"
        path.write_bytes(gzip.compress(data) if self.is_packed else data)
        return path

    def _line(self, row: tuple[str, str]) -> str:
        if self.is_plain:
            return self.delimiter.join(row)
        text = io.StringIO()
        csv.writer(text, delimiter=self.delimiter, quoting=self.quoting, lineterminator="\n").writerow(row)
        return text.getvalue().removesuffix("\n")  # without a line end of its own it encloses no field that holds one

    # ---- what may happen to it -------------------------------------------------------------

    def marks(self) -> None:
        """Marks anywhere in some texts."""
        for i in self.rng.sample(range(len(self.rows)), self.rng.randint(1, len(self.rows))):
            text, label = self.rows[i]
            places = sorted(self.rng.choices(range(len(text) + 1), k=self.rng.randint(1, 3)), reverse=True)
            for place in places:
                text = text[:place] + '"' + text[place:]
            self.rows[i] = text, label

    def marks_over_rows(self) -> None:
        """A mark opens in one row and closes in a later one."""
        first, last = sorted(self.rng.sample(range(len(self.rows)), 2))
        self.rows[first] = '"' + self.rows[first][0], self.rows[first][1]
        self.rows[last] = self.rows[last][0] + '"', self.rows[last][1]

    def plain(self) -> None:
        self.is_plain = True
        self.rows = [(text.replace(self.delimiter, " ").replace("\n", " "), label) for text, label in self.rows]

    def separator(self) -> None:
        self.delimiter = self.rng.choice(",;\t|")

    def several_lines(self) -> None:
        if not self.is_plain:
            self.rows = [(text.replace(" ", "\n", self.rng.randint(0, 2)), label) for text, label in self.rows]

    def all_enclosed(self) -> None:
        self.quoting = csv.QUOTE_ALL

    def blanks(self) -> None:
        self.blank_lines = self.rng.choices(["", "  ", " "], k=self.rng.randint(1, 5))

    def lengths(self) -> None:
        self.num_short = self.rng.randint(1, 3)

    def spellings(self) -> None:
        for i in self.rng.sample(range(len(self.rows)), 3):
            text, label = self.rows[i]
            self.rows[i] = text, self.rng.choice(LABELS.get(label, (label,)))

    def mark_of_the_encoding(self) -> None:
        self.encoding = self.rng.choice(["utf-8-sig", "utf-16", "utf-32"])

    def other_encoding(self) -> None:
        self.encoding = self.rng.choice(["cp1252", "utf-16-le"])

    def line_ends(self) -> None:
        self.line_end = self.rng.choice(["\r\n", "\r"])

    def packed(self) -> None:
        self.is_packed = True

    def json_lines(self) -> None:
        self.suffix = "jsonl"


MUTATIONS = (
    File.marks,
    File.marks_over_rows,
    File.separator,
    File.several_lines,
    File.all_enclosed,
    File.blanks,
    File.lengths,
    File.spellings,
    File.mark_of_the_encoding,
    File.other_encoding,
    File.line_ends,
    File.packed,
    File.json_lines,
)


def unmarked(texts: list[str]) -> Counter[str]:
    """Marks round a whole field may be the text's or the file's; white space at the ends is no difference."""
    return Counter("".join(text.replace('"', "").split()) for text in texts)


def check(data: st.DataObject, folder: Path) -> bool:
    """Whether the file was read."""
    rng = random.Random(data.draw(st.integers(0, 2**32), label="seed"))
    num_rows = data.draw(st.integers(12, 60), label="rows")
    rows = [
        (" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) + f" {i}", ("no", "yes")[i % 2]) for i in range(num_rows)
    ]
    file = File(rng, rows)
    if data.draw(st.booleans(), label="tsv"):
        file.suffix, file.delimiter = "tsv", "\t"
    for mutate in data.draw(st.lists(st.sampled_from(MUTATIONS), max_size=4, unique=True), label="mutations"):
        mutate(file)
    if file.suffix != "jsonl" and data.draw(st.booleans(), label="plain"):
        file.plain()
    path = file.write(folder)
    on_bad_row = data.draw(st.sampled_from(["error", "skip"]), label="on_bad_row")
    began_s = time.process_time()
    try:
        task = load_task(DatasetConfig(path=str(folder), on_bad_row=on_bad_row, validation_fraction=0.25))
    except UserError as error:
        return str(folder) not in str(error) and pytest.fail(f"names no file: {error}")
    finally:
        content = path.read_bytes()
        path.unlink()
        assert time.process_time() - began_s <= SLOWER_S, content
    texts, skipped = task.texts, sum(task.texts.skipped_rows.values())
    assert len(texts.train) + len(texts.validation) + skipped == num_rows, (task.notes, content)
    assert skipped == 0 or any(f"{skipped:,} malformed rows" in note for note in task.notes)
    assert skipped == 0 or on_bad_row == "skip"
    if not skipped:
        assert unmarked([*texts.train.text, *texts.validation.text]) == unmarked([text for text, _ in file.rows]), (
            content
        )
    return True


FIXTURE = [HealthCheck.function_scoped_fixture]


@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=FIXTURE)
def test_damaged_files_keep_their_rows_or_say_why_not(data, tmp_path):
    check(data, tmp_path)


@pytest.mark.soak
def test_many_damaged_files_keep_their_rows_or_say_why_not(tmp_path, capsys):
    read = []

    @given(data=st.data())
    @settings(max_examples=2000, deadline=None)
    def many(data):
        read.append(check(data, tmp_path))

    many()
    with capsys.disabled():
        print(f"{len(read)} damaged files: {sum(read)} read, {len(read) - sum(read)} refused")
    assert 0 < sum(read) < len(read)
