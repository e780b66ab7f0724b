"""From a YAML file and overrides to a RunConfig: what is inherited, what is refused, and how it is said."""

from __future__ import annotations

import codecs
import dataclasses
import math
from pathlib import Path

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
from fastpeft.errors import UserError

PRESET_FILES = sorted(loading.PRESETS.rglob("*.yaml"))
SMALL = "run_id: small\nmethod: lora\nmodel: {name: some/model}\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problems(name_or_path: str | Path, overrides=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(name_or_path, overrides)
    assert all(line in str(caught.value) for line in caught.value.problems)
    return caught.value.problems


def one_problem(name_or_path: str | Path, overrides=()) -> str:
    found = problems(name_or_path, overrides)
    assert len(found) == 1, found
    return found[0]


# ---- presets -------------------------------------------------------------------------------


def test_every_shipped_file_is_a_preset_and_each_name_is_given_once():
    assert [path.stem for path in PRESET_FILES] == preset_names()
    assert {"lora_mnli", "iwlora_mnli"} <= set(preset_names())


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda path: path.stem)
def test_a_preset_survives_saving_and_loading(path, tmp_path):
    run = load_run(path.stem)
    save_run(run, tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == run
    assert load_run(path) == run


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda path: path.stem)
def test_a_trial_of_a_preset_is_small_and_survives_saving_too(path, tmp_path):
    run = trial_run(load_run(path.stem))
    assert (run.budget, run.regulariser.warmup_steps, run.wandb.mode) == ("2steps", 2, "disabled")
    assert 0 < run.evaluation.max_examples <= 32
    assert (run.evaluation.every, run.training.checkpoint_steps) == ("1steps", 1)
    save_run(run, tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == run


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda path: path.stem)
def test_a_presets_file_agrees_with_its_name_and_has_a_stand_in(path):
    run = load_run(path.stem)
    assert run.run_id == path.stem
    assert run.overrides == {}
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


# ---- values --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "'1e-4'", ".1e-3"])
def test_scientific_notation_is_a_number(tmp_path, text):
    path = write(tmp_path / "a.yaml", SMALL + f"training: {{learning_rate: {text}}}\n")
    assert load_run(path).training.learning_rate == 1e-4


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "nan", "inf", "1e999", "-1", "0", "[]", "abc", "2001-01-01"])
def test_a_learning_rate_that_is_none_is_refused(text):
    assert one_problem("lora_mnli", [f"training.learning_rate={text}"]).startswith("training.learning_rate: expected ")


@pytest.mark.parametrize("key", ["training.seed", "training.batch_size", "schedule.warmup_steps", "dataset.max_length"])
@pytest.mark.parametrize("text", ["-1", "1.5", "null", "9" * 40, "9" * 5000, ".nan", ".inf", "0b2", "seven"])
def test_a_count_that_is_none_is_refused(key, text):
    assert one_problem("lora_mnli", [f"{key}={text}"]).startswith(f"{key}: ")


def test_the_largest_seed_of_32_bits_is_taken():
    assert load_run("lora_mnli", {"training.seed": 2**32 - 1}).training.seed == 2**32 - 1


@pytest.mark.parametrize("text", ["../x", "a/b", "", "a b", ".hidden", "-x", "é", "x" * 101, "a\nb"])
def test_a_run_id_that_cannot_begin_a_folders_name_is_refused(text):
    assert "folder's name" in one_problem("lora_mnli", {"run_id": text})


def test_a_budget_without_unit_is_told_how_to_be_written():
    for given in ({"budget": 30}, {"budget": "30"}, ["budget=30"]):
        assert "2000steps, 5Mtok or 50kJ" in one_problem("lora_mnli", given)
    assert "epoch or end" in one_problem("lora_mnli", {"evaluation.every": 500})
    assert "epoch or end" in one_problem("lora_mnli", {"evaluation.every": None})


def test_labels_that_yaml_reads_as_booleans_are_told_of_quotes():
    found = problems("lora_mnli", ["dataset.labels=[no, yes]"])
    assert [line.partition(":")[0] for line in found] == ["dataset.labels.0", "dataset.labels.1"]
    assert all("quotes" in line for line in found)
    assert load_run("lora_mnli", ["dataset.labels=['no', 'yes']"]).dataset.labels == ["no", "yes"]


@pytest.mark.parametrize("labels", [[], ["a"], ["a", "a"], ["a", "b", "a"]])
def test_labels_are_two_or_more_different_names(labels):
    assert "dataset.labels: expected two or more different names" in one_problem(
        "lora_mnli", {"dataset.labels": labels}
    )


# ---- messages ------------------------------------------------------------------------------


def test_every_problem_is_reported_at_once(tmp_path):
    text = """
    run_id: wrong
    method: iwlora
    modle: {name: a}
    training: {learning_rat: 1, seed: -1, precision: fp8}
    adapter: 3
    budget: 30
    evaluation: {every: never}
    optuna: {space: {training.seed: {type: int, low: 5}}}
    """
    found = problems(write(tmp_path / "wrong.yaml", text))
    assert {line.partition(":")[0] for line in found} == {
        "method", "modle", "model", "training.learning_rat", "training.seed", "training.precision", "adapter", "budget",
        "evaluation.every", "optuna.space.training.seed",
    }  # fmt: skip
    assert len(found) == 10


def test_an_unknown_key_is_answered_with_the_nearest_one_and_all_known_ones():
    line = one_problem("lora_mnli", ["training.learning_rat=1"])
    assert "did you mean learning_rate?" in line
    assert "batch_size" in line
    assert "seed" in line


def test_an_unknown_choice_is_answered_with_the_allowed_ones_and_the_nearest():
    line = one_problem("lora_mnli", ["schedule.name=cosin"])
    assert "did you mean cosine?" in line
    assert "'wsd'" in line


def test_a_key_far_down_is_answered_with_the_keys_of_its_own_section():
    space = {"training.seed": {"type": "int", "low": 1, "hig": 2}}
    line = one_problem("lora_mnli", {"optuna.space": space})
    assert line.startswith("optuna.space.training.seed.hig: ")
    assert "did you mean high?" in line
    assert "choices" in line
    assert "text_pair" in one_problem("lora_mnli", ["dataset.columns.txt=a"])


def test_a_value_in_the_place_of_a_section_is_answered_with_its_keys():
    for value in (3, None, [], "x"):
        line = one_problem("lora_mnli", {"model": value})
        assert "model: expected a section with keys" in line
        assert "name, revision" in line


def test_what_has_no_default_is_named(tmp_path):
    assert [line.partition(":")[0] for line in problems(write(tmp_path / "a.yaml", "training: {}\n"))] == [
        "run_id", "method", "model",
    ]  # fmt: skip
    assert (
        one_problem(write(tmp_path / "b.yaml", SMALL.replace("name", "revision")))
        == "model.name: missing; it has no default"
    )


@pytest.mark.parametrize("name", ["lora_mnl", "loramnli", "LORA_MNLI "])
def test_an_unknown_preset_is_answered_with_the_nearest_one(name):
    line = one_problem(name)
    assert "presets: " in line
    assert name.startswith("LORA") or "did you mean lora_mnli?" in line


@pytest.mark.parametrize("name", ["", ".", "/", "a.yaml", "a/b", "x" * 5000, "a\0b", "~", "lora_mnli/", "../lora_mnli"])
def test_a_name_of_nothing_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_problem(name)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"method": "iw_lora", "regulariser.estimator": "lora_a"}, "warmup_learning_rate > 0"),
        (
            {
                "method": "iw_lora", "regulariser.estimator": "lora_a", "regulariser.calibration": "inline",
                "regulariser.warmup_learning_rate": 1e-4,
            },
            "inline takes the sketch",
        ),
        ({"method": "iw_lora", "regulariser.calibration": "inline", "schedule.warmup_steps": 0}, "warm-up"),
        ({"optuna.space": {"training.sed": {"type": "int", "low": 1, "high": 2}}}, "did you mean training.seed?"),
        ({"stand_in.overrides": {"training.sed": 1}}, "did you mean training.seed?"),
        ({"optuna.space": {"training.seed": {"type": "int", "low": 2, "high": 1}}}, "low must be under high"),
        ({"optuna.space": {"training.seed": {"type": "loguniform", "low": 0, "high": 1}}}, "positive for loguniform"),
        ({"optuna.space": {"training.seed": {"type": "categorical"}}}, "takes `choices`"),
        ({"optuna.space": {"training.seed": {"type": "uniform", "choices": [1]}}}, "takes `low` and `high`"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(overrides, words):
    assert words in one_problem("lora_mnli", overrides)


# ---- stand-in ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.name=other/model"],
        ["model.revision=abc"],
        ["dataset.name=other"],
        ["dataset.path=somewhere"],
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
            place = schema["properties"][section]
            reference = place.get("$ref") or next((o["$ref"] for o in place.get("anyOf", []) if "$ref" in o), None)
            if reference is not None:
                assert set(values) <= set(schema["$defs"][reference.rpartition("/")[2]]["properties"]), (path, section)


# ---- hostile files -------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "m0: &m0 {x: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 40))
HOSTILE = {
    "empty": b"",
    "blank": b"\n\n  \n",
    "comment": b"# nothing\n",
    "null": b"~",
    "list": b"- a\n- b\n",
    "text": b"hello",
    "number": b"3",
    "two documents": b"a: b\n---\nc: d\n",
    "not utf-8": b"run_id: \xff\xfe\n",
    "utf-16": codecs.BOM_UTF16_LE + SMALL.encode("utf-16-le"),
    "nul": b"run_id: \x00",
    "binary": bytes(range(256)),
    "tabs": b"model:\n\tname: x\n",
    "unclosed": b"model: {name: [",
    "deep list": b"a: " + b"[" * 5000,
    "deep map": b"a: " + b"{a: " * 5000,
    "list as key": b"? [a, b]\n: 3\n",
    "map as key": b"? {a: 1}\n: 3\n",
    "number as key": SMALL.encode() + b"1: 2\n",
    "null as key": SMALL.encode() + b"training: {~: 2}\n",
    "key twice": SMALL.encode() + b"training: {seed: 1}\ntraining: {epochs: 1}\n",
    "endless": b"a: &a [*a]\n",
    "endless overrides": SMALL.encode() + b"overrides: &a {x: *a}\n",
    "bomb": BOMB.encode(),
    "bomb of merges": MERGES.encode(),
    "bomb in overrides": (SMALL + "overrides:\n" + "".join(f"  {line}\n" for line in BOMB.splitlines())).encode(),
    "merge of nothing": b"<<: 3\n",
    "unknown tag": b"a: !foo 3\n",
    "no bool": b"a: !!bool 3\n",
    "no int": b"a: !!int ''\n",
    "no float": b"a: !!float x\n",
    "no date": b"a: !!timestamp x\n",
    "no such day": b"a: 2001-99-99\n",
    "no map": b"a: !!map 3\n",
    "no set": b"a: !!set 3\n",
    "no base64": b"a: !!binary '\xc3\xa9'\n",
    "bytes": SMALL.encode() + b"budget: !!binary aGVsbG8=\n",
    "set": SMALL.encode() + b"dataset: !!set {name, path}\n",
    "pairs": SMALL.encode() + b"dataset: !!pairs [name: a]\n",
    "digits": SMALL.encode() + b"training: {seed: " + b"9" * 6000 + b"}\n",
    "garbage": SMALL.encode() + b"training: [{seed: {a: [1, {b: ~}]}}]\n",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_in_words(content, tmp_path):
    path = tmp_path / "hostile.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"hostile\.yaml: ") as caught:
        load_run(path)
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize("tag", [
    "!!python/object/apply:pathlib.Path.touch", "!!python/object/new:subprocess.Popen", "!!python/name:os.system",
    "!!python/module:antigravity", "!!python/object:fastpeft.config.Budget", "!!python/tuple", "!!python/none",
])  # fmt: skip
def test_python_tags_are_never_constructed(tag, tmp_path):
    touched = tmp_path / "touched"
    for given in (f"{tag} ['{touched}']", f"{tag} [[touch, '{touched}']]", f"{tag} ''"):
        path = write(tmp_path / "a.yaml", SMALL + f"overrides: {{x: {given}}}\n")
        assert "could not determine a constructor" in one_problem(path)
        assert "could not determine a constructor" in one_problem("lora_mnli", [f"model.name={given}"])
    assert not touched.exists()


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.yaml", tmp_path / "missing" / "a.yaml"):
        assert one_problem(path) == "there is no such file"


def test_a_byte_order_mark_is_no_hindrance(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(codecs.BOM_UTF8 + SMALL.replace("\n", "\r\n").encode())
    assert load_run(path).run_id == "small"
