"""Every kind keeps what was answered to each row, and the metric comes out of it again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from fastpeft.data.fingerprint import ReadRow
from fastpeft.data.predictions import Answer, read_predictions, write_predictions
from fastpeft.errors import UserError
from fastpeft.runs.store import RunFolder
from fastpeft.trainer import train
from tests.support.kind_runs import KINDS, kind_run
from tests.support.problem_runs import problem_run

ALL_KINDS = ("classification", "word-problems", *KINDS)


@pytest.fixture(scope="module", params=ALL_KINDS)
def folder(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    settings = {"budget": "10steps", "evaluation.every": "end"}
    is_generated = request.param == "word-problems"
    run = problem_run(home, **settings) if is_generated else kind_run(home, request.param, **settings)
    train(run, results_dir=home, name="r")
    return RunFolder(home / "r")


def metric_of(answers: list[Answer]) -> float:
    if answers[0].correct is not None:
        return float(np.mean([answer.correct for answer in answers]))
    if answers[0].counts is not None:
        hits, said, there = np.sum([answer.counts for answer in answers], axis=0)
        return 2 * hits / max(1, said + there)
    return float(spearmanr([a.predicted for a in answers], [a.gold for a in answers]).statistic)


@pytest.mark.parametrize("which", ["last", "best"])
def test_the_metric_comes_out_of_the_answers(folder, which):
    found, result = read_predictions(folder.predictions(which)), folder.read_result()
    score = result.best if which == "best" else result.metric
    assert (found.metric, found.value) == (result.metric["name"], pytest.approx(score["value"]))
    assert metric_of(found.answers) == pytest.approx(score["value"], abs=1e-6)
    assert (found.split, found.step) == ("validation", result.best["step"])
    wrong = [texts for answer, texts in zip(found.answers, found.given) if answer.correct is False]
    assert all(wrong)


# ---- the file -----------------------------------------------------------------------------------

ROWS = [ReadRow(("a text", "its pair"), ("yes",)), ReadRow(("another", "x" * 5000), ("no",))]
ANSWERS = [Answer("yes", "yes", correct=True), Answer("no", "yes", correct=False)]


def written(path, rows=ROWS, answers=ANSWERS):
    write_predictions(path, zip(rows, answers), split="test", step=7, metric="accuracy", value=0.5)
    return read_predictions(path)


def test_what_is_written_is_read_again_and_texts_of_wrong_rows_are_kept_cut(tmp_path):
    found = written(tmp_path / "predictions" / "test.jsonl")
    assert (found.answers, found.split, found.step, found.metric, found.value) == (ANSWERS, "test", 7, "accuracy", 0.5)
    assert found.given == [(), ("another", "x" * 2000)]
    assert read_predictions(tmp_path / "nothing.jsonl") is None


def test_the_rows_hash_knows_their_texts_their_labels_and_their_order(tmp_path):
    path = tmp_path / "p" / "x.jsonl"
    first = written(path).rows
    assert written(path, answers=ANSWERS[::-1]).rows == first
    assert written(path, ROWS[::-1], ANSWERS[::-1]).rows != first
    assert written(path, [ROWS[0], ROWS[1]._replace(wanted=("yes",))]).rows != first
    assert written(path, [ROWS[0], ROWS[1]._replace(given=("anothe", "r" + "x" * 5000))]).rows != first


@pytest.mark.parametrize("damage", ["cut", "words", "version", "no header"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "p" / "x.jsonl"
    written(path)
    header, *lines = path.read_text().splitlines()
    text = {
        "cut": [header, lines[0]],
        "words": [header, "no JSON", lines[1]],
        "version": [json.dumps(json.loads(header) | {"format": 99}), *lines],
        "no header": lines,
    }[damage]
    path.write_text("\n".join(text) + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl"):
        read_predictions(path)


def test_an_answer_may_hold_what_utf_8_does_not(tmp_path):
    found = written(tmp_path / "p" / "x.jsonl", answers=[ANSWERS[0], Answer("no", "half a pair \ud800", correct=False)])
    assert found.answers[1].predicted == "half a pair \ud800"


def test_numbers_that_are_not_finite_are_texts(tmp_path):
    found = written(tmp_path / "p" / "x.jsonl", ROWS, [Answer(1.0, float("nan")), Answer(2.5, 3.0)])
    assert [answer.predicted for answer in found.answers] == ["nan", 3.0]
