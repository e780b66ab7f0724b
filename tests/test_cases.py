"""The small inputs of ../shared/cases, each by the command that a user would type: what it must show.

A row of CASES is an input, settings over the command of the folder's README, and what has to be seen.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastpeft.config.schema import DatasetConfig
from fastpeft.runs.store import MAJORITY, Result, RunFolder
from fastpeft.tasks import load_task
from tests.support.real_data import ROOT

MAKE = ROOT.parent / "shared" / "cases" / "make.py"

pytestmark = pytest.mark.skipif(not MAKE.is_file(), reason=f"no cases at {MAKE}")

CLASSIFY = (
    "train", "--run", "lora_mnli", "--name", "r", "dataset.name=q", "adapter.target_modules=all-linear",
    "training.batch_size=8", "schedule.warmup_steps=2", "evaluation.every=end", "training.precision=fp32",
    "training.threads=1", "training.learning_rate=3e-3", "dataset.max_length=32",
)  # fmt: skip
GENERATE = (
    "train", "--run", "linear_gsm8k", "--name", "r", "dataset.held_out=40", "evaluation.max_new_tokens=8",
    "dataset.max_length=100", "training.batch_size=32", "evaluation.every=end", "method=full",
    "training.learning_rate=3e-3", "schedule.warmup_steps=10", "training.precision=fp32", "training.threads=1",
    "evaluation.max_examples=8", "evaluation.max_test_examples=8",
)  # fmt: skip
CHAT = (
    "train", "--run", "lora_alpaca", "--name", "r", "evaluation.max_new_tokens=8", "dataset.max_length=100",
    "training.batch_size=8", "evaluation.every=end", "training.precision=fp32", "training.threads=1",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    input: str
    """In the folder that make.py fills."""
    shows: tuple[str, ...] = ()
    """Texts that the command prints."""
    settings: tuple[str, ...] = ("budget=2steps",)
    model: str = "bert"
    exit_code: int = 0
    result: Callable[[Result], Any] = lambda result: True
    """What holds of result.json."""
    command: tuple[str, ...] = CLASSIFY

    def __str__(self) -> str:
        return f"{self.input} {' '.join(self.settings)} {self.model}"


def has_labels(*labels: str) -> Callable[[Result], bool]:
    return lambda result: result.labels == list(labels)


def has_majority(low: float, high: float) -> Callable[[Result], bool]:
    return lambda result: low <= result.metric["more"][MAJORITY] <= high


CASES = [
    Case("plain", ("80 training rows", "majority 0.5000"), result=has_labels("negative", "positive")),
    Case("quotes_over_rows", ("80 training rows", "its quotation marks are text and enclose no fields: 80 rows")),
    Case(
        "labels_minus_one",
        ("90 training rows", "the label -1 is taken for a class: 30 training rows"),
        result=has_labels("-1", "0", "1"),
    ),
    Case(
        "scores",
        ("dataset.task is regression", "not all of them whole", "spearman", "pearson"),
        result=lambda result: result.kind == "regression",
    ),
    Case(
        "several_labels",
        ("dataset.task is multi-label", "micro_f1", "macro_f1"),
        result=lambda result: result.kind == "multi-label",
    ),
    Case(
        "sorted_dev",
        ("scored on 50 of 200 validation rows, drawn at random", "on 50 rows"),
        ("budget=2steps", "evaluation.max_examples=50"),
        result=has_majority(0.5, 0.75),
    ),
    Case("rare_class/all.csv", ("179 training rows", "21, are held out"), result=has_majority(20 / 21, 20 / 21)),
    Case("rare_class", ("21, are held out",), result=has_majority(20 / 21, 20 / 21)),
    Case(
        "one_class_dev",
        ("warning: every validation row has the label 'negative'", "majority 1.0000"),
        result=has_majority(1.0, 1.0),
    ),
    Case("duplicates/all.csv", ("56, are held out",)),
    Case("val_name", ("80 training rows", "40 validation rows")),
    Case("train_only", ("72 training rows", "q has no validation split: 10% of its training rows, 8, are held")),
    Case("hub_clone", ("80 training rows", "40 validation rows")),
    Case("hub_clone/data", ("80 training rows", "40 validation rows")),
    Case("semicolons/all.csv", ("its columns are separated by semicolons", "72 training rows")),
    Case(
        "iob1",
        ("60 training sentences", "20 validation sentences", "tags are IOB1"),
        result=lambda result: result.kind == "token-classification",
    ),
    Case(
        "chats",
        ("60 training conversations with 120 answers", "messages, from 'messages'"),
        ("budget=2steps", "dataset.template=plain"),
        "llama",
        result=lambda result: result.kind == "chat" and result.metric["name"] == "token_accuracy",
        command=CHAT,
    ),
    Case("chats", ("has no chat template: set dataset.template",), model="llama", exit_code=2, command=CHAT),
    Case("new_token", ("its embeddings grow from 39 to 40 rows",), model="bert_new_token"),
    Case("long", ("80 training rows were cut to 64 tokens",), ("budget=2steps", "dataset.max_length=200"), "mpnet"),
    Case("long", ("80 training rows were cut to 64 tokens",), ("budget=2steps", "dataset.max_length=200")),
    Case("plain", ("'valu' matches no linear layer", "value?"), ("adapter.target_modules=[query,valu]",), exit_code=2),
    Case("copy_numbers", model="lfm2", command=GENERATE),
    Case("copy_numbers", ("cache that grows",), model="gpt_neo", command=GENERATE),
    Case("copy_numbers", model="mamba", command=GENERATE),
    Case(
        "copy_numbers",
        ("<s>",),
        ("budget=2steps", "dataset.prompt=<s>Question: {question}\nAnswer:"),
        "llama_bos",
        command=GENERATE,
    ),
]


@pytest.fixture(scope="session")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cases", MAKE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def data(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All inputs."""
    folder = tmp_path_factory.mktemp("cases")
    make.make_data(folder)
    return folder


@pytest.fixture(scope="session")
def models(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model's folder by its name. BERT is made by itself: all of them take 20 s."""
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> Path:
        if name == "bert" and not (folder / name).exists():
            import torch
            import transformers

            tokenizer = make.tokenizer(make.ENCODER)
            config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **make.SMALL)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                make.save(folder / name, transformers.BertForMaskedLM(config), tokenizer)
        elif not (folder / name).exists():
            make.make_models(folder)
        return folder / name

    return path


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, data: Path, models: Callable[[str], Path], tmp_path: Path, fastpeft_here) -> None:
    where = f"model.name={models(case.model)}", f"dataset.path={data / case.input}"
    outcome = fastpeft_here(*case.command, *where, *case.settings)
    assert outcome.code == case.exit_code, outcome
    assert "Traceback" not in outcome.out + outcome.err
    shown = " ".join((outcome.out + outcome.err).split())
    assert all(text in shown for text in case.shows), shown
    if case.exit_code == 0:
        result = RunFolder(tmp_path / "results" / "r").read_result()
        assert result is not None
        assert case.result(result), result


# ---- more than one command ---------------------------------------------------------------------


def test_a_resume_on_other_rows_is_refused(data: Path, models: Callable[[str], Path], tmp_path: Path, fastpeft_here):
    folder = shutil.copytree(data / "plain", tmp_path / "rows")
    where = f"model.name={models('bert')}", f"dataset.path={folder}"
    assert fastpeft_here(*CLASSIFY, *where, "training.epochs=2").code == 0
    (tmp_path / "results" / "r" / "result.json").unlink()  # as a run that was killed before its end
    shutil.copy(data / "changed_data" / "train.csv", folder / "train.csv")
    outcome = fastpeft_here("train", "--resume", "--name", "r")
    assert outcome.code == 2
    assert "the train split has 120 rows and had 80" in outcome.err
    assert "Traceback" not in outcome.err


def test_names_renamed_after_the_run_do_not_reach_its_export(
    data: Path, models: Callable[[str], Path], tmp_path: Path, fastpeft_here
):
    folder = shutil.copytree(data / "plain", tmp_path / "rows")
    where = f"model.name={models('bert')}", f"dataset.path={folder}", "budget=2steps"
    assert fastpeft_here(*CLASSIFY, *where).code == 0
    for name in ("train.csv", "dev.csv"):
        shutil.copy(data / "renamed_labels" / name, folder / name)
    outcome = fastpeft_here("export", "r", "--to", "out", "--merge")
    if outcome.code == 0:
        names = json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]
        assert names == {"0": "negative", "1": "positive"}
    else:
        assert (outcome.code, "labels" in outcome.err) == (2, True), outcome


def test_a_problem_type_of_the_base_does_not_outlive_its_task(
    data: Path, models: Callable[[str], Path], tmp_path: Path, fastpeft_here
):
    where = f"model.name={models('bert_problem_type')}", f"dataset.path={data / 'plain'}", "budget=2steps"
    assert fastpeft_here(*CLASSIFY, *where).code == 0
    assert fastpeft_here("export", "r", "--to", "out", "--merge").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["problem_type"] == "single_label_classification"


@pytest.mark.soak
@pytest.mark.parametrize("name", ["llama", "lfm2", "gpt_neo", "mamba"])
def test_a_trained_model_scores_what_generate_scores(
    name: str, data: Path, models: Callable[[str], Path], tmp_path: Path, fastpeft_here
):
    """generate_check.py decodes one row at a time, unpadded."""
    where = f"model.name={models(name)}", f"dataset.path={data / 'copy_numbers'}", "--budget", "900steps"
    whole = "evaluation.max_new_tokens=32", "evaluation.max_examples=0", "evaluation.max_test_examples=0"
    assert fastpeft_here(*GENERATE, *where, *whole).code == 0
    check = MAKE.with_name("generate_check.py")
    command = [sys.executable, check, tmp_path / "results" / "r", data / "copy_numbers" / "test.jsonl"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    generated = float(printed.split()[1].rstrip(","))
    result = RunFolder(tmp_path / "results" / "r").read_result()
    assert result is not None
    print(name, printed)
    assert result.test["value"] == pytest.approx(generated, abs=1e-4)


# ---- what no command shows ----------------------------------------------------------------------


def rows_of(path: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    texts = load_task(DatasetConfig(path=str(path))).texts
    return tuple(list(zip(split.text, split.labels)) for split in (texts.train, texts.validation))


def test_marks_are_kept(data: Path) -> None:
    train, _ = rows_of(data / "quotes_over_rows")
    assert sum(text.startswith('"') for text, _ in train) == sum(text.endswith('"') for text, _ in train) == 20
    assert not any("\n" in text or "\t" in text for text, _ in train)


def test_a_rare_class_stands_on_both_sides(data: Path) -> None:
    for split in rows_of(data / "rare_class" / "all.csv"):
        assert {label for _, label in split} == {0, 1}


def test_no_text_stands_on_both_sides(data: Path) -> None:
    train, validation = rows_of(data / "duplicates" / "all.csv")
    assert not {text for text, _ in train} & {text for text, _ in validation}
    assert len(train) + len(validation) == 600


def test_entities_are_brought_to_iob2(data: Path) -> None:
    splits = load_task(DatasetConfig(path=str(data / "iob1"))).splits
    tags = [tag for sentence in splits.train.tags for tag in sentence]
    assert (tags.count("B-PER"), tags.count("B-LOC"), len(splits.validation)) == (60 + 12, 60, 20)
