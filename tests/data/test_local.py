"""Files of a user's own: every format, every kind of damage, and the real files where they lie beside the project."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from fastpeft.config.schema import ColumnsConfig, DatasetConfig
from fastpeft.data.local import read_split
from fastpeft.data.rows import DataError
from fastpeft.errors import UserError
from tests.support.classifiers import load_texts
from tests.support.real_data import DATA
from tests.support.row_files import config, folder_of, write_jsonl, write_rows

ROWS = [("a dog ran", "no"), ("a cat slept", "yes"), ("the bird, it ran", "no"), ('she said "no"', "yes")]


def single(rows=ROWS) -> list[dict]:
    return [{"sentence": text, "label": label} for text, label in rows]


def error_of(path: Path, **fields) -> str:
    with pytest.raises(DataError) as error:
        load_texts(config(path, **fields))
    assert isinstance(error.value, UserError)
    assert error.value.exit_code == 2
    return str(error.value)


# ---- formats, columns, labels --------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_formats_read_the_same(tmp_path, suffix):
    write_rows(tmp_path / f"train.{suffix}", single())
    write_rows(tmp_path / f"dev.{suffix}", single(ROWS[:2]))
    task = load_texts(config(tmp_path))
    assert task.label_names == ("no", "yes")
    assert task.train.text == [text for text, _ in ROWS]
    assert task.train.text_pair is None
    assert task.train.labels == [0, 1, 0, 1]
    assert task.validation.labels == [0, 1]
    assert task.name == tmp_path.name
    assert not task.skipped_rows


@pytest.mark.parametrize(
    ("text", "pair", "label"),
    [
        ("premise", "hypothesis", "label"),
        ("sentence1", "sentence2", "gold_label"),
        ("question", "passage", "answer"),
        ("text", "text_pair", "labels"),
        ("sentence", None, "label"),
        ("text", None, "class"),
        ("review", None, "label"),
        ("content", None, "label"),
    ],
)
def test_usual_column_names_are_found(tmp_path, text, pair, label):
    rows = [{"index": i, label: ["no", "yes"][i % 2], text: f"first {i}"} for i in range(4)]
    if pair:
        rows = [row | {pair: f"second {i}"} for i, row in enumerate(rows)]
    task = load_texts(config(folder_of(tmp_path, rows)))
    assert task.train.text[3] == "first 3"
    assert task.train.text_pair == ([f"second {i}" for i in range(4)] if pair else None)
    assert task.train.labels == [0, 1, 0, 1]


def test_column_map(tmp_path):
    rows = [{"a": f"a{i}", "b": f"b{i}", "text": "wrong", "label": "wrong", "c": i % 3} for i in range(6)]
    folder = folder_of(tmp_path, rows)
    task = load_texts(config(folder, columns=ColumnsConfig(text="a", text_pair="b", label="c")))
    assert (task.train.text[4], task.train.text_pair[4], task.train.labels[4]) == ("a4", "b4", 1)
    alone = load_texts(config(folder, columns=ColumnsConfig(text="b", label="c")))
    assert alone.train.text[0] == "b0"
    assert alone.train.text_pair is None


def test_a_named_text_is_not_paired_by_guessing(tmp_path):
    rows = [{"premise": "p", "hypothesis": "h", "label": i % 2} for i in range(4)]
    task = load_texts(config(folder_of(tmp_path, rows), columns=ColumnsConfig(text="hypothesis")))
    assert task.train.text == ["h"] * 4
    assert task.train.text_pair is None


def test_a_named_pair_outweighs_a_guessed_one(tmp_path):
    rows = [{"premise": "p", "hypothesis": "h", "text": "t", "other": "o", "label": i % 2} for i in range(4)]
    task = load_texts(config(folder_of(tmp_path, rows), columns=ColumnsConfig(text_pair="other")))
    assert task.train.text_pair == ["o"] * 4
    assert task.train.text == ["t"] * 4


@pytest.mark.parametrize("key", ["text", "text_pair", "label"])
def test_missing_column_names_those_found(tmp_path, key):
    folder = folder_of(tmp_path, single())
    message = error_of(folder, columns=ColumnsConfig(**{key: "absent"}))
    assert f"dataset.columns.{key}" in message
    assert "'absent'" in message
    assert "sentence, label" in message


@pytest.mark.parametrize(("missing", "rows"), [("text", [{"a": "x", "label": 1}]), ("label", [{"text": "x", "b": 1}])])
def test_no_usual_column_asks_for_the_name(tmp_path, missing, rows):
    message = error_of(folder_of(tmp_path, rows))
    assert f"dataset.columns.{missing}" in message
    assert ", ".join(rows[0]) in message


def test_a_first_row_without_a_column_hides_it_from_no_other_row(tmp_path):
    rows = [{"sentence": "unlabelled"}, *single()]
    folder = folder_of(tmp_path, rows, single())
    assert "train.jsonl:1" in error_of(folder)
    task = load_texts(config(folder, on_bad_row="skip"))
    assert len(task.train) == 4
    assert task.skipped_rows == {"train": 1}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_whole_numbers_are_ordered_by_value(tmp_path, suffix):
    rows = single([(f"row {i}", i) for i in (10, 9, 2, 10, 2)])
    write_rows(tmp_path / f"train.{suffix}", rows)
    write_rows(tmp_path / f"dev.{suffix}", rows)
    task = load_texts(config(tmp_path))
    assert task.label_names == ("2", "9", "10")
    assert task.train.labels == [2, 1, 0, 2, 0]


def test_float_labels_of_a_column_with_gaps(tmp_path):
    rows = single([("a", 1.0), ("b", 0.0), ("c", 1.0)])
    task = load_texts(config(folder_of(tmp_path, rows)))
    assert task.label_names == ("0", "1")
    assert task.train.labels == [1, 0, 1]


def test_bool_labels(tmp_path):
    task = load_texts(config(folder_of(tmp_path, single([("a", True), ("b", False)]))))
    assert task.label_names == ("False", "True")
    assert task.train.labels == [1, 0]


@pytest.mark.parametrize("odd", ["--5", "²", "-", "1-"])
def test_labels_that_only_look_like_numbers(tmp_path, odd):
    rows = single([("a", "1"), ("b", "2"), ("c", odd)])
    folder = folder_of(tmp_path, rows)
    if odd == "-":
        assert "train.jsonl:3" in error_of(folder)
        return
    assert load_texts(config(folder)).label_names == tuple(sorted(["1", "2", odd]))


def test_order_of_dataset_labels(tmp_path):
    folder = folder_of(tmp_path, single())
    task = load_texts(config(folder, labels=["yes", "no"]))
    assert task.label_names == ("yes", "no")
    assert task.train.labels == [1, 0, 1, 0]


def test_numbers_stand_for_named_labels_in_their_order(tmp_path):
    folder = folder_of(tmp_path, single([("a", 1), ("b", 0), ("c", 2)]))
    task = load_texts(config(folder, labels=["entailment", "neutral", "contradiction"]))
    assert task.train.labels == [1, 0, 2]
    known = load_texts(config(folder, name="mnli"))
    assert known.label_names == ("entailment", "neutral", "contradiction")
    assert known.train.labels == [1, 0, 2]


def test_numeric_names_are_names_and_not_positions(tmp_path):
    """Stars 1 to 3: a label 0 is unknown, and is not taken for the first name."""
    stars = single([("a", 1), ("b", 2), ("c", 3)])
    message = error_of(folder_of(tmp_path, stars, [*stars, {"sentence": "d", "label": 0}]))
    assert "dev.jsonl:4: unknown label '0'" in message
    assert "1, 2, 3" in message
    assert "unknown label '3'" in error_of(folder_of(tmp_path, stars), labels=["1", "2"])


def test_numbers_do_not_stand_for_names_that_were_inferred(tmp_path):
    """Their order is the alphabet's, which nobody who numbered the labels knew."""
    folder = folder_of(tmp_path, single(), single([("a", 0), ("b", 1)]))
    assert "dev.jsonl:1: unknown label '0'" in error_of(folder)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_unknown_label_is_always_an_error(tmp_path, on_bad_row):
    folder = folder_of(tmp_path, single(), [*single(), {"sentence": "d", "label": "maybe"}])
    message = error_of(folder, on_bad_row=on_bad_row)
    assert "dev.jsonl:5: unknown label 'maybe'" in message
    assert "no, yes" in message


def test_one_label_only(tmp_path):
    message = error_of(folder_of(tmp_path, single([("a", "yes"), ("b", "yes")])))
    assert "one label only" in message
    assert "yes" in message


def test_pairs_in_one_split_only(tmp_path):
    pairs = [{"premise": "p", "hypothesis": "h", "label": i % 2} for i in range(2)]
    message = error_of(folder_of(tmp_path, pairs, single([("a", 0), ("b", 1)])))
    assert "dev.jsonl" in message


# ---- bad rows ------------------------------------------------------------------------------

BAD_LINES = {
    "no JSON": "{'text': 1}",
    "no object": "[1, 2]",
    "cut short": '{"sentence": "a", "la',
    "text is a number": '{"sentence": 5, "label": "no"}',
    "text is null": '{"sentence": null, "label": "no"}',
    "text is absent": '{"label": "no"}',
    "text is blank": '{"sentence": "  ", "label": "no"}',
    "half a character": '{"sentence": "a \\ud800 b", "label": "no"}',
    "half a character of a label": '{"sentence": "a", "label": "\\ud800"}',
    "label is null": '{"sentence": "a", "label": null}',
    "label is absent": '{"sentence": "a"}',
    "label is empty": '{"sentence": "a", "label": " "}',
    "label is not a number": '{"sentence": "a", "label": NaN}',
    "label is a list": '{"sentence": "a", "label": ["no"]}',
    "no gold label": '{"sentence": "a", "label": -1}',
    "deeply nested": "[" * 100_000,
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_row_is_named_or_skipped_and_counted(tmp_path, line):
    lines = [json.dumps(row) for row in single()]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([lines[0], "", line, *lines[1:], line]) + "\n")
    write_jsonl(tmp_path / "dev.jsonl", single())
    message = error_of(tmp_path)
    assert f"{path}:3: " in message
    assert "on_bad_row=skip" in message
    task = load_texts(config(tmp_path, on_bad_row="skip"))
    assert task.train.text == [text for text, _ in ROWS]
    assert task.skipped_rows == {"train": 2}


def test_skipped_rows_of_both_splits(tmp_path):
    folder = folder_of(tmp_path, single())
    for name, count in (("train", 1), ("dev", 3)):
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write("?\n" * count)
    assert load_texts(config(folder, on_bad_row="skip")).skipped_rows == {"train": 1, "validation": 3}


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_row_with_a_wrong_number_of_fields(tmp_path, delimiter):
    path = tmp_path / ("train.csv" if delimiter == "," else "train.tsv")
    lines = ["sentence label", "a no", "b yes", "c yes more", "d", "e no"]
    path.write_text("\n".join(line.replace(" ", delimiter) for line in lines))
    message = error_of(path)
    assert f"{path}:4: has 3 fields, the header 2" in message
    task = load_texts(config(path, on_bad_row="skip"))
    assert sorted(task.train.text + task.validation.text) == ["a", "b", "e"]
    assert task.skipped_rows == {"train": 2}


def test_all_rows_bad(tmp_path):
    unreadable = tmp_path / "train.jsonl"
    unreadable.write_text("?\n?\n")
    assert "train.jsonl:1" in error_of(unreadable, on_bad_row="skip")
    blank = write_jsonl(tmp_path / "other.jsonl", [{"sentence": "", "label": "no"}] * 3)
    message = error_of(blank, on_bad_row="skip")
    assert "other.jsonl" in message
    assert "3 rows" in message


# ---- files and folders ---------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "\n\n", "sentence,label\n"])
def test_empty_split(tmp_path, content):
    path = tmp_path / "train.csv"
    path.write_text(content)
    assert f"{path}: has no rows" in error_of(path)
    write_jsonl(tmp_path / "folder" / "train.jsonl", single())
    (tmp_path / "folder" / "dev.csv").write_text(content)
    assert "dev.csv: has no rows" in error_of(tmp_path / "folder")


def test_a_single_row_cannot_be_split(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", single(ROWS[:1]))
    assert "training split is empty" in error_of(path, labels=["no", "yes"])


def test_byte_order_mark_and_crlf(tmp_path):
    for name, text in {
        "train.csv": "sentence,label\r\na dog,no\r\na cat,yes\r\n",
        "dev.jsonl": '{"sentence": "a dog", "label": "no"}\r\n{"sentence": "a cat", "label": "yes"}\r\n',
    }.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    task = load_texts(config(tmp_path))
    assert task.train == task.validation
    assert task.train.text == ["a dog", "a cat"]
    assert task.train.labels == [0, 1]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_not_utf8(tmp_path, suffix):
    path = tmp_path / f"train.{suffix}"
    path.write_bytes(b"sentence,label\ngood,no\ncaf\xe9,yes\n")
    assert f"{path}:3: is not UTF-8 text" in error_of(path, on_bad_row="skip")


def test_header_names_a_column_twice(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("label,sentence,label\nno,a,no\n")
    assert f"{path}:1: the header names a column twice: label, sentence, label" in error_of(path)


def test_broken_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    assert str(path) in error_of(path)


def test_quoted_fields_over_several_lines(tmp_path, seed):
    rng = random.Random(seed)
    texts = ["\n".join("".join(rng.choices('ab,"\t ', k=6)) + "x" for _ in range(rng.randint(1, 4))) for _ in range(60)]
    rows = single([(text, ["no", "yes"][i % 2]) for i, text in enumerate(texts)])
    for suffix in ("csv", "tsv"):
        path = write_rows(tmp_path / suffix / f"data.{suffix}", rows)
        read = read_split(path).rows
        assert [row.values["sentence"] for row in read] == texts
        assert read[-1].line == path.read_text().count("\n")


def test_stray_quotes_in_a_tsv_are_text(tmp_path):
    path = tmp_path / "train.tsv"
    texts = ['"an unclosed quote', 'a 5" disk', 'closed" early', "plain", '"whole" and more']
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts)))
    assert [row.values["sentence"] for row in read_split(path).rows] == texts


def test_only_line_ends_end_a_row(tmp_path):
    """Other characters that Unicode calls line boundaries are text, as a crawled review holds them."""
    texts = [f"a{mark}b" for mark in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"]
    rows = single([(text, ["no", "yes"][i % 2]) for i, text in enumerate(texts)])
    for suffix in ("csv", "tsv", "jsonl"):
        path = write_rows(tmp_path / f"data.{suffix}", rows)
        assert [row.values["sentence"] for row in read_split(path).rows] == texts, suffix


def test_huge_field(tmp_path):
    """Beyond the 128 KiB at which Python's csv module gives up by default."""
    huge = "word " * 100_000
    for suffix in ("csv", "tsv", "jsonl"):
        path = write_rows(tmp_path / f"data.{suffix}", single([(huge, "no"), ("b", "yes")]))
        assert read_split(path).rows[0].values["sentence"] == huge, suffix


@pytest.mark.parametrize("name", ["dev", "validation", "dev_matched", "validation_matched", "valid"])
def test_names_of_the_validation_file(tmp_path, name):
    write_rows(tmp_path / "train.tsv", single())
    write_jsonl(tmp_path / f"{name}.jsonl", single(ROWS[:2]))
    assert len(load_texts(config(tmp_path)).validation) == 2


def test_ambiguous_folder(tmp_path):
    folder = folder_of(tmp_path, single())
    write_jsonl(folder / "validation.jsonl", single())
    message = error_of(folder)
    assert "more than one of dev.*" in message
    assert "dev.jsonl, train.jsonl, validation.jsonl" in message
    (folder / "validation.jsonl").unlink()
    write_rows(folder / "train.csv", single())
    assert "more than one of train.*" in error_of(folder)


def test_folder_without_a_split(tmp_path):
    assert "it holds nothing" in error_of(tmp_path)
    write_jsonl(tmp_path / "dev.jsonl", single())
    message = error_of(tmp_path)
    assert "no train.*" in message
    assert "it holds dev.jsonl" in message


def test_a_training_file_alone_is_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", single([(f"text {i}", ["no", "yes"][i % 2]) for i in range(40)]))
    task = load_texts(config(tmp_path))
    assert (len(task.train), len(task.validation)) == (36, 4)
    assert any("has no validation split: 10% of its training rows, 4, are held out" in note for note in task.notes)


def test_path_that_is_nothing(tmp_path):
    assert "there is no such file or folder" in error_of(tmp_path / "absent")
    other = tmp_path / "data.txt"
    other.write_text("text")
    assert ".parquet" in error_of(other)


def test_single_file_is_split_the_same_way_every_time(tmp_path, seed):
    rng = random.Random(seed)
    rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": rng.randrange(3)} for i in range(200)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    settings = config(path, validation_fraction=0.25)
    task = load_texts(settings)
    assert len(task.train) == 150
    assert len(task.validation) == 50
    assert load_texts(settings) == task
    train, validation = set(task.train.text), set(task.validation.text)
    assert train | validation == {row["premise"] for row in rows}
    assert not train & validation
    of = {row["premise"]: (row["hypothesis"], row["label"]) for row in rows}
    for part in (task.train, task.validation):
        pairs = zip(part.text, part.text_pair, part.labels)
        assert all(of[text] == (pair, int(task.label_names[label])) for text, pair, label in pairs)
    assert validation != {row["premise"] for row in rows[:50]}
    assert validation != {row["premise"] for row in rows[150:]}
    assert load_texts(replace(settings, validation_fraction=0.5)).validation != task.validation


# ---- real files ----------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
@pytest.mark.parametrize(
    ("path", "num_train", "num_dev", "num_labels", "paired"),
    [
        ("mnli", 9_888, 9_815, 3, True),
        ("snli/dev.jsonl", 8_858, 984, 3, True),
        ("rte", 2_490, 277, 2, True),
        ("sst2", 67_349, 872, 2, False),
        ("boolq", 2_770, 500, 2, True),
        ("amazon/books", 1_700, 300, 2, False),
    ],
)
def test_real_files(path, num_train, num_dev, num_labels, paired):
    task = load_texts(config(DATA / path))
    assert (len(task.train), len(task.validation), len(task.label_names)) == (num_train, num_dev, num_labels)
    assert (task.train.text_pair is not None) == paired
    assert set(task.train.labels) == set(task.validation.labels) == set(range(num_labels))
    assert not task.skipped_rows


def test_a_column_of_free_text_is_no_label(tmp_path):
    rows = [{"sentence": f"text {i}", "label": f"answer {i}"} for i in range(300)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="300 different values in 300 rows"):
        load_texts(DatasetConfig(path=str(tmp_path / "train.jsonl")))
