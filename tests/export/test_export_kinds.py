"""Exports of entities, scores and several labels: the card's own example, and what transformers' pipelines make of
them."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fastpeft.export.plan import make_plan
from fastpeft.export.write import export
from fastpeft.models.backbone import Backbone
from fastpeft.runs.store import Result
from fastpeft.tasks.base import Task
from fastpeft.tasks.token_classification.encode import collate_tokens, encode_sentences
from fastpeft.tasks.token_classification.sentences import Sentences
from fastpeft.tasks.token_classification.task import TokenClassification
from fastpeft.trainer import train
from fastpeft.trainer.build import Job, build_job
from tests.support.adapter_readers import read
from tests.support.kind_runs import CLASSES, KINDS, LABELS, TAGS, kind_run
from tests.support.tagged_sentences import spans

CPU = torch.device("cpu")
THRESHOLD = 0.4
CASES = (*KINDS, "token-classification, pieces", "classification")


@dataclass
class Exports:
    """A finished run, its exports, and its data."""

    result: Result
    trainer: Job
    """As it ended: its model has the last weights."""
    task: Task
    backbone: Backbone
    adapter: Path
    merged: Path

    def folder(self, merged: bool) -> Path:
        return self.merged if merged else self.adapter


def name_base(folder: Path) -> None:
    """Make a base of it that classifies already, and whose labels have the run's names in another order."""
    names = dict(enumerate(reversed(CLASSES)))
    auto = transformers.AutoModelForSequenceClassification
    with quiet():
        model = auto.from_pretrained(folder, id2label=names, label2id={name: i for i, name in names.items()})
        model.save_pretrained(folder)


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Iterator[dict[str, Exports]]:
    jobs: list[Job] = []

    def keep(*args):
        jobs.append(build_job(*args))
        return jobs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastpeft.trainer.run.build_job", keep)
        patch.setattr("fastpeft.tasks.sequences.task.CHECK_ROWS", 10**6)  # every validation row is compared
        patch.setattr("fastpeft.tasks.token_classification.task.CHECK_SENTENCES", 10**6)
        yield make_exports(tmp_path_factory, jobs)


def make_exports(tmp_path_factory, jobs: list[Job]) -> dict[str, Exports]:
    found = {}
    for case in CASES:
        kind, _, pieces = case.partition(", ")
        home = tmp_path_factory.mktemp("kind")
        settings = {"evaluation": {"every": "30steps", "threshold": THRESHOLD}, "adapter": {"rank": 8}}
        run = kind_run(home, kind, dropout=0.0, pieces=bool(pieces), budget="90steps", **settings)
        if kind == "classification":
            name_base(home / "model")
        result = train(run, results_dir=home / "results", name="r")
        trainer = jobs[-1]
        for merge in (False, True):
            export(make_plan("r", results_dir=home / "results", to=home / str(merge), merge=merge, weights="last"))
        job = build_job(run)
        backbone = job.task.load_model(run.model, torch.float32, CPU)
        found[case] = Exports(result, trainer, job.task, backbone, home / "False", home / "True")
    return found


def example_of(folder: Path) -> str:
    """The Python of the card, for this folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "fastpeft" not in code
    assert code.count('"path/to/this/folder"') == 1
    return code.replace('"path/to/this/folder"', repr(str(folder)))


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
        yield said


def follow_card(folder: Path) -> tuple[dict, str]:
    """What the example leaves, and what it prints. Its head is drawn from another seed than the trainer's."""
    torch.manual_seed(12345)
    left: dict = {}
    with quiet() as said:
        exec(example_of(folder), left)
    return left, said.getvalue().strip()


# ---- PEFT and transformers alone ----------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("case", CASES)
def test_what_the_card_loads_scores_as_the_run_did(exports, case, merged):
    run = exports[case]
    left, _ = follow_card(run.folder(merged))
    score = run.task.export_check(run.backbone).score(left["model"], CPU)
    assert score == pytest.approx(run.result.metric["value"], abs=1e-5)
    assert score > 0.3  # a model that says nothing would prove nothing


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("token")])
def test_the_cards_example_prints_the_tag_of_each_word(exports, case, merged):
    left, said = follow_card(exports[case].folder(merged))
    pairs = ast.literal_eval(said)
    assert [word for word, _ in pairs] == left["words"]
    assert [tag for _, tag in pairs] == tags_of(exports[case], left["model"], left["words"])
    assert {tag for _, tag in pairs} <= set(TAGS)


@torch.inference_mode()
def answers_of(run: Exports, model: torch.nn.Module) -> torch.Tensor:
    """Of every validation row."""
    return run.task.export_check(run.backbone).answers(model.eval(), run.backbone.tokenizer, CPU)


@pytest.mark.parametrize("case", CASES)
def test_every_form_agrees_with_the_trainer_row_by_row(exports, case, tmp_path):
    """As an adapter, merged, saved again by PEFT and transformers, and exported again for another reader."""
    run = exports[case]
    wanted = answers_of(run, run.trainer.adapter.model)
    assert len(wanted) >= 64
    assert wanted.std(0).max() > 0.1  # a model that says the same of all would prove nothing
    models = {name: follow_card(run.folder(name == "merged"))[0]["model"] for name in ("adapter", "merged")}
    for name, model in list(models.items()):
        model.save_pretrained(tmp_path / name)
        run.backbone.tokenizer.save_pretrained(tmp_path / name)
        shutil.copy(run.folder(name == "merged") / "README.md", tmp_path / name)
        models[f"{name}, saved again"] = follow_card(tmp_path / name)[0]["model"]
    home = run.adapter.parent
    export(make_plan("r", results_dir=home / "results", to=tmp_path / "vllm", weights="last", reader="vllm"))
    models["vllm, PEFT"] = follow_card(tmp_path / "vllm")[0]["model"]
    auto = getattr(transformers, run.task.auto_class)
    with quiet():
        base = auto.from_pretrained(home / "model", num_labels=run.task.num_outputs, ignore_mismatched_sizes=True)
    models["vllm"] = read("vllm", tmp_path / "vllm", base)
    for model in models.values():
        found = answers_of(run, model)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_the_cards_example_prints_the_name_of_the_class(exports, merged):
    """And not that which a base that classifies already has in its place."""
    run = exports["classification"]
    code = example_of(run.folder(merged))
    if not merged:
        assert "    num_labels=3,\n" in code
        assert f"    id2label={dict(enumerate(CLASSES))!r},\n" in code
    for word, label in (("bad", "negative"), ("small", "neutral"), ("good", "positive")):
        with quiet() as said:
            exec(code.replace('"one text"', f'"the film is {word}"'), {})
        assert said.getvalue().strip() == label


@pytest.mark.parametrize("case", [case for case in CASES if case != "regression"])
def test_a_pipeline_on_what_the_card_loads_has_the_runs_names(exports, case):
    run = exports[case]
    left, _ = follow_card(run.adapter)
    names = set(run.task.label_names)
    with quiet():
        pipe = transformers.pipeline(run.task.pipeline_tag, model=left["model"], tokenizer=left["tokenizer"])
        answers = pipe("the dog is a good film")
    assert answers
    assert {answer.get("label", answer.get("entity")) for answer in answers} <= names
    card = (run.adapter / "README.md").read_text()
    assert f"`pipeline('{run.task.pipeline_tag}', model=folder)` takes tokenizer and label names of the *base*" in card
    assert "*base* model" not in (run.merged / "README.md").read_text()


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_the_cards_example_prints_the_score(exports, merged):
    left, said = follow_card(exports["regression"].folder(merged))
    number = float(said)
    with torch.inference_mode():
        assert number == pytest.approx(left["model"](**left["batch"]).logits.item())
    assert 0 < number < 5


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_the_cards_example_prints_the_labels_over_the_threshold(exports, merged):
    left, said = follow_card(exports["multi-label"].folder(merged))
    given = [label for label, p in zip(LABELS, left["probabilities"].tolist()) if p >= THRESHOLD]
    assert ast.literal_eval(said) == given
    code = example_of(exports["multi-label"].folder(merged)).replace('"one text"', '"the dog saw a bird"')
    with quiet() as said_of_animals:
        exec(code, {})
    assert ast.literal_eval(said_of_animals.getvalue()) == ["bird", "dog"]


@pytest.mark.parametrize("case", CASES)
def test_readers_find_what_the_answers_mean(exports, case):
    run, kind = exports[case], case.partition(",")[0]
    config = transformers.AutoConfig.from_pretrained(run.merged)
    adapter = json.loads((run.adapter / "adapter_config.json").read_text())
    facts = [json.loads((run.folder(merged) / "export.json").read_text()) for merged in (False, True)]
    assert all(found["kind"] == kind for found in facts)
    assert adapter["task_type"] == ("TOKEN_CLS" if kind == "token-classification" else "SEQ_CLS")
    if kind == "regression":
        assert (config.problem_type, config.num_labels) == ("regression", 1)
        assert all("labels" not in found for found in facts)
        return
    names = {"token-classification": TAGS, "classification": CLASSES}.get(kind, LABELS)
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: i for i, name in enumerate(names)}
    assert all(found["labels"] == list(names) for found in facts)
    if kind == "classification":
        assert config.problem_type == "single_label_classification"
    if kind == "multi-label":
        assert config.problem_type == "multi_label_classification"
        assert config.threshold == THRESHOLD
        assert all(found["threshold"] == THRESHOLD for found in facts)


# ---- transformers' pipelines --------------------------------------------------------------------


def pipeline(task: str, folder: Path, **options):
    with quiet():
        return transformers.pipeline(task, model=str(folder), device="cpu", **options)


def tags_of(run: Exports, model: torch.nn.Module, words: list[str]) -> list[str]:
    """As the trainer reads a model: on the first piece of each word."""
    sentences = Sentences([words], [["O"] * len(words)], ["here"], "here")
    encoded = encode_sentences(sentences, TAGS, run.backbone.tokenizer, 64, run.backbone.reads_segments)
    batch = collate_tokens(encoded, np.array([0]), CPU)
    with torch.inference_mode():
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.rows]
    return [TAGS[label] for label in encoded.on_words(logits.argmax(-1).numpy())[0]]


def as_spans(words: list[str], entities: list[dict]) -> set[tuple[int, int, str]]:
    """From places in the text to words; a span that cuts a word has a half of one in it."""
    starts, ends, at = {}, {}, 0
    for i, word in enumerate(words):
        starts[at], ends[at + len(word)] = i, i + 1
        at += len(word) + 1
    return {(starts.get(e["start"], -1), ends.get(e["end"], -1), e["entity_group"]) for e in entities}


def lone(tags: list[str]) -> bool:
    """Whether some I- tag has no beginning of its entity before it: an entity to the pipeline, none to the score."""
    return any(tag[0] == "I" and before[1:] != tag[1:] for before, tag in zip(["O", *tags], tags))


@pytest.mark.parametrize(
    ("case", "strategy"),
    [("token-classification", "simple"), ("token-classification", "first"), ("token-classification, pieces", "first")],
)
def test_the_pipeline_gives_the_entities_that_were_scored(exports, case, strategy):
    run = exports[case]
    assert isinstance(run.task, TokenClassification)
    pipe = pipeline("token-classification", run.merged, aggregation_strategy=strategy)
    num_entities = num_compared = 0
    for words in run.task.splits.validation.words:
        tags = tags_of(run, pipe.model, words)
        if lone(tags):
            continue
        assert as_spans(words, pipe(" ".join(words))) == spans(tags)
        num_entities, num_compared = num_entities + len(spans(tags)), num_compared + 1
    assert num_compared > 32
    assert num_entities > 20


def test_the_simple_strategy_cuts_words_of_several_pieces_as_the_card_says(exports):
    """Only first pieces were learned, and it reads the others as well."""
    run = exports["token-classification, pieces"]
    assert isinstance(run.task, TokenClassification)
    pipe = pipeline("token-classification", run.merged, aggregation_strategy="simple")
    found = [span for words in run.task.splits.validation.words for span in as_spans(words, pipe(" ".join(words)))]
    assert any(-1 in span for span in found)
    card = (run.merged / "README.md").read_text()
    assert 'aggregation_strategy="first")` tells the entities of a text' in card
    assert '"simple" gives the same where every word is one piece' in card


def test_the_pipeline_takes_a_lone_tag_for_an_entity_as_the_card_says(exports):
    run = exports["token-classification"]
    pipe = pipeline("token-classification", run.merged, aggregation_strategy="simple")
    with torch.no_grad():  # a model that says I-ANIMAL of everything
        pipe.model.classifier.weight.zero_()
        pipe.model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0]))
    assert spans(tags_of(run, pipe.model, ["the", "dog"])) == set()
    assert as_spans(["the", "dog"], pipe("the dog")) == {(0, 2, "ANIMAL")}
    assert "takes an I- tag without its B- for an entity" in (run.merged / "README.md").read_text()


def test_the_pipeline_gives_the_score_as_it_is(exports):
    run = exports["regression"]
    pipe = pipeline("text-classification", run.merged)
    for text in ("the dog is bad", "a very good film"):
        with torch.inference_mode():
            logit = pipe.model(**pipe.tokenizer(text, return_tensors="pt")).logits.item()
        (answer,) = pipe(text)
        assert (answer["label"], answer["score"]) == ("LABEL_0", pytest.approx(logit))
    assert pipe("a very good film")[0]["score"] - pipe("the dog is bad")[0]["score"] > 1
    assert "tells the same number as `score`" in (run.merged / "README.md").read_text()


def test_the_pipeline_gives_each_labels_probability_and_knows_no_threshold(exports):
    run = exports["multi-label"]
    pipe = pipeline("text-classification", run.merged)
    text = "the dog saw a bird"
    with torch.inference_mode():
        wanted = pipe.model(**pipe.tokenizer(text, return_tensors="pt")).logits[0].sigmoid()
    answers = pipe(text, top_k=None)
    assert {a["label"]: a["score"] for a in answers} == pytest.approx(dict(zip(LABELS, wanted.tolist())))
    assert sum(a["score"] for a in answers) > 1
    assert [a["label"] for a in pipe(text)] == [max(answers, key=lambda a: a["score"])["label"]]
    card = (run.merged / "README.md").read_text()
    assert f"It does not know the threshold: those from {THRESHOLD:g} on are given" in card


def test_a_card_says_of_one_output_nothing_of_the_largest(exports):
    for case in CASES:
        for merged in (False, True):
            said = "the largest is the same on" in (exports[case].folder(merged) / "README.md").read_text()
            assert said == (case != "regression")
