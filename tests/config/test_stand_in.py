"""When a run's stand-in goes with it, and what it changes."""

from __future__ import annotations

import pytest

from fastpeft.config import ConfigError, apply_stand_in, load_run, run_values, save_run, trial_run
from fastpeft.config import load as loading
from tests.support.run_files import write


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.name=other/model"],
        ["model.revision=abc"],
        ["dataset.name=other"],
        ["dataset.path=somewhere"],
        ["dataset.revision=abc"],
        ["dataset.config=other"],
        ["dataset.train_split=other"],
        ["dataset.validation_split=test"],
        ["model={name: other/model}"],
        ["dataset={path: somewhere}"],
        ["model.name=microsoft/deberta-v3-base"],
    ],
)
def test_an_override_of_model_or_data_drops_the_stand_in(overrides):
    assert load_run("lora_mnli").stand_in is not None
    assert load_run("lora_mnli", overrides).stand_in is None


@pytest.mark.parametrize("key", ["training.seed=1", "adapter.rank=4", "dataset.max_length=64", "method=iw_lora"])
def test_other_overrides_keep_the_stand_in(key):
    assert load_run("lora_mnli", [key]).stand_in == load_run("lora_mnli").stand_in


def test_a_file_that_renames_the_model_does_not_inherit_the_stand_in(tmp_path):
    renamed = write(tmp_path / "a.yaml", "extends: lora_mnli\nmodel: {name: other/model}\n")
    assert load_run(renamed).stand_in is None
    own = "stand_in: {model: embedded/deberta-tiny, dataset: embedded-nli}\n"
    kept = load_run(write(tmp_path / "b.yaml", renamed.read_text() + own)).stand_in
    assert kept is not None
    assert kept.model == "embedded/deberta-tiny"
    assert load_run(write(tmp_path / "c.yaml", "extends: lora_mnli\ntraining: {seed: 1}\n")).stand_in is not None


def test_the_stand_in_replaces_model_and_data_and_takes_its_settings():
    run = load_run("lora_mnli")
    standing_in = apply_stand_in(run)
    assert (standing_in.model.name, standing_in.dataset.name) == (run.stand_in.model, run.stand_in.dataset)
    values = run_values(standing_in)
    for key, value in run.stand_in.overrides.items():
        assert loading._get(values, key) == pytest.approx(float(value)) if key.endswith("rate") else value, key
    assert standing_in.dataset.max_length == run.dataset.max_length
    assert standing_in.stand_in is None


@pytest.mark.parametrize("given", [["training.learning_rate=5e-5"], ["training={learning_rate: 5e-5}"]])
def test_what_the_user_sets_wins_over_the_stand_ins_settings(given, tmp_path):
    assert "training.learning_rate" in load_run("lora_mnli").stand_in.overrides
    run = load_run("lora_mnli", given)
    assert apply_stand_in(run).training.learning_rate == 5e-5
    save_run(run, tmp_path / "run.yaml")
    assert apply_stand_in(load_run(tmp_path / "run.yaml")).training.learning_rate == 5e-5


def test_a_trial_on_the_stand_in_stays_a_trial(tmp_path):
    text = "extends: lora_mnli\nstand_in: {overrides: {budget: 2h, training.checkpoint_steps: 900}}\n"
    run = load_run(write(tmp_path / "a.yaml", text))
    assert apply_stand_in(run).budget == "2h"
    trial = apply_stand_in(trial_run(run))
    assert (trial.budget, trial.training.checkpoint_steps) == ("2steps", 1)


def test_a_fault_of_the_stand_in_shows_while_the_hub_is_still_there():
    with pytest.raises(ConfigError, match=r"stand_in.*training\.seed: expected"):
        load_run("lora_mnli", {"stand_in.overrides": {"training.seed": "abc"}})


def test_a_stand_in_knows_nothing_of_the_hubs_revisions_and_splits(tmp_path):
    own = "extends: lora_mnli\ndataset: {revision: abc, validation_split: validation_mismatched}\nstand_in: {}\n"
    run = load_run(write(tmp_path / "a.yaml", own))
    assert (run.dataset.name, run.dataset.revision) == ("mnli", "abc")
    standing_in = apply_stand_in(run).dataset
    assert (standing_in.name, standing_in.revision, standing_in.validation_split) == ("embedded-nli", "main", None)
