"""One run on several sets: what is scored with which weights, the intervals, the file, and bad input in words."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.compare.problem_sets import SetScore, difference, make_plan, score_sets, wilson
from fastpeft.errors import UserError
from fastpeft.runs.store import RunFolder
from fastpeft.trainer import train
from tests.support.problem_runs import problem_run, write_problems

# ---- intervals -------------------------------------------------------------------------------


@settings(deadline=None)  # the first call imports scipy
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_limits_are_where_the_score_test_turns(counts: tuple[int, int]) -> None:
    """(p^ - p)^2 = z^2 p (1 - p) / n at both of them."""
    right, num = counts
    low, high = wilson(right, num)
    share = right / num
    assert 0 <= low <= share <= high <= 1
    for limit in (low, high):
        assert (share - limit) ** 2 == pytest.approx(1.959964**2 * limit * (1 - limit) / num, rel=1e-5, abs=1e-12)
    assert (low == 0, high == 1) == (right == 0, right == num)


@pytest.mark.parametrize(
    ("right", "num", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_limits_are_the_published_ones(right: int, num: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3."""
    assert wilson(right, num) == pytest.approx((low, high), abs=5e-5)


def score(right: int, num: int, name: str = "a") -> SetScore:
    return SetScore(name, num, right / num, wilson(right, num), {})


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_limits_of_a_difference_are_the_published_ones(first: tuple, second: tuple, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10."""
    apart = first[0] / first[1] - second[0] / second[1]
    assert difference(score(*first), score(*second)) == pytest.approx((apart, low, high), abs=5e-5)


def test_a_difference_turns_round_with_its_sides() -> None:
    apart, low, high = difference(score(3, 40), score(30, 90))
    assert difference(score(30, 90), score(3, 40)) == pytest.approx((-apart, -high, -low))


# ---- runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best weights are not its last."""
    folder = tmp_path_factory.mktemp("sets")
    run = problem_run(folder, method="full", budget="48steps", evaluation={"every": "end", "max_new_tokens": 24})
    train(run, results_dir=folder, name="r")
    early = problem_run(folder, method="full", budget="2steps", evaluation={"every": "end", "max_new_tokens": 24})
    train(early, results_dir=folder, name="early")
    shutil.rmtree(folder / "r" / "model")
    (folder / "early" / "model").rename(folder / "r" / "model")
    return folder


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """gsm8k: the training problems; multi and svamp: the same in those sets' shapes, every fourth answer wrong."""
    write_problems(tmp_path / "gsm8k", num_test=24)
    rows = [json.loads(line) for line in (tmp_path / "gsm8k" / "test.jsonl").read_text().splitlines()]
    numbers = [float(row["answer"].rpartition(" ")[2]) + (i % 4 == 0) for i, row in enumerate(rows)]
    multi = [{"sQuestion": row["question"], "lSolutions": [n]} for row, n in zip(rows, numbers)]
    (tmp_path / "multi.json").write_text(json.dumps(multi))
    svamp = [
        {"Body": row["question"][0], "Question": row["question"][1:], "Answer": n} for row, n in zip(rows, numbers)
    ]
    (tmp_path / "svamp.json").write_text(json.dumps(svamp[:5]))
    return tmp_path


def run_on(folder: Path, *on: str, **more) -> list[SetScore]:
    return score_sets(make_plan("r", [str(one) for one in on], folder, **more), lambda line: None)


def test_sets_of_every_shape_are_scored_with_the_best_weights(trained: Path, sets: Path) -> None:
    known, multi, svamp = run_on(trained, sets / "gsm8k", f"mine={sets / 'multi.json'}", sets / "svamp.json")
    assert (known.name, known.num, multi.name, multi.num, svamp.name, svamp.num) == (
        "gsm8k",
        24,
        "mine",
        24,
        "svamp",
        5,
    )
    assert known.exact_match > 0.9
    assert multi.exact_match == pytest.approx(known.exact_match - 6 / 24, abs=2 / 24)
    assert known.interval == wilson(round(known.exact_match * 24), 24)
    assert known.more.keys() == {"no_answer", "cut"}
    result = RunFolder(trained / "r").read_result()
    stored = json.loads((trained / "r" / "sets.json").read_text())
    assert stored.keys() >= {"gsm8k", "mine", "svamp"}
    entry = stored["mine"]
    assert entry["sha256"] == hashlib.sha256((sets / "multi.json").read_bytes()).hexdigest()
    assert entry["file"] == str(sets / "multi.json")
    assert (entry["exact_match"], entry["num"]) == (multi.exact_match, 24)
    weights = hashlib.sha256((trained / "r" / "model_best" / "model.safetensors").read_bytes()).hexdigest()
    assert entry["weights"] == {"which": "best", "step": result.best["step"], "sha256": weights}
    assert entry["options"]["max_new_tokens"] == 24
    assert entry["options"]["pass_at"] == 0


def test_the_test_split_gets_the_score_of_the_run(trained: Path) -> None:
    (found,) = run_on(trained, trained / "problems")
    assert found.name == "problems"
    assert found.exact_match == RunFolder(trained / "r").read_result().test["value"]


def test_last_and_pass_at_and_merging(trained: Path, sets: Path) -> None:
    run_on(trained, f"a={sets / 'multi.json'}")
    (last,) = run_on(trained, f"b={sets / 'gsm8k' / 'test.jsonl'}", last=True, pass_at=2)
    assert last.exact_match < 0.5
    assert last.more["pass@2"] < 0.5
    stored = json.loads((trained / "r" / "sets.json").read_text())
    assert stored["a"]["weights"]["which"] == "best"
    assert stored["b"]["weights"]["which"] == "last"
    assert stored["b"]["weights"]["sha256"] != stored["a"]["weights"]["sha256"]
    assert stored["b"]["options"]["pass_at"] == 2
    run_on(trained, f"b={sets / 'gsm8k'}")
    again = json.loads((trained / "r" / "sets.json").read_text())
    assert again["a"] == stored["a"]
    assert again["b"]["weights"]["which"] == "best"


def test_columns_of_the_runs_own_are_read_in_sets_that_have_them(trained: Path, sets: Path, tmp_path: Path) -> None:
    path = trained / "r" / "run.yaml"
    text = path.read_text()
    own = tmp_path / "own.jsonl"
    own.write_text('{"frage": "abc?", "antwort": "#### 2"}\n')
    try:
        path.write_text(
            text.replace("    text: null", "    text: frage").replace("    label: null", "    label: antwort")
        )
        scores = run_on(trained, own, sets / "multi.json")
    finally:
        path.write_text(text)
    assert [score.num for score in scores] == [1, 24]


def test_the_command_prints_a_line_a_set(trained: Path, sets: Path, fastpeft_here) -> None:
    done = fastpeft_here(
        "evaluate", "r", "--results-dir", trained, "--on", sets / "gsm8k", "--on", f"m={sets / 'multi.json'}"
    )
    assert done.code == 0, done
    head, *lines = done.out[done.out.index("set ") :].splitlines()
    assert "exact match" in head
    assert "minus gsm8k" in head
    assert lines[0].split()[:2] == ["gsm8k", "24"]
    assert lines[1].split()[0] == "m"
    assert " to " in lines[1]
    assert f"{trained / 'r' / 'sets.json'}: best weights, of step 48" in done.out


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none", "--on", "{sets}/gsm8k"], r"none: there is no such run in .*; there are: .*r"),
        (["r", "--on", "{sets}/nowhere.json"], r"--on .*nowhere\.json: there is no file or folder"),
        (["r", "--on", "x={sets}/nowhere"], r"there is no file or folder .*nowhere"),
        (["r", "--on", "={sets}/gsm8k"], r"expected PATH or NAME=PATH"),
        (["r", "--on", "x="], r"expected PATH or NAME=PATH"),
        (["r", "--on", "{sets}/gsm8k", "--on", "gsm8k={sets}/multi.json"], r"is named gsm8k too; write NAME="),
        (["r", "--on", "{sets}/gsm8k", "--pass-at", "-1"], r"--pass-at -1: give the k"),
        (["r", "s", "--on", "{sets}/gsm8k"], r"--on scores one run: name it"),
        (["--on", "{sets}/gsm8k"], r"--on scores one run: name it"),
        (["r", "--on", "{sets}/gsm8k", "--target", "0.5"], r"leave --target out"),
        (["r", "--last"], r"--last and --pass-at go with --on"),
        (["r", "--pass-at", "2"], r"--last and --pass-at go with --on"),
        (["r", "--on", "{sets}"], r"\.json"),
        (["r", "--on", "{sets}/bad.jsonl"], r"bad\.jsonl:2: .*has no ####.*Mend the row"),
        (["r", "--on", "{sets}/long.jsonl"], r"none of 1 prompts of .*long\.jsonl leaves room"),
    ],
)
def test_bad_input_is_refused_in_words(args: list[str], message: str, trained: Path, sets: Path, fastpeft_here) -> None:
    (sets / "bad.jsonl").write_text('{"question": "a?", "answer": "#### 2"}\n{"question": "b?", "answer": "two"}\n')
    (sets / "long.jsonl").write_text(json.dumps({"question": "q" * 500, "answer": "#### 2"}) + "\n")
    args = [arg.format(sets=sets) for arg in args]
    said = fastpeft_here("evaluate", *args, "--results-dir", trained).refused(2)
    assert re.search(message, said), said


def test_weights_that_are_not_there_are_named(tmp_path: Path, sets: Path) -> None:
    train(problem_run(tmp_path, budget="1steps", evaluation={"every": "end"}), results_dir=tmp_path, name="r")
    (tmp_path / "r" / "adapter").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="has no last weights; it has the best ones: leave out --last"):
        make_plan("r", [str(sets / "gsm8k")], tmp_path, last=True)
    (tmp_path / "r" / "adapter_best").rename(tmp_path / "gone_too")
    with pytest.raises(UserError, match="has no best weights; train it first"):
        make_plan("r", [str(sets / "gsm8k")], tmp_path)


@pytest.mark.parametrize("noted", [True, False])
def test_a_classifier_is_refused_by_name(trained: Path, sets: Path, noted: bool, tmp_path: Path) -> None:
    """Also one whose result does not say of which kind it is."""
    shutil.copytree(trained / "r", tmp_path / "c")
    for file, change in (
        ("run.yaml", ("task: word-problems", "task: classification")),
        ("result.json", ('"kind": "word-problems"', '"kind": "classification"' if noted else '"kind": ""')),
    ):
        path = tmp_path / "c" / file
        text = path.read_text()
        assert change[0] in text
        path.write_text(text.replace(*change))
    with pytest.raises(UserError, match=r"c: was trained on classification \(local\), and --on scores word-problems"):
        score_sets(make_plan("c", [str(sets / "gsm8k")], tmp_path), lambda line: None)


def test_unusable_prompts_are_named_and_wrong(trained: Path, sets: Path) -> None:
    rows = [{"question": "abc?", "answer": "#### 2"}, {"question": "q" * 90, "answer": "#### 2"}]
    (sets / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    (found,) = score_sets(make_plan("r", [str(sets / "mixed.jsonl")], trained), said.append)
    assert found.more["no_room"] == 0.5
    assert found.exact_match <= 0.5
    assert any("mixed.jsonl:2 (90 tokens)" in line for line in said)
    assert math.isfinite(found.interval[0])
