"""Run files and overrides in British and American spelling."""

from __future__ import annotations

import pytest
import yaml

from fastpeft.config import load_run, save_run, with_values
from tests.support.run_files import SMALL, one_problem, write

AMERICAN = """
regularizer: {alpha: 0.5, normalize: max}
optuna: {space: {regularizer.alpha: {type: int, low: 1, high: 2}}}
"""


def test_a_file_in_american_spelling_is_the_same_run(tmp_path):
    path = write(tmp_path / "a.yaml", SMALL.replace("some/model", "some/model, quantization: nf4") + AMERICAN)
    run = load_run(path)
    assert (run.regulariser.alpha, run.regulariser.normalise, run.model.quantisation) == (0.5, "max", "nf4")
    assert list(run.optuna.space) == ["regulariser.alpha"]
    save_run(run, tmp_path / "b.yaml")
    stored = yaml.safe_load((tmp_path / "b.yaml").read_text())
    assert "regularizer" not in stored
    assert "quantization" not in stored["model"]
    assert load_run(tmp_path / "b.yaml") == run


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        (["regularizer.alpha=0.5"], "regulariser.alpha", 0.5),
        (["regularizer.normalize=max"], "regulariser.normalise", "max"),
        (["regulariser.normalize=max"], "regulariser.normalise", "max"),
        (["model.quantization=nf4"], "model.quantisation", "nf4"),
        ({"regularizer": {"alpha": 0.5}}, "regulariser.alpha", 0.5),
    ],
)
def test_an_override_in_either_spelling_is_kept_in_one(given, key, value):
    run = load_run("lora_mnli", given)
    section, name = key.split(".")
    assert getattr(getattr(run, section), name) == value
    assert run.overrides == {key: value}


def test_values_set_later_may_be_spelt_either_way():
    run = with_values(load_run("lora_mnli"), {"regularizer.beta": 2.0})
    assert (run.regulariser.beta, run.overrides) == (2.0, {"regulariser.beta": 2.0})


def test_a_child_may_spell_otherwise_than_its_parent(tmp_path):
    run = load_run(write(tmp_path / "a.yaml", "extends: iwlora_mnli\nregularizer: {alpha: 0.5}\n"))
    assert (run.regulariser.alpha, run.regulariser.warmup_steps) == (0.5, 150)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("regularizer: {alpha: 1}\nregulariser: {beta: 1}\n", "regularizer and regulariser"),
        ("regularizer: {normalise: max, normalize: sum}\n", "regulariser.normalise and regulariser.normalize"),
        ("overrides: {regularizer.beta: 1, regulariser.beta: 2}\n", "regularizer.beta and regulariser.beta"),
    ],
)
def test_both_spellings_in_one_file_are_refused(text, keys, tmp_path):
    path = write(tmp_path / "a.yaml", SMALL + text)
    assert one_problem(path) == f"{keys}: one key in two spellings; keep one of them"


def test_both_spellings_in_overrides_are_refused():
    given = ["regularizer.alpha=1", "regulariser.alpha=2"]
    assert "regularizer.alpha and regulariser.alpha: one key in two spellings" in one_problem("lora_mnli", given)
    assert load_run("lora_mnli", ["regularizer.alpha=1", "regulariser.beta=2"]).regulariser.beta == 2


def test_a_mistake_is_named_in_the_spelling_that_is_kept():
    assert one_problem("lora_mnli", ["regularizer.alpha=-1"]).startswith("regulariser.alpha: expected")


def test_a_stored_run_with_a_key_that_was_retired_still_loads(tmp_path):
    stored = tmp_path / "run.yaml"
    text = "extends: graff_mnli\nrun_id: old\nschedule:\n  graff: { token_weights: VALUE }\n"
    stored.write_text(text.replace("VALUE", "false"))
    assert load_run(stored).schedule.name == "graff"
    stored.write_text(text.replace("VALUE", "true"))
    assert "schedule.graff.token_weights: unknown key" in one_problem(stored)
