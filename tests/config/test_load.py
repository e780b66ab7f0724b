"""From a YAML file and overrides to a RunConfig, and back: what is inherited, set and kept."""

from __future__ import annotations

import dataclasses
import math

import pytest
import yaml

import fastpeft
from fastpeft.config import (
    ConfigError,
    apply_stand_in,
    load_run,
    preset_names,
    run_from_values,
    run_values,
    save_run,
    trial_run,
)
from fastpeft.config import load as loading
from tests.support.file_limit import files_of_at_most
from tests.support.run_files import SMALL, one_problem, problems, write
from tests.support.tiers import presets

PRESET_FILES = sorted(loading.PRESETS.rglob("*.yaml"))
# ---- presets -------------------------------------------------------------------------------


def test_every_shipped_file_is_a_preset_and_each_name_is_given_once():
    assert [path.stem for path in PRESET_FILES] == preset_names()
    assert {"lora_mnli", "iwlora_mnli"} <= set(preset_names())


@pytest.mark.parametrize("path", presets(PRESET_FILES))
def test_a_preset_survives_saving_and_loading(path, tmp_path):
    run = load_run(path.stem)
    save_run(run, tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == run
    assert load_run(path) == run


@pytest.mark.parametrize("path", presets(PRESET_FILES))
def test_a_trial_of_a_preset_is_small_and_survives_saving_too(path, tmp_path):
    run = trial_run(load_run(path.stem))
    assert (run.budget, run.wandb.mode) == ("2steps", "disabled")
    assert run.method != "iw_lora" or run.regulariser.warmup_steps == 2
    assert 0 < run.evaluation.max_examples <= 32
    assert (run.evaluation.every, run.training.checkpoint_steps) == ("1steps", 1)
    save_run(run, tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == run


@pytest.mark.parametrize("path", presets(PRESET_FILES))
def test_a_presets_file_agrees_with_its_name_and_has_a_stand_in(path):
    run = load_run(path.stem)
    assert run.run_id == path.stem
    assert run.overrides == {}
    if run.stand_in is None:
        assert run.model.name.startswith("embedded/")
    else:
        assert apply_stand_in(run).stand_in is None


def test_two_presets_that_differ_in_one_thing_differ_in_one_thing():
    lora, iw_lora = run_values(load_run("lora_mnli")), run_values(load_run("iwlora_mnli"))
    differing = {section for section in lora if lora[section] != iw_lora[section]}
    assert differing <= {"run_id", "method", "regulariser", "optuna"}


def test_a_preset_in_a_folder_of_its_own_is_found_by_its_name(tmp_path, monkeypatch):
    write(tmp_path / "deep" / "nested.yaml", SMALL)
    monkeypatch.setattr(loading, "PRESETS", tmp_path)
    assert preset_names() == ["nested"]
    assert load_run("nested").run_id == "small"


# ---- extends -------------------------------------------------------------------------------


def test_a_chain_of_files_inherits_key_by_key_and_the_last_one_wins(tmp_path):
    write(tmp_path / "a.yaml", SMALL + "training: {seed: 1, batch_size: 8}\nadapter: {rank: 2}\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\ntraining: {seed: 2, epochs: 5}\n")
    write(tmp_path / "c.yaml", "extends: b.yaml\ntraining: {seed: 3}\n")
    run = load_run(tmp_path / "c.yaml")
    assert (run.training.seed, run.training.epochs, run.training.batch_size, run.adapter.rank) == (3, 5, 8, 2)


def test_extends_is_looked_for_beside_the_file_whatever_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path / "base" / "a.yaml", SMALL + "training: {seed: 7}\n")
    write(tmp_path / "runs" / "b.yaml", "extends: ../base/a.yaml\n")
    write(tmp_path / "a.yaml", SMALL + "training: {seed: 8}\n")
    monkeypatch.chdir(tmp_path)
    assert load_run("runs/b.yaml").training.seed == 7


def test_extends_takes_a_presets_name(tmp_path):
    run = load_run(write(tmp_path / "mine.yaml", "extends: iwlora_mnli\nrun_id: mine\n"))
    assert dataclasses.replace(run, run_id="iwlora_mnli") == load_run("iwlora_mnli")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_circle_of_extends_is_named(tmp_path, length):
    for i in range(length):
        write(tmp_path / f"r{i}.yaml", f"extends: r{(i + 1) % length}.yaml\n")
    circle = " -> ".join(f"r{i}" for i in [*range(length), 0])
    assert circle in one_problem(tmp_path / "r0.yaml")


@pytest.mark.parametrize("parent", ["nowhere.yaml", "nowhere", "../nowhere.yaml", "''", ".", '"a\\0b"', "x" * 5000])
def test_a_missing_parent_is_named_with_the_file_that_asks_for_it(tmp_path, parent):
    path = write(tmp_path / "child.yaml", f"extends: {parent}\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert "child.yaml: extends" in str(caught.value)


@pytest.mark.parametrize("parent", ["[lora_mnli]", "{a: b}", "3", "2020-01-01", "true"])
def test_a_parent_that_is_no_name_is_refused(tmp_path, parent):
    assert "expected a preset's name or a path" in one_problem(write(tmp_path / "a.yaml", f"extends: {parent}\n"))


def test_a_mistake_in_the_parent_is_reported_for_the_child(tmp_path):
    write(tmp_path / "a.yaml", SMALL + "training: {seed: -1}\n")
    assert one_problem(write(tmp_path / "b.yaml", "extends: a.yaml\n")).startswith("training.seed: ")


# ---- overrides -----------------------------------------------------------------------------


def test_overrides_are_yaml_values_at_dotted_keys():
    texts = ["training.learning_rate=1e-4", "adapter.target_modules=[a, b]", "budget=2h", "regulariser.online=true"]
    run = load_run("lora_mnli", texts)
    assert (run.training.learning_rate, run.adapter.target_modules) == (1e-4, ["a", "b"])
    assert (run.budget, run.regulariser.online) == ("2h", True)
    assert set(run.overrides) == {text.partition("=")[0] for text in texts}


def test_an_override_keeps_what_stands_behind_the_second_equals_sign():
    assert load_run("lora_mnli", ["wandb.project=a=b"]).wandb.project == "a=b"


def test_the_last_of_two_overrides_wins():
    assert load_run("lora_mnli", ["training.seed=1", "training.seed=2"]).training.seed == 2


def test_a_section_given_as_a_dict_sets_its_keys_and_leaves_the_others():
    before = load_run("lora_mnli").training
    for run in (
        load_run("lora_mnli", ["training={seed: 5}"]),
        load_run("lora_mnli", {"training": {"seed": 5}}),
        fastpeft.load_run("lora_mnli", training={"seed": 5}),
        fastpeft.load_run("lora_mnli", **{"training.seed": 5}),
    ):
        assert run.training == dataclasses.replace(before, seed=5)
        assert run.overrides == {"training.seed": 5}


@pytest.mark.parametrize("text", ["training.seed", "", "=", "=3", " =3", "seed: 3"])
def test_an_override_without_key_and_value_is_refused(text):
    assert "key=value" in one_problem("lora_mnli", [text])


@pytest.mark.parametrize("key", [".", "..", "a..b", "training.", ".training", "training.seed.x.y", "model.name.x", "é"])
def test_an_override_of_no_key_is_refused(key):
    problems("lora_mnli", [f"{key}=3"])


@pytest.mark.parametrize(
    "value", ["[", "{a", "!!bool x", "!!int ''", "!!timestamp x", "*a", "&a [*a]", "[" * 5000, "\udcff"]
)
def test_an_override_that_is_no_yaml_is_refused(value):
    assert "training.seed: the value is not valid YAML" in one_problem("lora_mnli", [f"training.seed={value}"])


def test_extends_is_no_override():
    assert "extends: unknown key" in one_problem("lora_mnli", ["extends=iwlora_mnli"])


# ---- round trips ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "1e5",
        "null",
        "~",
        "a: b",
        "- x",
        "#",
        "é雪",
        "'",
        '"',
        "0x1F",
        "1:30",
        " x ",
        "a\nb",
        "\t",
        "\ud800",
        "x" * 500,
    ],
)
def test_awkward_text_survives_saving_and_loading(text, tmp_path):
    run = load_run("lora_mnli", {"wandb.project": text, "dataset.labels": [text, "other"]})
    save_run(run, tmp_path / "run.yaml")
    again = load_run(tmp_path / "run.yaml")
    assert (again.wandb.project, again.dataset.labels) == (text, [text, "other"])
    assert again == run


@pytest.mark.parametrize("value", [5e-324, 1e-45, 1e-5, 1e22, 1.7976931348623157e308, 0.1 + 0.2, math.pi * 1e-7])
def test_numbers_survive_saving_and_loading_bit_for_bit(value, tmp_path):
    save_run(load_run("lora_mnli", {"training.learning_rate": value}), tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml").training.learning_rate == value


def test_a_write_that_is_cut_off_leaves_the_run_that_was_there(tmp_path):
    path, run = tmp_path / "run.yaml", load_run("lora_mnli")
    save_run(run, path)
    with files_of_at_most(path.stat().st_size // 2), pytest.raises(OSError, match="File too large"):
        save_run(load_run("iwlora_mnli"), path)
    assert load_run(path) == run


def test_a_saved_run_is_plain_yaml():
    assert yaml.safe_load(yaml.safe_dump(run_values(load_run("iwlora_mnli")))) == run_values(load_run("iwlora_mnli"))


def test_values_make_the_run_that_they_came_from():
    run = load_run("iwlora_mnli")
    assert run_from_values(run_values(run), "here") == run


# ---- schema --------------------------------------------------------------------------------


def test_the_schema_tells_documentation_bounds_and_choices():
    schema = loading.json_schema()
    sections = schema["$defs"]
    rank = sections["AdapterConfig"]["properties"]["rank"]
    assert rank["description"] == "Rank r of every update B A."
    assert (rank["minimum"], rank["maximum"], rank["default"]) == (1, 256, 8)
    assert sections["TrainingConfig"]["properties"]["learning_rate"]["exclusiveMinimum"] == 0
    assert "cosine" in sections["ScheduleConfig"]["properties"]["name"]["enum"]
    assert all(section["additionalProperties"] is False for section in [schema, *sections.values()])


def test_the_schema_lets_a_file_inherit_what_else_it_must_give():
    schema = loading.json_schema()
    assert "extends" in schema["properties"]
    assert {"required": ["extends"]} in schema["anyOf"]
    assert {"required": ["run_id", "method", "model"]} in schema["anyOf"]
    assert "required" not in schema


def test_the_schema_knows_every_key_of_every_preset():
    schema = loading.json_schema()
    for path in PRESET_FILES:
        for section, values in yaml.safe_load(path.read_text()).items():
            if values is None:
                continue
            place = schema["properties"][section]
            reference = place.get("$ref") or next((o["$ref"] for o in place.get("anyOf", []) if "$ref" in o), None)
            if reference is not None:
                assert set(values) <= set(schema["$defs"][reference.rpartition("/")[2]]["properties"]), (path, section)


@pytest.mark.parametrize(
    ("key", "meant"),
    [("learning_rate", "training.learning_rate"), ("alpha", "adapter.alpha or regulariser.alpha")],
)
def test_a_key_without_its_section_is_told_where_it_is(key, meant):
    with pytest.raises(ConfigError, match=rf"{key}: unknown key; did you mean {meant}\?"):
        load_run("lora_mnli", [f"{key}=1"])
