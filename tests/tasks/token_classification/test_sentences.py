"""Tagged sentences from rows, as jsonl, parquet and the hub give them."""

from typing import Any

import pytest

from fastpeft.data.rows import DataError, Row, Split
from fastpeft.tasks.token_classification.sentences import sentences_from_rows
from tests.support.tagged_sentences import sentences

NAMES = ("O", "B-PER", "I-PER")


def split(*rows: dict[str, Any]) -> Split:
    return Split("some.jsonl", [Row(line, values) for line, values in enumerate(rows, 1)])


@pytest.mark.parametrize("words", ["tokens", "words", "sentence"])
@pytest.mark.parametrize("tags", ["tags", "ner_tags", "labels"])
def test_the_usual_columns_are_found(words, tags):
    read = sentences_from_rows(split({"id": 3, words: ["Anna", "sleeps"], tags: ["B-PER", "O"]}))
    assert (read.words, read.tags) == ([["Anna", "sleeps"]], [["B-PER", "O"]])
    assert (read.where, read.source) == (["some.jsonl:1"], "some.jsonl")


def test_entity_tags_go_before_others_and_a_column_of_text_is_no_list_of_words():
    row = {"sentence": "Anna sleeps", "words": ["Anna", "sleeps"], "tags": ["NN", "VB"], "ner_tags": ["B-PER", "O"]}
    read = sentences_from_rows(split(row))
    assert (read.words, read.tags) == ([["Anna", "sleeps"]], [["B-PER", "O"]])
    assert sentences_from_rows(split(row), tags_column="tags").tags == [["NN", "VB"]]


def test_class_numbers_become_their_names():
    assert sentences_from_rows(split({"tokens": ["Anna", "Berg"], "ner_tags": [1, 2]}), names=NAMES).tags == [
        ["B-PER", "I-PER"]
    ]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "'tokens' holds 2 words, but 'tags' 1 tags"),
        ({"tokens": [], "tags": []}, "'tokens' is an empty list"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, "word 2 is 3, expected text"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "word 2 is None, expected text"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "'tokens' holds 'a b', expected a list"),
        ({"tags": ["O", "O"]}, "'tokens' holds None, expected a list"),
        ({"tokens": ["a"], "tags": [True]}, "tag 1 is True"),
        ({"tokens": ["a"], "tags": [None]}, "tag 1 is None"),
        ({"tokens": ["a"], "tags": [""]}, "tag 1 is empty"),
        ({"tokens": ["a"], "tags": [3]}, "class number 3, but the classes are 0 to 2"),
        ({"tokens": ["a"], "tags": [-1]}, "class number -1"),
        ({"tokens": ["\ud800"], "tags": ["O"]}, "half of a surrogate pair"),
    ],
)
def test_a_malformed_row_is_named_or_left_out(values, fault):
    rows = split({"tokens": ["Anna"], "tags": [1]}, values, {"tokens": ["Berg"], "tags": [0]})
    with pytest.raises(DataError) as caught:
        sentences_from_rows(rows, names=NAMES)
    assert str(caught.value).startswith("some.jsonl:2: ")
    assert fault in str(caught.value)
    read = sentences_from_rows(rows, names=NAMES, on_bad_row="skip")
    assert (read.words, read.num_skipped) == ([["Anna"], ["Berg"]], 1)


def test_a_row_that_could_not_be_read_says_why():
    rows = Split("some.jsonl", [Row(1, {"tokens": ["a"], "tags": ["O"]}), Row(2, {}, "is not valid JSON")])
    with pytest.raises(DataError, match=r"some\.jsonl:2: is not valid JSON"):
        sentences_from_rows(rows)
    assert sentences_from_rows(rows, on_bad_row="skip").num_skipped == 1


def test_class_numbers_without_names_are_refused_with_the_key_that_names_them():
    with pytest.raises(DataError, match=r"some.jsonl:1: tag 1 is the class number 1.*dataset\.labels"):
        sentences_from_rows(split({"tokens": ["a"], "tags": [1]}))


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"text": "a b", "label": 1}, (None, None), "which column holds each row's list of words"),
        ({"tokens": ["a"], "mine": ["O"]}, (None, None), r"list of tags\? Set dataset.columns.label.*tokens, mine"),
        ({"tokens": ["a"], "tags": ["O"]}, ("word", None), "dataset.columns.text is 'word', but the columns are"),
        ({"tokens": ["a"], "tags": ["O"]}, (None, "tag"), "dataset.columns.label is 'tag'"),
    ],
)
def test_columns_that_are_not_there_are_named(row, columns, message):
    with pytest.raises(DataError, match=message):
        sentences_from_rows(split(row), *columns)


@pytest.mark.parametrize("rows", [[], [Row(1, {}, "is not valid JSON")], [Row(1, {"tokens": [], "tags": []})]])
def test_a_split_without_a_usable_row_is_refused(rows):
    with pytest.raises(DataError, match=r"has no rows|so is every other row|all 1 rows are malformed"):
        sentences_from_rows(Split("some.jsonl", rows), on_bad_row="skip")


def test_sample_and_pick_keep_words_tags_and_places_together():
    read = sentences("a/O", "b/B-X c/I-X", "d/O")
    assert len(read.sample(2)) == 2
    assert read.sample(2) == read.sample(2)
    assert read.sample(0) is read
    assert read.sample(9) == read
    picked = read.pick([2, 1])
    assert (picked.words, picked.tags) == ([["d"], ["b", "c"]], [["O"], ["B-X", "I-X"]])
    assert picked.where == ["here:3", "here:2"]
