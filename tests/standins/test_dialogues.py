"""The generated conversations: right answers, the same every time, and words of their own in validation."""

from __future__ import annotations

import json
import re

from fastpeft.standins import PATHS, dialogues
from fastpeft.standins.build_qwen3 import CHAT_TEMPLATE
from fastpeft.standins.problem_grammar import NOUNS

EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+) [a-z]+\.")


def test_every_answer_is_right_and_goes_on_from_the_last() -> None:
    rows = dialogues.splits()["train"]
    assert len(rows) == dialogues.NUM_TRAIN == len({json.dumps(row) for row in rows})
    num_followed = 0
    for row in rows:
        said = [message for message in row["messages"] if message["role"] != "system"]
        assert [message["role"] for message in said] == ["user", "assistant"] * (len(said) // 2)
        amount = None
        for question, answer in zip(said[::2], said[1::2]):
            if found := EQUATION.fullmatch(answer["content"]):
                a, operation, b, result = found.groups()
                assert int(result) == (int(a) + int(b) if operation == "+" else int(a) - int(b))
                assert 2 <= int(result) <= 99
                num_followed += amount is not None
                assert amount in (None, a)
                amount = result
            elif answer["content"].endswith("is more."):
                numbers = list(map(int, re.findall(r"\d+", question["content"])))
                assert answer["content"] == f"{max(numbers)} is more."
            else:
                name, _, what = answer["content"].partition(" has ")
                assert question["content"] == f"What has {name}? {what}"
    assert num_followed > len(rows) // 4


def test_they_are_the_same_every_time_and_validation_has_nouns_of_its_own() -> None:
    splits = dialogues.splits()
    assert splits == dialogues.splits()
    words = {split: set(re.findall(r"[A-Za-z]+", json.dumps(rows))) for split, rows in splits.items()}
    assert words["validation"] & NOUNS["test"].words()
    assert not words["validation"] & NOUNS["train"].words()


def test_boxed_problems_are_the_word_problems_with_their_number_in_a_box() -> None:
    splits = dialogues.boxed_splits()
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 8_000, "test": 1_000}
    for row in splits["test"]:
        *worked, last = row["solution"].split("\n")
        (number,) = re.findall(r"\\boxed\{(\d+)\}", last)
        assert worked[-1].split(">>")[1].split()[0] == number


def test_the_shipped_model_has_a_template_of_words_that_it_knows() -> None:
    config = json.loads((PATHS["qwen3_tiny"] / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE
