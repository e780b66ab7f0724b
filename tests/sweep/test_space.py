"""Hostile search spaces are refused by name; a space becomes Optuna's; another space is told apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fastpeft.config import ConfigError, apply_stand_in, load_run, preset_names, with_values
from fastpeft.config.search import OptunaConfig, SearchParameter
from fastpeft.sweep.space import check_space, differences, distributions, identity, trial_settings
from tests.support.tiers import presets

RATE = "training.learning_rate"
RATES = {"type": "loguniform", "low": 1e-5, "high": 1e-3}


def refused(space: Any, **optuna: Any) -> str:
    """What a sweep over the space answers."""
    with pytest.raises(ConfigError) as caught:
        check_space(load_run("lora_mnli", {"optuna.space": space} | {f"optuna.{k}": v for k, v in optuna.items()}))
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "searched", "words"),
    [
        (RATE, {"type": "uniform", "low": 2, "high": 1}, "low must be under high"),
        (RATE, {"type": "uniform", "low": 1, "high": 1}, "low must be under high"),
        (RATE, {"type": "loguniform", "low": 0, "high": 1}, "positive for loguniform"),
        (RATE, {"type": "uniform", "low": math.nan, "high": 1}, "finite"),
        (RATE, {"type": "uniform", "low": 1, "high": math.inf}, "finite"),
        (RATE, {"type": "normal", "low": 0, "high": 1}, "did you mean uniform?"),
        (RATE, {"type": "uniform", "low": 1}, "takes `low` and `high`"),
        (RATE, {"type": "uniform", "low": 1, "hihg": 2}, "did you mean high?"),
        (RATE, 3, "expected a section with keys"),
        ("training.batch_size", {"type": "int", "low": 1.5, "high": 3}, "whole numbers"),
        ("training.batch_size", {"type": "categorical", "choices": [[8, 16], 32]}, "got [8, 16]"),
        ("training.batch_size", {"type": "categorical", "choices": [{"a": 1}]}, "a choice is a number"),
        ("training.batch_size", {"type": "categorical", "choices": [None]}, "a choice is a number"),
        ("training.batch_size", {"type": "categorical", "choices": [1, True]}, "True is there twice"),
        ("training.batch_size", {"type": "categorical", "choices": []}, "takes `choices`"),
        ("training.batch_size", {"type": "categorical", "choices": "ab"}, "expected a valid list"),
        ("training.lerning_rate", RATES, "did you mean training.learning_rate?"),
        ("training", RATES, "unknown key"),
        ("training.seed", {"type": "int", "low": 1, "high": 9}, "optuna.seeds"),
        ("budget", {"type": "categorical", "choices": ["1m", "2m"]}, "optuna.trial_budget"),
        ("dataset.name", {"type": "categorical", "choices": ["mnli", "rte"]}, "cannot be compared"),
        ("evaluation.max_examples", {"type": "int", "low": 1, "high": 9}, "cannot be compared"),
        ("optuna.trials", {"type": "int", "low": 1, "high": 9}, "the search itself"),
        # what the run itself would not take
        (RATE, {"type": "uniform", "low": -1, "high": 1}, "a trial with -1.0 would be refused"),
        ("training.batch_size", {"type": "uniform", "low": 8, "high": 9}, "a trial with 8.5 would be refused"),
        ("training.batch_size", {"type": "categorical", "choices": [8, "many"]}, "'many' would be refused"),
        ("schedule.name", {"type": "categorical", "choices": ["linear", "cosin"]}, "did you mean cosine?"),
    ],
)  # fmt: skip
def test_a_hostile_parameter_is_refused_by_name(key, searched, words):
    message = refused({key: searched})
    assert f"optuna.space.{key}" in message
    assert words in message


def test_every_fault_is_named_at_once():
    message = refused(
        {
            "training.batch_size": {"type": "int", "low": -1, "high": 2},
            RATE: RATES | {"high": 1e39},
            "schedule.name": {"type": "categorical", "choices": ["linear", "bad"]},
        }
    )
    assert "optuna.space.training.batch_size" in message
    assert "optuna.space.schedule.name" in message


def test_a_run_without_a_space_is_refused():
    assert "optuna.space: it is empty" in refused({})


def test_a_loss_is_minimised():
    assert "optuna.direction" in refused({RATE: RATES}, metric="loss")
    check_space(load_run("lora_mnli", {"optuna.metric": "loss", "optuna.direction": "minimize"}))


def test_a_sweeps_budget_is_time_or_energy():
    assert "optuna.budget: a whole sweep is measured in time or energy" in refused({RATE: RATES}, budget="200steps")


def test_the_command_refuses_with_exit_2_and_leaves_nothing(fastpeft_here, tmp_path):
    space = "optuna.space={training.batch_size: {type: categorical, choices: [[1, 2]]}}"
    message = fastpeft_here("sweep", "--run", "lora_mnli", space).refused()
    assert "optuna.space.training.batch_size" in message
    assert "sweep needs --run" in fastpeft_here("sweep").refused()
    high = "optuna.space={training.batch_size: {type: int, low: -4, high: 8}}"
    assert "a trial with -4" in fastpeft_here("sweep", "--run", "lora_mnli", high).refused()
    assert list(tmp_path.iterdir()) == []


def test_the_four_types_become_optunas():
    space = {
        RATE: SearchParameter(type="loguniform", low=1e-5, high=1e-3),
        "optimizer.weight_decay": SearchParameter(type="uniform", low=0, high=0.1),
        "adapter.rank": SearchParameter(type="int", low=2, high=16),
        "training.batch_size": SearchParameter(type="categorical", choices=[16, 32]),
    }
    assert distributions(space) == {
        RATE: FloatDistribution(1e-5, 1e-3, log=True),
        "optimizer.weight_decay": FloatDistribution(0, 0.1),
        "adapter.rank": IntDistribution(2, 16),
        "training.batch_size": CategoricalDistribution((16, 32)),
    }


def test_a_child_may_change_a_parameters_type(tmp_path):
    text = "extends: lora_mnli\noptuna: {space: {training.batch_size: {type: int, low: 8, high: 64}}}\n"
    (tmp_path / "a.yaml").write_text(text)
    space = load_run(tmp_path / "a.yaml").optuna.space
    assert space["training.batch_size"] == SearchParameter(type="int", low=8, high=64)
    assert RATE in space


def test_a_trial_is_not_tracked_and_has_its_own_budget():
    run = load_run("lora_mnli", {"optuna.trial_budget": "3m", "budget": "1h", "tensorboard": True})
    trial = with_values(run, trial_settings(run.optuna, {RATE: 3e-4}))
    assert (trial.training.learning_rate, trial.budget) == (3e-4, "3m")
    assert trial.wandb.mode == "disabled"  # pyright: ignore
    assert trial.tensorboard is False  # pyright: ignore
    assert trial_settings(OptunaConfig(), {}).get("budget") is None


def test_what_differs_is_said_by_key():
    before = identity(load_run("lora_mnli"))
    assert differences(before, identity(load_run("lora_mnli"))) == []
    space = {RATE: RATES | {"low": 2e-5}}
    now = identity(load_run("lora_mnli", {"optuna.space": space, "training.epochs": 5}))
    assert differences(before, now) == [
        "training.epochs: 3.0 there, 5.0 here",
        f"optuna.space.{RATE}: {{'type': 'loguniform', 'low': 1e-05, 'high': 0.0005}} there, "
        "{'type': 'loguniform', 'low': 2e-05, 'high': 0.001} here",
        "optuna.space.training.batch_size: {'type': 'categorical', 'choices': [16, 32, 64]} there, absent here",
    ]


@pytest.mark.parametrize(
    "more", [{"trials": 60}, {"budget": "3h"}, {"max_failures": 9}, {"seeds": "0,1"}], ids=lambda more: next(iter(more))
)
def test_more_of_the_same_is_the_same_sweep(more):
    other = load_run("lora_mnli", {f"optuna.{key}": value for key, value in more.items()} | {"wandb.mode": "offline"})
    assert differences(identity(load_run("lora_mnli")), identity(other)) == []


# ---- presets -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets(preset_names()))
def test_every_preset_can_be_swept_around_its_own_settings(name):
    run = load_run(name)
    check_space(run)
    assert_around(run)
    if run.stand_in is not None:
        check_space(apply_stand_in(run))
        assert_around(apply_stand_in(run))


def assert_around(run):
    """The settings that the file has are among those that are searched."""
    from fastpeft.config import run_values

    for key, searched in run.optuna.space.items():
        value: Any = run_values(run)
        for part in key.split("."):
            value = value[part]
        if searched.choices is not None:
            assert value in searched.choices, key
        else:
            assert searched.low <= value <= searched.high, f"{key}: {value} is not in {searched}"
