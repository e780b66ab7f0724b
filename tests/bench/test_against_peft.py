"""The trainer beside Hugging Face's: both train the same weights, and are scored and compared alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import against_peft, hf_trainer
from bench.against_peft import parse, run_of, summarise
from fastpeft.adapters import method_class
from fastpeft.data.batches import IGNORE
from fastpeft.standins import embedded_path
from fastpeft.tasks import load_task

CPU = torch.device("cpu")
SENTENCES = [
    {"tokens": ["Ada", "met", "Grace", "Hopper"], "tags": ["B-PER", "O", "B-PER", "I-PER"]},
    {"tokens": ["Unquestionably", "Paris", "sleeps"], "tags": ["O", "B-LOC", "O"]},
]
PAIRS = [{"text": f"row {i}", "text_pair": f"other row {i % 3}", "label": i / 2 + 0.25} for i in range(6)]


def files(folder: Path, rows: list[dict]) -> str:
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def arguments(data: str, task: str, *more: str) -> list[str]:
    return ["--task", task, "--model", str(embedded_path("embedded/deberta-tiny")), "--data", data, *more]


@pytest.fixture
def tagged(tmp_path: Path):
    args = parse(arguments(files(tmp_path, SENTENCES), "wnut17"))
    run = run_of(args, "trainer", seed=1)
    return run, load_task(run.dataset)


def test_both_train_the_same_weights(tagged):
    run, task = tagged
    theirs = hf_trainer.with_lora(hf_trainer.load_model(task, run), task, run)
    ours = method_class("lora").build(run.adapter, None, task.load_model(run.model, torch.float32, CPU)).model
    trained = [{n: p.shape for n, p in model.named_parameters() if p.requires_grad} for model in (theirs, ours)]
    assert trained[0] == trained[1]
    assert any("classifier" in name for name in trained[0])


def test_a_label_stands_on_a_words_first_piece_and_a_word_that_is_cut_off_counts_as_outside(tagged):
    import transformers

    run, task = tagged
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model.name)
    rows = hf_trainer._TaggedRows(task, tokenizer, run)
    encoded = rows._dataset(task.splits.validation)
    for row, tags in zip(encoded, task.splits.validation.tags):
        assert [task.label_names[label] for label in row["labels"] if label != IGNORE] == tags
        assert row["words"] == list(range(len(tags)))
    rows._max_length = 3  # special tokens, and room for one piece
    seen = []

    def predict(dataset):
        seen.append(dataset)
        labels = [row["labels"] for row in dataset]
        logits = torch.nn.functional.one_hot(torch.tensor(labels).clamp(min=0), len(task.label_names)).numpy()
        return type("Output", (), {"predictions": logits, "label_ids": torch.tensor(labels).numpy()})

    # Gold answers for what is left: Ada is found, the two other entities are cut off.
    assert rows._score(task.splits.validation, predict) == pytest.approx(0.5)
    assert "words" not in seen[0].column_names


def test_the_whole_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    args = arguments(
        files(tmp_path, PAIRS), "stsb", "--epochs", "1", "--rows", "trainer_by_length,lora", "--json", str(out)
    )
    monkeypatch.setitem(against_peft.TASKS, "stsb", {"preset": "lora_mnli", "dataset.task": "regression"})
    against_peft.main([*args, "--seeds", "1", "dataset.name=local"])
    first = json.loads(out.read_text())
    assert [run["row"] for run in first["runs"]] == ["trainer_by_length", "lora"]
    assert all(run["steps"] == 1 and run["train_s"] > 0 and run["test"] is not None for run in first["runs"])
    assert first["settings"]["training.precision"] == "fp32"

    against_peft.main([*args, "--seeds", "1,2", "dataset.name=local"])
    second = json.loads(out.read_text())
    assert second["runs"][:2] == first["runs"]
    assert [(run["row"], run["seed"]) for run in second["runs"][2:]] == [("lora", 2), ("trainer_by_length", 2)]
    with pytest.raises(SystemExit, match="other settings"):
        against_peft.main([*args, "--seeds", "3", "--max-length", "16", "dataset.name=local"])


def test_differences_are_paired_by_seed() -> None:
    values = {("trainer", 1): 0.5, ("trainer", 2): 0.7, ("lora", 1): 0.6, ("lora", 2): 0.8, ("lora", 3): 0.1}
    runs = [
        {"row": row, "seed": seed, "value": value, "test": None, "train_s": 2.0}
        for (row, seed), value in values.items()
    ]
    trainer, lora = summarise({"runs": runs})
    assert "value_minus_trainer" not in trainer
    assert lora["value_minus_trainer"] == "0.1000 ± 0.0000"  # the third seed has no partner
    assert lora["values"] == [0.6, 0.8, 0.1]
    assert "test" not in lora


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(arguments("data", "mnli", "--rows", "trainer,dora"))
    assert "--rows dora: known are trainer, trainer_by_length, lora, iw_lora" in capsys.readouterr().err
