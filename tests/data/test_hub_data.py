"""Datasets by name, from a hub on loopback and from the cache that they leave behind."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fastpeft.config.schema import ColumnsConfig, DatasetConfig
from fastpeft.data.hub_datasets import HubDataset, is_cached
from fastpeft.data.hub_datasets import hub_dataset as find_dataset
from fastpeft.data.rows import DataError
from fastpeft.errors import UnavailableError, UserError
from fastpeft.tasks import find_known, known_names, load_task
from tests.support.classifiers import load_texts
from tests.support.fake_hub import FakeHub
from tests.support.hub_files import CLASSES, GLUE, card, glue_files, glue_rows, parquet
from tests.support.real_data import DATA

OWN = "someone/Reviews-2024"


@pytest.fixture(scope="module")
def glue() -> dict[str, bytes]:
    return glue_files()


def config(name: str = OWN, **fields) -> DatasetConfig:
    return DatasetConfig(name=name, **fields)


def reviews(count: int, **more) -> list[dict]:
    return [{"text": f"review {i}", "label": i % 2} | more for i in range(count)]


def own(hub: FakeHub, files: dict[str, bytes] | None = None, **splits: int) -> str:
    """A repository of one's own, its splits found by the names of its files. Returns the commit."""
    if files is None:
        files = {f"data/{s}-00000-of-00001.parquet": parquet(reviews(n), ("neg", "pos")) for s, n in splits.items()}
    return hub.add("dataset", OWN, files).refs["main"]


def hub_dataset(of: DatasetConfig) -> HubDataset:
    """As a run finds it."""
    known = find_known(of)
    return find_dataset(of, known and known.dataset, known_names())


def refusal(of: DatasetConfig, kind: type[Exception] = UnavailableError) -> str:
    with pytest.raises(kind) as error:
        load_task(of)
    assert isinstance(error.value, UserError)
    assert error.value.exit_code == (3 if kind is UnavailableError else 2)
    return str(error.value)


def offline(hub: FakeHub, of: DatasetConfig) -> SimpleNamespace:
    """Loaded with a hub that would give nothing any more."""
    repositories, hub.repositories = hub.repositories, {}
    asked = len(hub.requests)
    try:
        return load_texts(of)
    finally:
        hub.repositories = repositories
        assert hub.requests[asked:] == []


# ---- GLUE ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSES)
def test_a_glue_task(task, glue, fake_hub):
    fake_hub.add("dataset", GLUE, glue)
    got = load_texts(config(task))
    assert got.name == task
    assert got.label_names == CLASSES[task]
    for split, name in (
        (got.train, "train"),
        (got.validation, "validation" if task != "mnli" else "validation_matched"),
    ):
        rows = glue_rows(task, name, len(split))
        assert split.labels == [row["label"] for row in rows]
        first, *second = [key for key in rows[0] if key not in ("label", "idx")]
        assert split.text == [row[first] for row in rows]
        assert split.text_pair == ([row[second[0]] for row in rows] if second else None)
    assert (len(got.train), len(got.validation)) == (48, 24)
    assert got.f1_class == (0 if task == "rte" else None)
    assert all(path.startswith(f"{task}/") or path == "README.md" for path in fake_hub.downloads())
    assert offline(fake_hub, config(task)) == got


def test_a_cached_task_does_not_bring_the_others(glue, fake_hub):
    fake_hub.add("dataset", GLUE, glue)
    load_texts(config("rte"))
    assert is_cached(hub_dataset(config("rte")))
    assert not is_cached(hub_dataset(config("sst2")))


def test_glue_has_one_configuration_a_task():
    with pytest.raises(UserError, match=r"dataset\.config 'rte'"):
        load_task(config("mnli", config="rte"))


@pytest.mark.parametrize("name", ["mnlii", "glue", "a/b/c", "local"])
def test_a_name_that_is_nothing(name):
    message = refusal(config(name))
    assert repr(name) in message
    assert "owner/name" in message
    assert ("did you mean mnli?" in message) == (name == "mnlii")


# ---- a dataset of the user's choice --------------------------------------------------------


def test_class_names_of_the_dataset(fake_hub):
    own(fake_hub, train=20, test=8, validation=6)
    task = load_texts(config())
    assert (task.name, task.label_names) == (OWN, ("neg", "pos"))
    assert (len(task.train), len(task.validation)) == (20, 6)
    assert task.train.labels == [0, 1] * 10
    assert task.notes == (
        "of 6 validation rows these stand in the training rows too: 6 (100.0%)",
        "of 8 test rows these stand in the training rows too: 8 (100.0%)",
    )
    assert offline(fake_hub, config()) == task


@pytest.mark.parametrize("split", ["dev", "validation"])
def test_usual_names_of_the_validation_split(split, fake_hub):
    own(fake_hub, card_files({"train": 12, "test": 4, split: 8}))
    assert len(load_texts(config()).validation) == 8


def card_files(splits: dict[str, int]) -> dict[str, bytes]:
    """Files whose splits only the card names."""
    files = {f"{split}.parquet": parquet(reviews(n), ("neg", "pos")) for split, n in splits.items()}
    return {"README.md": card({"default": {split: f"{split}.parquet" for split in splits}}), **files}


def test_the_test_split_is_not_chosen_on(fake_hub):
    own(fake_hub, train=20, test=8)
    task = load_texts(config(validation_fraction=0.25))
    assert (len(task.train), len(task.validation)) == (15, 5)
    assert not set(task.train.text) & set(task.validation.text)
    assert task.notes[0] == f"{OWN} has no validation split: 25% of its training rows, 5, are held out"
    assert task.test is not None
    assert len(task.test) == 8
    named = load_texts(config(validation_split="test"))
    assert (len(named.train), len(named.validation)) == (20, 8)
    assert not any("held out" in note for note in named.notes)


def test_named_splits(fake_hub):
    own(fake_hub, card_files({"a": 10, "b": 4}))
    assert "set dataset.train_split to one of a, b" in refusal(config(), DataError)
    task = load_texts(config(train_split="a", validation_split="b"))
    assert (len(task.train), len(task.validation)) == (10, 4)
    message = refusal(config(train_split="a", validation_split="c"), DataError)
    assert "dataset.validation_split" in message
    assert "it has a, b" in message


def test_configurations(fake_hub):
    texts = {name: parquet(reviews(6, config=name), ("neg", "pos")) for name in ("en", "de")}
    files = {f"{name}.parquet": data for name, data in texts.items()}
    patterns = {name: {"train": f"{name}.parquet"} for name in texts}
    own(fake_hub, {"README.md": card(patterns), **files})
    assert "set dataset.config to one of en, de" in refusal(config())
    assert "no configuration 'fr'; set dataset.config to one of en, de" in refusal(config(config="fr"))
    for name in ("en", "de"):
        assert load_texts(config(config=name)).name == f"{OWN}/{name}"
        assert not is_cached(hub_dataset(config()))


def test_the_default_configuration_is_the_cards_and_not_the_one_that_is_cached(fake_hub):
    files = {f"{name}.parquet": parquet([{"text": f"{name} {i}", "label": i % 2} for i in range(6)]) for name in "ab"}
    patterns = {name: {"train": f"{name}.parquet"} for name in "ab"}
    own(fake_hub, {"README.md": card(patterns, default="a"), **files})
    assert load_texts(config(config="b")).train.text[0].startswith("b")
    assert not is_cached(hub_dataset(config()))
    assert load_texts(config()).train.text[0].startswith("a")
    assert offline(fake_hub, config()).train.text[0].startswith("a")


@pytest.mark.parametrize("text", ["configs: [a", "- a", "configs: x", "configs:\n- a", "dataset_info: [1]"])
def test_a_malformed_card_is_a_message_the_second_time_too(text, fake_hub):
    data = parquet(reviews(6), ("neg", "pos"))
    own(fake_hub, {"README.md": f"---\n{text}\n---\n".encode(), "train.parquet": data})
    for _ in range(2):
        assert not is_cached(hub_dataset(config()))
        assert "cannot be read" in refusal(config())


def test_csv_and_a_column_map(fake_hub):
    lines = ["kind,body,stars", *(f"x,body {i},{1 + i % 3}" for i in range(30))]
    own(fake_hub, {"train.csv": "\n".join(lines).encode()})
    assert "dataset.columns.text" in refusal(config(), DataError)
    task = load_texts(config(columns=ColumnsConfig(text="body", label="stars")))
    assert task.label_names == ("1", "2", "3")
    assert "dataset.columns.text is 'no', but the columns are kind, body, stars" in refusal(
        config(columns=ColumnsConfig(text="no")), DataError
    )


def test_jsonl_with_label_names(fake_hub):
    lines = [json.dumps({"text": f"t {i}", "label": ["no", "yes"][i % 2]}) for i in range(20)]
    own(fake_hub, {"train.jsonl": "\n".join(lines).encode()})
    task = load_texts(config(labels=["yes", "no"]))
    assert task.label_names == ("yes", "no")
    assert {label for text, label in zip(task.train.text, task.train.labels) if int(text[2:]) % 2} == {0}


def test_dataset_labels_and_the_datasets_classes(fake_hub):
    """The same names in another order are another numbering; other names rename the classes."""
    own(fake_hub, train=10, validation=4)
    assert load_texts(config(labels=["pos", "neg"])).train.labels == [1, 0] * 5
    renamed = load_texts(config(labels=["bad", "good"]))
    assert (renamed.label_names, renamed.train.labels) == (("bad", "good"), [0, 1] * 5)
    assert "3 names are given, but column 'label'" in refusal(config(labels=["a", "b", "c"]), DataError)


def test_class_names_that_are_numbers(fake_hub):
    """Stars 1 to 3 are classes 0 to 2: the number of a class is not its name."""
    rows = [{"text": f"t {i}", "label": i % 3} for i in range(9)]
    own(
        fake_hub,
        {"train.parquet": parquet(rows, ("1", "2", "3")), "validation.parquet": parquet(rows, ("1", "2", "3"))},
    )
    task = load_texts(config())
    assert (task.label_names, task.train.labels) == (("1", "2", "3"), [0, 1, 2] * 3)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_without_a_gold_label(split, fake_hub):
    rows = {"train": reviews(10), "validation": reviews(4)}
    rows[split][2]["label"] = -1
    own(fake_hub, {f"{name}.parquet": parquet(r, ("neg", "pos")) for name, r in rows.items()})
    message = refusal(config(), DataError)
    assert f"{OWN} {split}:3: column 'label' holds -1" in message
    assert "on_bad_row=skip" in message
    task = load_texts(config(on_bad_row="skip"))
    assert task.skipped_rows == {split: 1}
    assert len(getattr(task, split)) == len(rows[split]) - 1


def test_a_dataset_without_any_labels(fake_hub):
    own(fake_hub, {"train.parquet": parquet([{"text": "t", "label": -1}] * 4, ("a", "b"))})
    assert "all 4 rows are malformed" in refusal(config(on_bad_row="skip"), DataError)


# ---- revisions -----------------------------------------------------------------------------


def test_pinned_revisions(fake_hub):
    first = own(fake_hub, train=10, validation=4)
    fake_hub.repositories["dataset", OWN].refs["v1"] = first
    second = own_again(fake_hub, train=14, validation=4)
    for revision, count in ((first, 10), (second, 14), ("v1", 10), ("main", 14)):
        assert len(load_texts(config(revision=revision)).train) == count
        assert len(offline(fake_hub, config(revision=revision)).train) == count
    assert "it has no revision 'v2'" in refusal(config(revision="v2"))


def own_again(hub: FakeHub, **splits: int) -> str:
    files = {f"data/{s}-00000-of-00001.parquet": parquet(reviews(n), ("neg", "pos")) for s, n in splits.items()}
    return hub.repositories["dataset", OWN].commit(files)


def test_a_branch_that_moved_is_the_cached_one(fake_hub):
    """A run that is resumed, or repeated, has the same rows."""
    own(fake_hub, train=10, validation=4)
    before = load_texts(config())
    own_again(fake_hub, train=14, validation=4)
    assert load_texts(config()) == before


def test_a_folder_of_the_same_name_is_not_the_dataset(fake_hub, tmp_path, monkeypatch):
    own(fake_hub, train=10, validation=4)
    folder = tmp_path / OWN
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("text,label\nlocal,neg\n")
    monkeypatch.chdir(tmp_path)
    assert len(load_texts(config()).train) == 10


# ---- what the hub refuses, and what breaks off ---------------------------------------------


def test_scripts_are_not_run(fake_hub, tmp_path):
    trace = tmp_path / "ran"
    own(fake_hub, {"Reviews-2024.py": f"open({str(trace)!r}, 'w')".encode(), "train.csv": b"text,label\na,b\n"})
    assert "dataset.revision=refs/convert/parquet" in refusal(config())
    assert not trace.exists()


def test_a_repository_without_data(fake_hub):
    own(fake_hub, {"README.md": b"# nothing\n"})
    assert OWN in refusal(config())


def test_a_gated_dataset(fake_hub):
    own(fake_hub, train=10)
    fake_hub.repositories["dataset", OWN].gated = True
    message = refusal(config())
    assert "access is restricted" in message
    assert f"{fake_hub.address}/datasets/{OWN}" in message
    assert "hf auth login" in message


@pytest.mark.parametrize("fault", ["stall", "cut", "reset", "short"])
def test_a_download_that_breaks_off(fault, fake_hub):
    """No half of a dataset is left behind: the next run begins where it can, and gets the same rows."""
    own(fake_hub, train=60, validation=8)
    fake_hub.faults["train-00000-of-00001.parquet"] = fault
    message = refusal(config())
    assert OWN in message
    assert "broke off" in message
    assert "Run the same again" in message
    assert not is_cached(hub_dataset(config()))
    fake_hub.faults.clear()
    task = load_texts(config())
    assert (len(task.train), len(task.validation)) == (60, 8)


def test_the_hub_that_goes_away_while_a_dataset_is_read_is_not_replaced_by_another_revision(fake_hub):
    """`datasets` then takes whatever revision it has, and says so in a log."""
    own(fake_hub, train=10, validation=4)
    load_texts(config())
    other = own_again(fake_hub, train=14, validation=4)
    fake_hub.answers["/tree/"] = (503, "")
    assert OWN in refusal(config(revision=other))
    fake_hub.answers.clear()
    assert len(load_texts(config(revision=other)).train) == 14


def test_a_broken_parquet_file(fake_hub):
    own(fake_hub, {"train.parquet": b"PAR1 and nothing more"})
    message = refusal(config())
    assert "cannot be read" in message
    assert "broke off" not in message


# ---- task names on local files -------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
@pytest.mark.parametrize(("task", "num_train", "num_dev"), [("rte", 2_490, 277), ("sst2", 67_349, 872)])
def test_a_task_name_on_local_files_keeps_its_labels_and_metrics(task, num_train, num_dev):
    got = load_texts(config(task, path=str(DATA / task)))
    assert (got.name, got.label_names) == (task, CLASSES[task])
    assert (len(got.train), len(got.validation)) == (num_train, num_dev)
    assert got.f1_class == (0 if task == "rte" else None)
    if task == "rte":
        assert got.validation.text_pair[1] == "Bacteria is winning the war against antibiotics."
        assert got.validation.labels[:2] == [1, 0]  # not_entailment, entailment
    else:
        assert got.validation.text[1].startswith("unflinchingly bleak")
        assert got.validation.labels[:2] == [1, 0]  # positive, negative
