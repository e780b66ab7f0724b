"""`fastpeft evaluate --rescore`: PEFT and transformers alone come to the run's own score and answers."""

from __future__ import annotations

import json

import pytest

from fastpeft.errors import UserError
from fastpeft.export.rescore import rescore
from fastpeft.models.layers import LoraLinear
from fastpeft.runs.store import RunFolder, read_json
from fastpeft.trainer import train
from tests.support.kind_runs import KINDS, kind_run
from tests.support.problem_runs import problem_run


@pytest.fixture(scope="module", params=["classification", "word-problems", *KINDS])
def folder(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    settings = {"budget": "10steps", "evaluation.every": "end"}
    is_generated = request.param == "word-problems"
    run = problem_run(home, **settings) if is_generated else kind_run(home, request.param, **settings)
    train(run, results_dir=home, name="r")
    return RunFolder(home / "r")


def test_the_score_and_the_answers_are_the_runs(folder, monkeypatch):
    def refuse(*args):
        raise AssertionError("the trainer's own layers have no part in it")

    monkeypatch.setattr(LoraLinear, "forward", refuse)
    said = []
    found = rescore(folder, said.append)
    assert (found.weights, found.metric) == ("best", folder.read_result().metric["name"])
    assert found.value == pytest.approx(found.noted, abs=0.02)
    assert found.num_alike >= found.num - 1
    assert any("PEFT" in line for line in said)
    saved = read_json(folder.path / "rescored.json")
    assert (saved["value"], saved["difference"]) == (found.value, pytest.approx(found.value - found.noted))


def test_other_rows_are_refused(tmp_path):
    run = kind_run(tmp_path, "classification", budget="2steps")
    train(run, results_dir=tmp_path, name="r")
    path = tmp_path / "rows" / "dev.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({"text": "other", "label": "neutral"}), *lines[1:]]) + "\n")
    with pytest.raises(UserError, match="are gone or others"):
        rescore(RunFolder(tmp_path / "r"), lambda line: None)
    for weights in (tmp_path / "r").glob("adapter*"):
        (weights / "adapter_model.safetensors").write_bytes(b"damaged")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        rescore(RunFolder(tmp_path / "r"), lambda line: None)
