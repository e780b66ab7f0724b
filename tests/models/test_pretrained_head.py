"""A checkpoint's head is used where its labels are the task's by name; else it is new, and that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastpeft.config.schema import ModelConfig
from fastpeft.models.backbone import Backbone, load_classifier
from tests.support.tiny import FAMILIES, make_model

CPU = torch.device("cpu")
LABELS = ("bad", "good", "so-so")
USED, NEW = "the checkpoint's head is used: ", "the output layer of the checkpoint's head is not used, and a new one"
SEQUENCE, TOKENS = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
PROBLEMS = ("single_label_classification", "multi_label_classification")


def save_classifier(folder: Path, family: str, auto_class: str = SEQUENCE, **settings: Any) -> Path:
    """A checkpoint with a head, whose bias is 1, 2, 3 ... in the order of its rows."""
    make_model(folder, family)
    torch.manual_seed(1)  # another than `load` draws a new head from
    model = getattr(transformers, auto_class).from_pretrained(folder, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.shape == (model.config.num_labels,):
            torch.nn.init.zeros_(parameter)
            parameter.data += torch.arange(1.0, model.config.num_labels + 1)
    model.save_pretrained(folder)
    return folder


def named(labels: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def load(folder: Path, labels: tuple[str, ...] | None, auto_class: str = SEQUENCE, **settings: Any) -> Backbone:
    torch.manual_seed(7)
    names = {"num_labels": 1} if labels is None else named(labels) | {"num_labels": len(labels)}
    return load_classifier(
        ModelConfig(name=str(folder)),
        auto_class=auto_class,
        task_type="SEQ_CLS" if auto_class == SEQUENCE else "TOKEN_CLS",
        settings=names | settings,
        dtype=torch.float32,
        device=CPU,
    )


def output(backbone: Backbone) -> torch.nn.Linear:
    layers = [
        module
        for name, module in backbone.model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == backbone.model.config.num_labels
    ]
    return layers[-1]


def bias(backbone: Backbone) -> list[float]:
    return output(backbone).bias.tolist()


@pytest.mark.parametrize("auto_class", [SEQUENCE, TOKENS])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_brought_into_the_tasks_order(family: str, auto_class: str, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, family, auto_class, **named(LABELS))
    saved = load_file(folder / "model.safetensors")
    turned = (LABELS[2], LABELS[0], LABELS[1])
    backbone = load(folder, turned, auto_class)
    assert bias(backbone) == [3.0, 1.0, 2.0]
    (weight,) = (tensor for name, tensor in saved.items() if tensor.shape == (3, 32) and not name.startswith("bert.e"))
    assert torch.equal(output(backbone).weight, weight[[2, 0, 1]])
    assert backbone.notes == [f"{USED}its labels are the task's, so-so, bad, good, its rows brought into this order"]
    assert backbone.model.config.id2label == dict(enumerate(turned))
    same = load(folder, LABELS, auto_class)
    assert bias(same) == [1.0, 2.0, 3.0]
    assert same.notes == [f"{USED}its labels are the task's, bad, good, so-so"]
    ids = torch.arange(5, 12)[None]
    torch.testing.assert_close(
        backbone.model(input_ids=ids).logits, same.model(input_ids=ids).logits[..., [2, 0, 1]], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("problem", PROBLEMS)
def test_upper_case_is_the_same_name_whatever_the_loss(problem: str, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, "bert", **named(("GOOD", "Bad")), problem_type=PROBLEMS[0])
    backbone = load(folder, ("bad", "good"), problem_type=problem)
    assert bias(backbone) == [2.0, 1.0]
    assert backbone.model.config.problem_type == problem


@pytest.mark.parametrize("auto_class", [SEQUENCE, TOKENS])
@pytest.mark.parametrize(
    ("theirs", "ours", "why"),
    [
        (None, ("bad", "good"), "its labels, LABEL_0, LABEL_1, do not say what they stand for"),
        (None, ("LABEL_0", "LABEL_1"), "its labels, LABEL_0, LABEL_1, do not say what they stand for"),
        (("0", "1"), ("0", "1"), "its labels, 0, 1, do not say what they stand for"),
        (("no", "yes"), ("bad", "good"), "its labels are no, yes, and the task's bad, good"),
        (("bad", "good"), ("bad", "fine"), "its labels are bad, good, and the task's bad, fine"),
        (("bad", "BAD"), ("bad", "BAD"), "its labels are bad, BAD, and the task's bad, BAD"),
        (LABELS, ("bad", "good"), "its labels are bad, good, so-so, and the task's bad, good"),
    ],
)
def test_other_names_take_a_new_head(
    theirs: tuple[str, ...] | None, ours: tuple[str, ...], why: str, auto_class: str, tmp_path: Path
) -> None:
    folder = save_classifier(tmp_path, "bert", auto_class, **(named(theirs) if theirs else {"num_labels": 2}))
    saved = load_file(folder / "model.safetensors")["classifier.weight"]
    backbone = load(folder, ours, auto_class)
    assert backbone.notes == [f"{NEW} is trained: {why}"]
    assert bias(backbone) == [0.0] * len(ours)
    weight = output(backbone).weight
    assert not torch.isin(weight, saved).any()
    assert 0.5 < weight.std() / backbone.model.config.initializer_range < 2
    assert torch.equal(output(load(folder, ours, auto_class)).weight, weight)  # from torch's seed
    assert backbone.head == ["classifier"]


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        ("regression", None),
        (None, "its problem_type is None, not regression"),
        (PROBLEMS[0], "its problem_type is single_label_classification, not regression"),
    ],
)
def test_a_score_takes_a_head_that_was_trained_for_scores(problem: str | None, why: str | None, tmp_path: Path) -> None:
    num_labels = 2 if problem == PROBLEMS[0] else 1  # transformers refuses one class
    folder = save_classifier(tmp_path, "bert", num_labels=num_labels, problem_type=problem)
    backbone = load(folder, None, problem_type="regression")
    if why is None:
        assert backbone.notes == [f"{USED}it tells a score, as the task does"]
    else:
        assert backbone.notes == [f"{NEW} is trained: {why}"]
    assert bias(backbone) == ([1.0] if why is None else [0.0])


def test_two_scores_are_no_two_classes(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, "bert", **named(("bad", "good")), problem_type="regression")
    backbone = load(folder, ("bad", "good"), problem_type=PROBLEMS[0])
    assert backbone.notes == [f"{NEW} is trained: its problem_type is regression"]


def test_the_head_of_another_kind_of_model_is_none_of_this(tmp_path: Path) -> None:
    """BERT's tagger and BERT's classifier name their heads alike."""
    folder = save_classifier(tmp_path, "bert", TOKENS, **named(("bad", "good")))
    backbone = load(folder, ("bad", "good"))
    assert backbone.notes == [f"{NEW} is trained: it is that of BertForTokenClassification"]
    assert bias(backbone) == [0.0, 0.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_a_head_has_nothing_said_of_it(family: str, model_folders: dict[str, Path]) -> None:
    assert load(model_folders[family], LABELS).notes == []


def test_a_head_under_another_name_is_trained_too(tmp_path: Path) -> None:
    """XLNet's, with the very labels of the task, is neither missing nor called classifier."""
    config = transformers.XLNetConfig(
        vocab_size=32, d_model=32, n_layer=1, n_head=2, d_inner=32, **named(("bad", "good")), pad_token_id=0
    )
    make_model(tmp_path, "bert")
    transformers.XLNetForSequenceClassification(config).save_pretrained(tmp_path)
    backbone = load(tmp_path, ("good", "bad"))
    assert "logits_proj" in backbone.head
    assert backbone.notes == [f"{USED}its labels are the task's, good, bad, its rows brought into this order"]


@pytest.mark.parametrize(("auto_class", "wanted"), [(SEQUENCE, PROBLEMS[0]), (TOKENS, None)])
def test_the_bases_problem_type_does_not_outlive_its_task(auto_class: str, wanted: str | None, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "base", "bert", num_labels=2, problem_type=PROBLEMS[1])
    assert json.loads((folder / "config.json").read_text())["problem_type"] == PROBLEMS[1]
    settings = {"problem_type": wanted} if wanted else {}
    backbone = load(folder, ("bad", "good"), auto_class, **settings)
    assert backbone.model.config.problem_type == wanted
    backbone.model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("problem_type") == wanted
