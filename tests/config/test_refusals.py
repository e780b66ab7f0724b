"""Wrong values and hostile files: everything that is refused, and in which words."""

from __future__ import annotations

import codecs

import pytest

from fastpeft.config import load_run
from fastpeft.errors import UserError
from tests.support.run_files import SMALL, one_problem, problems, write

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


@pytest.mark.parametrize("key", ["config", "revision", "train_split", "validation_split"])
def test_keys_of_hub_datasets_do_not_go_with_a_path(key):
    found = one_problem("lora_mnli", {"dataset.path": "somewhere", f"dataset.{key}": "x"})
    assert found.startswith(f"dataset.{key}: is for datasets of the hub")


@pytest.mark.parametrize("splits", [{"validation_split": "train"}, {"train_split": "a", "validation_split": "a"}])
def test_what_is_trained_on_is_not_evaluated_on(splits):
    given = {f"dataset.{key}": value for key, value in splits.items()} | {"dataset.name": "a/b"}
    assert "is the split that is trained on" in one_problem("lora_mnli", given)


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
        ({"schedule.name": "fot", "schedule.fot.calibrate": True, "schedule.fot.alignment": True}, "switch one off"),
        ({"schedule.name": "fot", "schedule.fot.confidence": 2.0}, "alignment, which is off"),
        ({"schedule.name": "fot", "schedule.fot.overshoot": 1.0}, "alignment, which is off"),
        ({"schedule.name": "snac", "optimizer.beta1": 0}, "optimizer.beta1: schedule snac tells signal from noise"),
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
