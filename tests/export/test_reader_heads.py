"""Adapters with a trained head, for readers that take one and for those that do not."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastpeft.errors import UserError
from fastpeft.export.plan import make_plan
from fastpeft.export.readers import READERS
from fastpeft.export.write import export
from fastpeft.tasks.sequences.task import sample_logits
from tests.support.adapter_readers import read
from tests.support.exported_runs import Trained

TOLERANCE = 2e-5


@pytest.mark.parametrize("case", ["bert", "bert-rslora", "bert-adalora"])
def test_vllm_computes_the_trained_classifier(case, trained: dict[str, Trained], home, tmp_path):
    export(make_plan(case, results_dir=home / "results", to=tmp_path / "out", weights="last", reader="vllm"))
    auto = transformers.AutoModelForSequenceClassification
    run = trained[case]
    model = read("vllm", tmp_path / "out", auto.from_pretrained(run.job.run.model.name, num_labels=2))
    found = sample_logits(model, run.rows, torch.device("cpu"))
    torch.testing.assert_close(found, run.logits(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "reader", "words"),
    [
        ("roberta", "vllm", "classifier.dense, classifier.out_proj"),
        ("deberta-v2", "vllm", "classifier, pooler.dense"),
        ("distilbert", "vllm", "classifier, pre_classifier"),
        *[("bert", reader, "classifier") for reader in READERS if reader != "vllm"],
    ],
)
def test_a_head_without_a_place_is_refused(case, reader, words, trained, home, tmp_path):
    plan = make_plan(case, results_dir=home / "results", to=tmp_path / "out", reader=reader)
    with pytest.raises(UserError, match=words) as caught:
        export(plan)
    assert caught.value.exit_code == 2
    assert READERS[reader].name in str(caught.value)
    assert "--merge" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reader", READERS)
def test_a_merged_classifier_is_for_readers_that_have_such_heads(reader, trained, home, tmp_path):
    plan = make_plan("bert", results_dir=home / "results", to=tmp_path / "out", merge=True, reader=reader)
    if not READERS[reader].causal_only:
        assert export(plan).check.difference < TOLERANCE
        return
    with pytest.raises(UserError, match=r"reads causal language models.*SEQ_CLS") as caught:
        export(plan)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []
