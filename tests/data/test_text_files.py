"""The text of files: byte order marks, encodings, line ends, gzip."""

from __future__ import annotations

import gzip

import pytest

from fastpeft.config.schema import DatasetConfig
from fastpeft.data.local import FileSource, read_split
from fastpeft.data.rows import DataError
from fastpeft.data.text_files import format_of, read_text, stem_of
from fastpeft.tasks import load_task
from tests.support.classifiers import load_texts
from tests.support.row_files import write_rows

TEXT = "text,label\na café,no\na 猫,yes\n"
ROWS = [{"text": "a café", "label": "no"}, {"text": "a 猫", "label": "yes"}]


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8", ()),
        ("utf-8-sig", ()),
        ("utf-16", ("is UTF-16 text",)),
        ("utf-32", ("is UTF-32 text",)),
    ],
)
def test_a_byte_order_mark_tells_the_encoding(tmp_path, encoding, said):
    path = tmp_path / "train.csv"
    path.write_text(TEXT, encoding=encoding)
    split = read_split(path)
    assert [row.values for row in split.rows] == ROWS
    assert split.notes == tuple(f"{path}: {note}" for note in said)


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_utf16_of_either_order(tmp_path, mark):
    path = tmp_path / "train.csv"
    path.write_bytes(mark + TEXT.encode("utf-16-le" if mark == b"\xff\xfe" else "utf-16-be"))
    assert [row.values for row in read_split(path).rows] == ROWS


def test_what_is_not_utf8_is_refused_with_the_line_and_the_way_out(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes("text,label\na dog,no\na café,yes\n".encode("cp1252"))
    with pytest.raises(
        DataError, match=r"train\.csv:3: is not UTF-8 text: it has the byte 0xe9\. .*iconv -f WINDOWS-1252"
    ):
        read_text(path)


def test_utf16_without_a_mark_is_refused(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(TEXT.replace("猫", "x").encode("utf-16-le"))
    with pytest.raises(DataError, match=r"NUL bytes, as UTF-16 without a byte order mark"):
        read_text(path)


def test_a_mark_of_utf16_before_other_text_is_refused(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b"\xff\xfeabc")
    with pytest.raises(DataError, match="begins with the mark of UTF-16"):
        read_text(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_lines_that_end_in_carriage_returns(tmp_path, suffix):
    path = write_rows(tmp_path / f"train.{suffix}", ROWS)
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r"))
    split = read_split(path)
    assert [row.values for row in split.rows] == ROWS
    assert split.notes == (f"{path}: its lines end in carriage returns",)


def test_a_line_feed_in_a_field_of_a_file_whose_lines_end_in_carriage_returns(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b'text,label\r"one\ntwo",no\rthree,yes\r')
    assert [row.values["text"] for row in read_split(path).rows] == ["one\ntwo", "three"]


def test_a_carriage_return_inside_a_line_is_text(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"text\tlabel\na\rb\tno\nc\tyes\n")
    assert [row.values["text"] for row in read_split(path).rows] == ["a\rb", "c"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_packed_files(tmp_path, suffix):
    for name in ("train", "dev"):
        path = write_rows(tmp_path / f"{name}.{suffix}", ROWS)
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert FileSource(tmp_path, "f").path("train").name == f"train.{suffix}.gz"
    task = load_texts(DatasetConfig(path=str(tmp_path)))
    assert task.train.text == task.validation.text == ["a café", "a 猫"]


def test_packed_sentences(tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.conll.gz").write_bytes(gzip.compress(b"Anna B-PER\nsleeps O\n\nOslo B-LOC\n"))
    task = load_task(DatasetConfig(path=str(tmp_path)))
    assert task.kind == "token-classification"
    assert len(task.splits.train) == 2


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"no gzip", lambda data: data[:12] + b"?" * 20]
)
def test_a_broken_gzip_file_is_named(tmp_path, damage):
    path = tmp_path / "train.csv.gz"
    path.write_bytes(damage(gzip.compress(TEXT.encode() * 9)))
    with pytest.raises(DataError, match=r"train\.csv\.gz: is no whole gzip file"):
        read_split(path)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_pointer_of_git_lfs_is_no_data(tmp_path, suffix):
    path = tmp_path / f"train.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"pointer of Git LFS.*git lfs pull"):
        read_split(path)


def test_the_format_is_told_in_any_case(tmp_path):
    path = tmp_path / "Train.CSV.gz"
    assert (format_of(path), stem_of(path)) == (".csv", "Train")
    (tmp_path / "Train.CSV").write_text(TEXT)
    assert [row.values for row in read_split(tmp_path / "Train.CSV").rows] == ROWS
