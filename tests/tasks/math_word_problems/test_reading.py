"""Word problems from files, from the hub and from real sets: shapes, splits, bad rows."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastpeft.config import ConfigError, load_run
from fastpeft.config.schema import ColumnsConfig, DatasetConfig
from fastpeft.data.hub_datasets import hub_dataset, is_cached
from fastpeft.data.rows import DataError
from fastpeft.errors import UserError
from fastpeft.tasks import find_known, kind_of, load_task
from fastpeft.tasks.math_word_problems.answers import final_number
from fastpeft.tasks.math_word_problems.reading import Problems, ProblemSplits, fill_prompt, load_problems
from fastpeft.tasks.math_word_problems.task import MathWordProblems
from tests.support.fake_hub import FakeHub
from tests.support.hub_files import card, parquet
from tests.support.real_data import DATA
from tests.support.row_files import write_jsonl, write_rows

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
REPOSITORY = "openai/gsm8k"
GENERATED = "embedded-word-problems"


def problem(i: int, **more) -> dict:
    return {"question": f"What is {i} + 1?", "answer": f"It is {i}+1=<<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} | more


def problems(count: int, first: int = 0) -> list[dict]:
    return [problem(i) for i in range(first, first + count)]


def config(path: Path | None = None, name: str = "gsm8k", held_out: int = 4, **fields) -> DatasetConfig:
    return DatasetConfig(path=str(path) if path else None, name=name, held_out=held_out, **fields)


def load_splits(of: DatasetConfig) -> ProblemSplits:
    task = load_task(of)
    assert isinstance(task, MathWordProblems)
    return task.splits


def num_skipped(splits: ProblemSplits) -> dict[str, int]:
    every = {"train": splits.train, "test": splits.test}
    return {name: part.num_skipped for name, part in every.items() if part and part.num_skipped}


def refusal(of: DatasetConfig) -> str:
    with pytest.raises(DataError) as error:
        load_task(of)
    assert isinstance(error.value, UserError)
    assert error.value.exit_code == 2
    return str(error.value)


def refused_set(path: Path, **options) -> str:
    with pytest.raises(DataError) as error:
        load_problems(str(path), **options)
    return str(error.value)


def rows_of(*parts: Problems | None) -> set[tuple[str, str]]:
    return {row for part in parts if part for row in zip(part.question, part.answer)}


# ---- splits --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_folder_in_every_format(tmp_path, suffix):
    train, test = problems(20), problems(6, first=100)
    for name, rows in (("train", train), ("test", test)):
        write_rows(tmp_path / f"{name}.{suffix}", rows)
    task = load_splits(config(tmp_path))
    assert (len(task.train), len(task.validation), len(task.test)) == (16, 4, 6)
    assert rows_of(task.train, task.validation) == {(r["question"], r["answer"]) for r in train}
    assert task.test.question == [r["question"] for r in test]
    assert task.test.answer == [r["answer"] for r in test]
    assert (task.name, num_skipped(task)) == ("gsm8k", {})
    decided = list(task.notes)
    assert all("rows in" in note for note in decided)
    assert bool(decided) == (suffix in ("csv", "tsv"))  # answers are of several lines
    said = "gsm8k: 16 training problems, 4 held out of them, 6 test problems"
    whole = load_task(config(tmp_path))
    assert (whole.metric, whole.describe(), whole.notes) == ("exact_match", said, [said, *decided])
    assert task.test.source == str(tmp_path / f"test.{suffix}")


def test_what_is_held_out_depends_on_the_rows_only(tmp_path, seed):
    write_jsonl(tmp_path / "train.jsonl", problems(200))
    task = load_splits(config(tmp_path, held_out=50))
    random.seed(seed)
    assert load_splits(config(tmp_path, held_out=50)) == task
    assert len(task.validation) == 50
    assert not rows_of(task.train) & rows_of(task.validation)
    numbers = sorted(int(where.rpartition(":")[2]) for where in task.validation.where)
    assert numbers not in (list(range(1, 51)), list(range(151, 201)))
    more = load_splits(config(tmp_path, held_out=60))
    assert rows_of(task.validation) < rows_of(more.validation)


def test_rows_know_their_line(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", problems(12))
    task = load_splits(config(path, held_out=5))
    for part in (task.train, task.validation):
        for question, where in zip(part.question, part.where):
            file, _, line = where.rpartition(":")
            assert file == str(path)
            assert json.loads(path.read_text().splitlines()[int(line) - 1])["question"] == question


@pytest.mark.parametrize("single", [True, False])
def test_without_a_test_split(tmp_path, single):
    path = write_jsonl(tmp_path / "train.jsonl", problems(10))
    task = load_splits(config(path if single else tmp_path))
    assert task.test is None
    assert "has no test split" in task.notes[0]
    assert load_task(config(path if single else tmp_path)).describe() == (
        "gsm8k: 6 training problems, 4 held out of them"
    )


def test_a_validation_file_is_not_read_and_that_is_said(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", problems(10))
    write_jsonl(tmp_path / "test.jsonl", problems(3, first=50))
    (tmp_path / "dev.jsonl").write_text("?\n")
    told = "is not read: 4 training problems are held out instead"
    assert load_splits(config(tmp_path)).notes == (f"{tmp_path / 'dev.jsonl'} {told}",)
    (tmp_path / "valid.csv").write_text("?\n")
    assert load_splits(config(tmp_path)).notes == tuple(f"{tmp_path / n} {told}" for n in ("dev.jsonl", "valid.csv"))


@pytest.mark.parametrize("held_out", [10, 11, 512])
def test_too_few_rows_to_hold_out(tmp_path, held_out):
    message = refusal(config(write_jsonl(tmp_path / "train.jsonl", problems(10)), held_out=held_out))
    assert f"dataset.held_out: {held_out} rows" in message
    assert "10 training rows" in message
    assert "Set it lower" in message
    task = load_splits(config(tmp_path / "train.jsonl", held_out=9))
    assert (len(task.train), len(task.validation)) == (1, 9)


def test_a_question_that_is_held_out_is_not_trained_on(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", problems(10) * 2)
    task = load_splits(config(tmp_path))
    assert not set(task.train.question) & set(task.validation.question)
    left_out = 20 - 4 - len(task.train)
    assert left_out > 0
    assert task.notes[-1].startswith(f"{left_out} training rows ask a question that is held out")
    write_jsonl(tmp_path / "train.jsonl", [problem(1)] * 10)
    assert "every question is among those held out" in refusal(config(tmp_path))


def test_keys_that_are_not_for_word_problems(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", problems(10))
    assert "dataset.labels: word problems have no labels" in refusal(config(path, labels=["a", "b"]))
    assert "dataset.validation_split" in refusal(config(validation_split="test"))


# ---- which data are word problems ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "kind"),
    [
        ("gsm8k", "auto", "word-problems"),
        (GENERATED, "auto", "word-problems"),
        ("mnli", "auto", "classification"),
        ("local", "word-problems", "word-problems"),
        ("owner/name", "word-problems", "word-problems"),
        ("gsm8k", "classification", "classification"),
    ],
)
def test_what_is_word_problems(name, task, kind):
    assert kind_of(DatasetConfig(name=name, task=task)) == kind


def test_nothing_is_word_problems_by_its_columns_alone(tmp_path):
    """A question with an answer is a pair to classify just as well."""
    write_jsonl(tmp_path / "train.jsonl", problems(20))
    assert kind_of(config(tmp_path, name="local")) == "classification"
    assert find_known(DatasetConfig(name="owner/name")) is None


def test_files_of_ones_own(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", problems(200))
    write_jsonl(tmp_path / "dev.jsonl", problems(20))
    assert "dataset.task=word-problems" in refusal(config(tmp_path, name="local"))
    task = load_splits(config(tmp_path, name="local", task="word-problems"))
    assert (task.name, len(task.train)) == (tmp_path.name, 196)
    assert load_splits(config(tmp_path, name="mine", task="word-problems")).name == "mine"


def test_the_generated_task(monkeypatch):
    module = ModuleType("embedded_problems")
    module.splits = lambda: {"train": problems(30), "test": problems(5, first=90)}
    monkeypatch.setitem(sys.modules, "fastpeft.standins.problems", module)
    task = load_splits(config(name=GENERATED))
    assert (task.name, len(task.train), len(task.validation), len(task.test)) == (GENERATED, 26, 4, 5)
    assert task.test.question[0] == "What is 90 + 1?"
    assert task.notes == ()
    assert "dataset.task=classification" in refusal(config(name=GENERATED, task="classification"))
    assert "dataset.task=word-problems" in refusal(config(name="embedded-nli", task="word-problems"))


# ---- the prompt ----------------------------------------------------------------------------


def test_braces_of_a_question_are_text():
    for question in ("{question}", "{0}", "{", "}{", "%s", "{question!r:>9}", "\\1"):
        assert fill_prompt("Q: {question}\nA:", question) == f"Q: {question}\nA:"
    assert fill_prompt("{x} {{question}}", "q") == "{x} {q}"


@pytest.mark.parametrize("prompt", ["", "Question:", "{question} {question}", "{Question}", "{ question }"])
def test_a_prompt_without_its_question(prompt):
    with pytest.raises(ConfigError, match=r"dataset\.prompt: expected \{question\} once"):
        load_run("lora_mnli", {"dataset.prompt": prompt})


def test_a_prompt_of_ones_own(tmp_path):
    run = load_run("lora_mnli", {"dataset.prompt": "Solve: {question}", "dataset.name": "gsm8k", "dataset.held_out": 2})
    write_jsonl(tmp_path / "train.jsonl", problems(10))
    task = load_task(config(tmp_path, prompt=run.dataset.prompt))
    assert task.facts()["prompt"] == "Solve: {question}"


# ---- shapes --------------------------------------------------------------------------------

SHAPES = {
    "GSM8K": {"question": "How many?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    "GSM1k with a number": {"question": "How many?", "answer": 4},
    "GSM1k with a text": {"id": "x", "question": "How many?", "answer": "4", "subset": "a"},
    "MultiArith": {"iIndex": 0, "lEquations": ["X=2+2"], "lSolutions": [4.0], "sQuestion": " How many? "},
    "AddSub": {"iIndex": 1, "lEquations": ["X = 2 + 2"], "lSolutions": ["4"], "sQuestion": "How many?"},
    "SVAMP": {"ID": "chal-1", "Body": "How", "Question": "many?", "Equation": "( 2.0 + 2.0 )", "Answer": 4.0},
    "SVAMP on the hub": {"ID": "c", "Body": "How ", "Question": " many?", "Answer": "4.00", "question_concat": "x"},
    "MultiArith on the hub": {"question": "How many?", "final_ans": "4"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_shapes_of_sets_to_score_on(tmp_path, shape, suffix):
    row = SHAPES[shape]
    path = tmp_path / f"set.{suffix}"
    path.write_text(json.dumps([row], indent=1) if suffix == "json" else json.dumps(row))
    for given in (path, tmp_path):
        got = load_problems(str(given))
        assert got.question == ["How many?"]
        assert got.answer == ([row["answer"]] if shape == "GSM8K" else ["#### 4"])
        assert got.source == str(path)
        assert got.where[0].startswith(f"{path}:")


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        (4, "4"), (-4, "-4"), (4.5, "4.5"), ("12,000", "12000"), ("$1.50", "1.5"), ([9.43], "9.43"), (1e-05, "0.00001"),
        (0.6666666666666666, "2/3"), ("0.6666666666666666", "2/3"), (0.8888888888888888, "8/9"), ([32 / 3], "32/3"),
        (0.1, "0.1"), ("5/12", "5/12"), (3.141592653589793, "3.141592653589793"),
    ],
)  # fmt: skip
def test_solutions_as_reference_answers(tmp_path, solution, text):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": solution}])
    assert load_problems(str(path)).answer == [f"#### {text}"]


@pytest.mark.parametrize(
    "solution",
    [None, True, "", "four", "1,2,3", [], [1, 2], {"a": 1}, float("nan"), float("inf"), f"1/{2**600}", "9" * 500],
)
def test_solutions_that_are_no_number(tmp_path, solution):
    good, bad = {"question": "q", "answer": 4}, {"question": "q", "answer": solution}
    path = write_jsonl(tmp_path / "a.jsonl", [good, bad])
    message = refused_set(path)
    assert f"{path}:2: column 'answer' holds" in message
    assert len(message) < 500
    skipped = load_problems(str(path), on_bad_row="skip")
    assert (len(skipped), skipped.num_skipped) == (1, 1)


def test_other_columns(tmp_path):
    rows = [{"body": "How", "ask": "many?", "value": 4, "label": 1}]
    path = write_jsonl(tmp_path / "train.jsonl", rows * 9)
    for message in (refused_set(path), refusal(config(path))):
        assert "The columns are body, ask, value, label" in message
        assert "question with answer" in message
        assert "dataset.columns.text" in message
    columns = ColumnsConfig(text="body", text_pair="ask", label="value")
    assert load_problems(str(path), columns=columns).question[0] == "How many?"
    assert load_problems(str(path), columns=columns).answer[0] == "#### 4"
    assert "dataset.columns.label is 'no'" in refused_set(path, columns=ColumnsConfig(text="ask", label="no"))


def test_files_that_are_no_set(tmp_path):
    assert "there is no such file or folder" in refused_set(tmp_path / "absent")
    assert "it holds nothing" in refused_set(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert ".json" in refused_set(tmp_path / "a.txt")
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", problems(2))
    assert "no test.*" in refused_set(tmp_path)
    write_rows(tmp_path / "test.csv", problems(3))
    assert len(load_problems(str(tmp_path))) == 3


def test_a_limit_of_problems_draws_them():
    some = Problems(["a", "b", "c"], ["#### 1", "#### 2", "#### 3"], ["f:1", "f:2", "f:3"], "f")
    assert some.sample(0) is some
    drawn = some.sample(2)
    assert len(drawn) == 2
    assert all(name == f"f:{'abc'.index(question) + 1}" for question, name in zip(drawn.question, drawn.where))
    assert some.sample(9) == some
    assert Problems(["a"], ["#### 1"]).sample(1).name_row(0) == "row 1"


# ---- bad rows ------------------------------------------------------------------------------

BAD_ROWS = {
    "no ####": problem(1, answer="It is 2."),
    "a number but no ####": problem(1, answer="2"),
    "no number after ####": problem(1, answer="It is\n####"),
    "words after ####": problem(1, answer="It is\n#### two"),
    "two numbers after ####": problem(1, answer="#### 2 or 3"),
    "answer is a number": problem(1, answer=2),
    "answer is null": problem(1, answer=None),
    "answer is absent": {"question": "q"},
    "answer is empty": problem(1, answer=" "),
    "question is empty": problem(1, question=" \n"),
    "question is null": problem(1, question=None),
    "question is a list": problem(1, question=["q"]),
    "question is absent": {"answer": "#### 2"},
    "half a character": problem(1, question="a \ud800 b"),
    "no object": [1, 2],
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bad_row_is_named_or_left_out_and_counted(tmp_path, bad, split):
    rows = {"train": problems(12), "test": problems(3, first=50)}
    rows[split][2:2] = [bad]
    rows[split] += [bad] * 4
    for name, content in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", content)
    path, last = tmp_path / f"{split}.jsonl", len(rows[split])
    message = refusal(config(tmp_path))
    assert message.startswith(f"{path}:3: ")
    assert "(and 4 more bad rows)" in message
    assert "on_bad_row=skip" in message
    task = load_splits(config(tmp_path, on_bad_row="skip"))
    assert num_skipped(task) == {split: 5}
    assert (len(task.train), len(task.validation), len(task.test)) == (8, 4, 3)
    note = task.notes[-1]
    assert note.startswith("5 bad rows are left out: ")
    for line in (3, last - 3, last - 2):
        assert f"{path}:{line}: " in note
    assert f"{path}:{last - 1}:" not in note


def test_the_fault_is_told(tmp_path):
    for answer, words in (("It is 2.", "has no ####"), ("#### two", "has no number after its ####")):
        path = write_jsonl(tmp_path / "train.jsonl", [*problems(9), problem(1, answer=answer)])
        assert f"{path}:10: column 'answer' {words}. Mend" in refusal(config(path))


def test_all_rows_are_bad(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [problem(1, answer="two")] * 9)
    message = refusal(config(path, on_bad_row="skip"))
    assert "all 9 rows are malformed" in message
    assert f"{path}:1: column 'answer' holds 'two'" in message
    path.write_text("?\n?\n")
    assert f"{path}:1: is not valid JSON" in refusal(config(path, on_bad_row="skip"))
    path.write_text("")
    assert f"{path}: has no rows" in refusal(config(path))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[\n{"question": "q", "answer": 1},\n{"question": \n?}]', 4, "not valid JSON"),
        ('[\n{"question": "q", "answer": 1}\n{"question": "q"}]', 3, "expected ',' or ']'"),
        ('[\n{"question": "q", "answer": 1},\n', 3, "not valid JSON"),
        ("[" * 100_000, 1, "not valid JSON"),
        ('[{"question": "q", "answer": 1}] x', None, "text after the list"),
        ("[]", None, "has no rows"),
    ],
)
def test_json_that_is_broken(tmp_path, text, line, words):
    path = tmp_path / "set.json"
    path.write_text(text)
    message = refused_set(path, on_bad_row="skip")
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert words in message


def test_bad_rows_of_a_json_list_have_lines(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(
        '[\n  {"question": "q",\n   "answer": "#### 1"},\n  7,\n  {"question": "q",\n   "answer": "none"}\n]\n'
    )
    assert refused_set(path).startswith(f"{path}:4: expected a JSON object, got int (and 1 more bad rows)")
    got = load_problems(str(path), on_bad_row="skip")
    assert got.where == [f"{path}:3"]
    assert f"{path}:6: column 'answer' has no ####" in got.notes[0]


# ---- the hub -------------------------------------------------------------------------------


def gsm8k_files(num_train: int = 20, num_test: int = 6) -> dict[str, bytes]:
    """As openai/gsm8k: two configurations, no default."""
    files = {}
    for name, first in (("main", 0), ("socratic", 500)):
        files[f"{name}/train-00000-of-00001.parquet"] = parquet(problems(num_train, first))
        files[f"{name}/test-00000-of-00001.parquet"] = parquet(problems(num_test, first + 100))
    splits = {name: {s: f"{name}/{s}-*" for s in ("train", "test")} for name in ("main", "socratic")}
    return {"README.md": card(splits), **files}


def test_gsm8k_from_the_hub(fake_hub: FakeHub):
    fake_hub.add("dataset", REPOSITORY, gsm8k_files())
    task = load_splits(config())
    assert (task.name, len(task.train), len(task.validation), len(task.test)) == ("gsm8k", 16, 4, 6)
    assert rows_of(task.train, task.validation) == {(r["question"], r["answer"]) for r in problems(20)}
    assert task.test.answer == [r["answer"] for r in problems(6, 100)]
    assert task.test.where[0] == f"{REPOSITORY}/main test:1"
    assert task.notes == ()
    assert is_cached(hub_dataset(config(), find_known(config()).dataset))
    assert not any("socratic" in path for path in fake_hub.downloads())
    asked = len(fake_hub.requests)
    assert load_splits(config()) == task
    assert len(fake_hub.requests) == asked
    assert load_splits(config(config="socratic")).test.question[0] == "What is 600 + 1?"


def test_another_dataset_of_the_hub(fake_hub: FakeHub):
    rows = [{"ID": str(i), "Body": f"There are {i}.", "Question": "How many?", "Answer": f"{i}.0"} for i in range(12)]
    fake_hub.add("dataset", "someone/SVAMP", {"train.parquet": parquet(rows)})
    task = load_splits(config(name="someone/SVAMP", task="word-problems"))
    assert (task.name, len(task.train), task.test) == ("someone/SVAMP", 8, None)
    assert "#### 11" in task.train.answer + task.validation.answer
    rows[3]["Answer"] = "none"
    fake_hub.add("dataset", "someone/bad", {"train.parquet": parquet(rows)})
    bad = config(name="someone/bad", task="word-problems")
    assert refusal(bad).startswith("someone/bad train:4: column 'Answer' holds 'none'")
    fake_hub.add("dataset", "someone/other", {"train.csv": b"a,b\n1,2\n"})
    assert "The columns are a, b" in refusal(config(name="someone/other", task="word-problems"))


# ---- real files ----------------------------------------------------------------------------


@needs_data
def test_real_gsm8k():
    task = load_splits(DatasetConfig(name="gsm8k", path=str(DATA / "gsm8k")))
    assert (len(task.train), len(task.validation), len(task.test)) == (6_961, 512, 1_319)
    assert (task.notes, num_skipped(task)) == ((), {})
    assert all(final_number(answer) is not None for answer in task.train.answer)
    assert sum("<<" in answer for answer in task.train.answer) > 6_800


@needs_data
@pytest.mark.parametrize(("name", "count"), [("multiarith", 600), ("addsub", 395), ("singleeq", 508), ("gsm8k", 1_319)])
def test_real_sets(name, count):
    got = load_problems(str(DATA / name))
    assert (len(got), got.num_skipped, got.notes) == (count, 0, ())
    for question, answer in zip(got.question, got.answer):
        assert question == question.strip() != ""
        assert final_number(answer) is not None
    if name != "gsm8k":
        file = next((DATA / name).glob("*.json"))
        solutions = [float(row["lSolutions"][0]) for row in json.loads(file.read_text())]
        assert [float(final_number(answer)) for answer in got.answer] == pytest.approx(solutions, rel=1e-15)
        assert sum("/" in answer for answer in got.answer) == (0 if name == "multiarith" else 29)
