"""csv and tsv: which marks are a file's and which its text's, told from rows of both sorts and from real files."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import pytest

from fastpeft.config.schema import ColumnsConfig, DatasetConfig
from fastpeft.data.local import read_split
from fastpeft.data.rows import DataError, Split
from tests.support.classifiers import load_texts
from tests.support.real_data import DATA

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
LABELS = ("no", "yes")
MARKS_ARE_TEXT = "its quotation marks are text"


def texts_of(split: Split, column: str = "sentence") -> list[str]:
    assert [row.fault for row in split.rows] == [None] * len(split.rows)
    return [row.values[column] for row in split.rows]


def write_plain(path: Path, texts: list[str], delimiter: str = "\t", header: bool = True) -> Path:
    """A line a row, nothing enclosed and nothing doubled."""
    lines = [f"sentence{delimiter}label"] * header
    lines += [f"{text}{delimiter}{LABELS[i % 2]}" for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_quoted(path: Path, texts: list[str], delimiter: str = "\t", quoting: int = csv.QUOTE_MINIMAL) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerows([["sentence", "label"], *([text, LABELS[i % 2]] for i, text in enumerate(texts))])
    return path


# ---- marks that are text -------------------------------------------------------------------


def test_bare_marks_are_text_and_that_is_said(tmp_path):
    texts = ['He said: "Yes." Then he left.', '"Yes" was all', "no marks", '5" and 7"', '"The whole of it."']
    path = write_plain(tmp_path / "train.tsv", texts)
    split = read_split(path)
    assert texts_of(split) == texts
    assert split.notes == (f"{path}: {MARKS_ARE_TEXT} and enclose no fields: 5 rows",)


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_marks_that_open_in_one_row_and_close_in_a_later_one_join_nothing(tmp_path, suffix):
    """A reader that takes them for the format's gives 44 rows of two whole fields each, and no fault."""
    texts = [f"text {i}" for i in range(80)]
    texts[20], texts[56] = '"And so it began', 'and so it ended"'
    delimiter = "\t" if suffix == "tsv" else ","
    path = write_plain(tmp_path / f"train.{suffix}", texts, delimiter)
    with path.open(newline="") as file:
        assert len(list(csv.reader(file, delimiter=delimiter, strict=True))) == 1 + 44
    split = read_split(path)
    assert texts_of(split) == texts
    assert [row.line for row in split.rows] == list(range(2, 82))
    assert any(MARKS_ARE_TEXT in note for note in split.notes)


def test_a_bad_row_between_marks_is_found(tmp_path):
    """The marks would join it with its neighbours, and nothing would be wrong with the row that comes of it."""
    texts = [f"text {i}" for i in range(80)]
    texts[20], texts[56], texts[30] = '"And so it began', 'and so it ended"', "text\tmore"
    path = write_plain(tmp_path / "train.tsv", texts)
    faults = {row.line: row.fault for row in read_split(path).rows if row.fault}
    assert faults == {32: "has 3 fields, the header 2"}


def test_a_mark_that_never_closes_takes_no_row(tmp_path):
    texts = ["a", '"and so it began', *(f"text {i}" for i in range(40))]
    assert texts_of(read_split(write_plain(tmp_path / "train.tsv", texts))) == texts


def test_marks_of_any_text_without_delimiters_come_back_from_a_plain_file(tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(30):
        texts = ["".join(rng.choices('ab" ', k=rng.randint(1, 9))) + "x" for _ in range(rng.randint(4, 60))]
        texts.append('a "bare" mark')
        assert texts_of(read_split(write_plain(tmp_path / "train.tsv", texts))) == texts


# ---- marks that enclose --------------------------------------------------------------------


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_reviews_of_several_lines_keep_their_rows(tmp_path, suffix, quoting, seed):
    rng = random.Random(seed)
    texts = [
        "\n".join(f'line {i}, it "said"' for i in range(rng.randint(1, 4))) if i % 3 else f"short {i}"
        for i in range(40)
    ]
    path = write_quoted(tmp_path / f"train.{suffix}", texts, "\t" if suffix == "tsv" else ",", quoting)
    split = read_split(path)
    assert texts_of(split) == texts
    num_lines = path.read_text().count("\n")
    assert split.notes == (
        f"{path}: its quotation marks enclose fields of several lines: 40 rows in {num_lines - 1} lines",
    )
    assert split.rows[-1].line == num_lines


def test_a_field_of_two_lines_that_look_like_rows_is_one_field_of_a_csv(tmp_path):
    """Each line has the header's number of fields; but what would be the label is none of the other rows'."""
    texts = [f"text {i}" for i in range(30)]
    texts[7] = "Hello, I liked it\nVery good"
    path = write_quoted(tmp_path / "train.csv", texts, ",")
    assert path.read_text().splitlines()[8:10] == ['"Hello, I liked it', 'Very good",yes']
    assert texts_of(read_split(path)) == texts


@pytest.mark.parametrize("texts", [["a", "b", "c"], ["a, b", 'she said "no"', "c"]])
@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_fields_that_are_all_enclosed_lose_their_marks(tmp_path, texts, suffix):
    path = write_quoted(tmp_path / f"t.{suffix}", texts, "\t" if suffix == "tsv" else ",", csv.QUOTE_ALL)
    assert texts_of(read_split(path)) == texts


def test_a_column_that_is_enclosed_throughout_is_enclosed(tmp_path):
    """As R and others write words, but not numbers."""
    path = tmp_path / "train.tsv"
    path.write_text('"sentence"\t"label"\n' + "".join(f'"text {i}"\t{i % 2}\n' for i in range(9)))
    split = read_split(path)
    assert split.columns == ["sentence", "label"]
    assert texts_of(split) == [f"text {i}" for i in range(9)]


def test_a_header_in_marks_that_hold_commas_names_its_columns(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('"a, first","a, second"\n1,2\n')
    assert read_split(path).columns == ["a, first", "a, second"]


def test_a_csv_with_a_broken_row_is_still_quoted(tmp_path):
    """Else its well-formed rows would be blamed."""
    path = tmp_path / "train.csv"
    rows = "".join(f'"one, two {i}",yes\n' for i in range(20))
    path.write_text(f"sentence,label\n{rows}a,b,c\n{rows}")
    faults = {row.line: row.fault for row in read_split(path).rows if row.fault}
    assert faults == {22: "has 3 fields, the header 2"}


def test_a_csv_with_a_mark_that_never_closes_is_still_quoted(tmp_path):
    """And the mark takes no row: its line is a row by itself."""
    path = tmp_path / "train.csv"
    rows = [f"text {i},yes" for i in range(20)]
    path.write_text("\n".join(["sentence,label", '"one, two",no', *rows, '"and so it began,yes', *rows]))
    split = read_split(path)
    assert texts_of(split) == ["one, two", *(texts := [f"text {i}" for i in range(20)]), '"and so it began', *texts]
    assert split.notes == (f"{path}: 1 row has a quotation mark that encloses nothing and is text",)


def test_a_mark_that_never_closes_in_a_line_that_is_no_row_is_one_bad_row(tmp_path):
    path = tmp_path / "train.csv"
    rows = [f"text {i},yes" for i in range(20)]
    path.write_text("\n".join(["sentence,label", '"one, two",no', *rows, '"and so, it began,yes', *rows]))
    split = read_split(path)
    assert {row.line: row.fault for row in split.rows if row.fault} == {
        23: "has a quotation mark that encloses no field"
    }
    assert len(split.rows) == 42


def test_marks_that_join_rows_of_a_quoted_csv_by_accident_join_none(tmp_path):
    """The marks of one text open in its row and close in a later one; others enclose fields that need it."""
    texts = [f"text {i}" if i % 5 or 22 < i < 58 else f"one, two {i}" for i in range(80)]
    path = write_quoted(tmp_path / "train.csv", texts, ",")
    lines = path.read_text().splitlines()
    texts[22], texts[58] = '"And so it began', 'and so it ended"'
    lines[23], lines[59] = f"{texts[22]},no", f"{texts[58]},no"
    path.write_text("\n".join(lines))
    with path.open(newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 44
    assert texts_of(read_split(path)) == texts


def test_marks_that_join_two_rows_of_a_label_spelt_once(tmp_path):
    lines = [f"text {i}\t{LABELS[i % 2]}" for i in range(20)]
    lines[7], lines[8] = '"text 7\tYes', 'text 8"\tno'
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    assert texts_of(read_split(path))[6:9] == ["text 6", '"text 7', 'text 8"']


def test_a_blank_line_before_the_header(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("  \n\nsentence;label\na;no\nb;yes\n")
    assert texts_of(read_split(path)) == ["a", "b"]


def test_one_broken_row_of_a_file_whose_fields_are_all_enclosed(tmp_path):
    path = write_quoted(tmp_path / "train.csv", [f"text {i}" for i in range(30)], ",", csv.QUOTE_ALL)
    path.write_text(path.read_text() + '"text" and more,"no"\n')
    split = read_split(path)
    assert [row.values.get("sentence") for row in split.rows[:30]] == [f"text {i}" for i in range(30)]
    assert split.rows[29].values["label"] == "yes"


def test_marks_behind_backslashes(tmp_path):
    """As MySQL and R write them."""
    texts = ["a, b", 'she said "no", and left', "c", '"whole"']
    lines = ['"' + text.replace('"', '\\"') + f'",{LABELS[i % 2]}' for i, text in enumerate(texts)]
    path = tmp_path / "train.csv"
    path.write_text("sentence,label\n" + "\n".join(lines) + "\n")
    split = read_split(path)
    assert texts_of(split) == texts
    assert split.notes == (f"{path}: backslashes stand before the quotation marks that are text",)


def test_a_field_that_begins_with_a_tab_and_fields_of_several_lines(tmp_path):
    """As some of Amazon's reviews: a line of such a field has as many tabs as a row."""
    texts = [f"Title {i}\n\tbody of {i}\nend" for i in range(40)]
    path = write_quoted(tmp_path / "train.tsv", texts)
    split = read_split(path)
    assert texts_of(split) == texts
    assert split.notes == (f"{path}: its quotation marks enclose fields of several lines: 40 rows in 120 lines",)


def test_a_bad_row_of_many_lines_is_one_bad_row(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('sentence\tlabel\n"one\ntwo\nthree\tmore\nfour"\tyes\tagain\nfive\tno\n')
    split = read_split(path)
    assert [row.fault for row in split.rows] == ["has 3 fields, the header 2", None]
    assert split.rows[1].values == {"sentence": "five", "label": "no"}


# ---- delimiters and headers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "delimiter", "name"),
    [("csv", ";", "semicolons"), ("csv", "\t", "tabs"), ("tsv", ",", "commas"), ("csv", "|", "vertical bars")],
)
def test_another_delimiter_is_found_and_said(tmp_path, suffix, delimiter, name):
    texts = [f"text {i}" for i in range(60)]
    path = write_plain(tmp_path / f"train.{suffix}", texts, delimiter)
    split = read_split(path)
    assert texts_of(split) == texts
    assert split.notes == (f"{path}: its columns are separated by {name}",)


def test_neither_commas_nor_enclosed_semicolons_in_the_text_hide_semicolons(tmp_path):
    texts = ["one, two", "one", 'she; "no"', "a, b, c", "first\nsecond, third; fourth"]
    assert texts_of(read_split(write_quoted(tmp_path / "train.csv", texts, ";"))) == texts


def test_the_usual_delimiter_wins_where_it_fits(tmp_path):
    path = write_plain(tmp_path / "train.csv", [f"a; b {i}" for i in range(9)], ",")
    split = read_split(path)
    assert texts_of(split) == [f"a; b {i}" for i in range(9)]
    assert split.notes == ()


def test_the_delimiter_is_decided_over_the_whole_file(tmp_path):
    """The first 60 rows are regular in both."""
    path = tmp_path / "train.csv"
    lines = [f"text, {i};yes" for i in range(60)] + ["text;no"] * 3
    path.write_text("the text, that is;label\n" + "\n".join(lines) + "\n")
    split = read_split(path)
    assert split.columns == ["the text, that is", "label"]
    assert [row.fault for row in split.rows] == [None] * 63
    assert split.notes == (f"{path}: its columns are separated by semicolons",)


def test_a_space_behind_each_delimiter_belongs_to_no_field(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('sentence, label\n"one, two", "no"\nthree, yes\n')
    split = read_split(path)
    assert texts_of(split) == ["one, two", "three"]
    assert [row.values["label"] for row in split.rows] == ["no", "yes"]


def test_rows_without_text_and_headers_without_names(tmp_path):
    """As spreadsheets write them."""
    path = tmp_path / "train.csv"
    path.write_text("sentence,label,,\na,no,,\n,,,\n   \nb,yes,,\n,,,\n")
    split = read_split(path)
    assert split.columns == ["sentence", "label", "column 3", "column 4"]
    assert texts_of(split) == ["a", "b"]
    assert split.notes == (f"{path}: 2 rows without any text are left out",)


def test_a_header_in_the_middle_is_no_row(tmp_path):
    """As of files that were put together."""
    path = tmp_path / "train.csv"
    path.write_text("sentence,label\na,no\nsentence,label\nb,yes\n")
    assert {row.line: row.fault for row in read_split(path).rows if row.fault} == {3: "repeats the header"}


def test_a_table_without_a_header_is_told_how_to_name_its_columns(tmp_path):
    write_plain(
        tmp_path / "train.tsv", ["a sentence that is much too long to be the name of a column"] * 4, header=False
    )
    with pytest.raises(DataError, match=r"Where the first line is a row and no header, give columns by number, from 0"):
        load_texts(DatasetConfig(path=str(tmp_path / "train.tsv")))


def test_notes_of_both_splits_reach_the_run(tmp_path):
    for name in ("train", "dev"):
        write_plain(tmp_path / f"{name}.csv", [f"text {i}" for i in range(9)], ";")
    notes = load_texts(DatasetConfig(path=str(tmp_path))).notes
    said = tuple(f"{tmp_path / n}.csv: its columns are separated by semicolons" for n in ("train", "dev"))
    assert notes[:2] == said


def test_columns_by_number_where_there_is_no_header(tmp_path):
    write_plain(tmp_path / "train.tsv", [f"text {i}" for i in range(8)], header=False)
    write_plain(tmp_path / "dev.tsv", [f"text {i}" for i in range(3)], header=False)
    task = load_texts(DatasetConfig(path=str(tmp_path), columns=ColumnsConfig(text=0, label=1)))
    assert task.train.text == [f"text {i}" for i in range(8)]
    assert (task.label_names, len(task.validation)) == (LABELS, 3)
    with pytest.raises(DataError, match=r"dataset\.columns\.label is 2, but the columns are 0, 1"):
        load_texts(DatasetConfig(path=str(tmp_path), columns=ColumnsConfig(text=0, label=2)))


def test_a_row_of_a_file_without_header_is_measured_by_the_first(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("a,b\nc\nd,e\n")
    split = read_split(path, header=False)
    assert [row.values for row in split.rows] == [{"0": "a", "1": "b"}, {}, {"0": "d", "1": "e"}]
    assert split.rows[1].fault == "has 1 fields, the first line 2"


# ---- real files ----------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(
    ("file", "count", "header"),
    [
        ("rte/train.tsv", 2_490, True),
        ("rte/dev.tsv", 277, True),
        ("sst2/train.tsv", 67_349, True),
        ("sst2/dev.tsv", 872, True),
        ("stsb/sts-train.csv", 5_749, False),
        ("stsb/sts-dev.csv", 1_500, False),
    ],
)
def test_real_files_without_quoting_keep_every_character(file, count, header):
    split = read_split(DATA / file, header)
    lines = (DATA / file).read_bytes().decode().removesuffix("\n").split("\n")[header:]
    assert [list(row.values.values()) for row in split.rows] == [line.split("\t") for line in lines]
    assert len(split.rows) == count
    assert any(MARKS_ARE_TEXT in note for note in split.notes) == ("sst2" not in file)


@needs_data
@pytest.mark.parametrize("kind", ["books", "dvd", "electronics"])
@pytest.mark.parametrize(("name", "count"), [("train", 1_700), ("dev", 300)])
def test_real_reviews_are_quoted(kind, name, count):
    split = read_split(DATA / "amazon" / kind / f"{name}.tsv")
    text = (DATA / "amazon" / kind / f"{name}.tsv").read_bytes().decode()
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    assert [list(row.values.values()) for row in split.rows] == rows[1:]
    assert len(split.rows) == count
    (note,) = split.notes
    assert "enclose fields of several lines" in note
    assert any("\n" in review for review in texts_of(split))
