"""Tokens that were added to a tokenizer: their embeddings are trained, saved, and read by PEFT and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastpeft.errors import UnavailableError, UserError
from fastpeft.export.plan import make_plan
from fastpeft.export.write import export
from fastpeft.trainer import train
from tests.support.problem_runs import problem_run
from tests.support.tiers import some
from tests.support.tiny import make_causal_lm
from tests.support.tiny_runs import Listener, peft_accuracy, tiny_run, write_run

NEW = ["<e1>", "<e2>"]


def add_tokens(model: Path, tokens: list[str] = NEW) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.save_pretrained(model)
    return tokenizer.convert_tokens_to_ids(tokens)


def mark_rows(data: Path) -> None:
    """The label stands in a new token alone, so that nothing is learned unless that is."""
    for path in data.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["premise"], row["hypothesis"] = row["premise"], f"{NEW[row['label'] == 'yes']} the a the a"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def marked(tmp_path: Path) -> tuple[Path, list[int]]:
    write_run(tmp_path)
    mark_rows(tmp_path / "pairs")
    return tmp_path, add_tokens(tmp_path / "model")


def embeddings(folder: Path) -> torch.Tensor:
    (found,) = (t for name, t in load_file(folder / "adapter_model.safetensors").items() if "trainable_tokens" in name)
    return found


@pytest.mark.parametrize("method", some(["lora", "iw_lora", "adalora"]))
def test_new_tokens_are_trained_and_saved_and_peft_loads_them(method: str, marked: tuple[Path, list[int]]) -> None:
    folder, numbers = marked
    listener = Listener()
    run = tiny_run(folder, method=method, budget="60steps", evaluation={"every": "end"}, training={"epochs": 1})
    result = train(run, results_dir=folder, name="r", reporter=listener)
    said = " ".join(event["message"] for event in listener.events if event["type"] == "note") + " ".join(listener.said)
    assert result.status == "done"
    assert result.metric["value"] > 0.9, said
    adapter = folder / "r" / "adapter"
    assert embeddings(adapter).shape == (len(numbers), 32)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"bert.embeddings.word_embeddings": numbers}
    rows = [json.loads(line) for line in (folder / "pairs" / "dev.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
    base.resize_token_embeddings(len(tokenizer))
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    pairs = [row["premise"] for row in rows], [row["hypothesis"] for row in rows]
    inputs = tokenizer(*pairs, padding=True, return_tensors="pt", return_token_type_ids=True)
    with torch.inference_mode():
        predicted = model(**inputs).logits.argmax(-1).tolist()
    right = sum(["no", "yes"][p] == row["label"] for p, row in zip(predicted, rows)) / len(rows)
    assert right == pytest.approx(result.metric["value"])


def test_a_resume_and_both_exports_keep_them(marked: tuple[Path, list[int]]) -> None:
    folder, _ = marked
    run = tiny_run(folder, method="lora", budget="9steps", training={"checkpoint_steps": 3})
    unbroken = train(run, results_dir=folder, name="r")
    for merge in (False, True):
        plan = make_plan("r", results_dir=folder, to=folder / f"out-{merge}", merge=merge, weights="last")
        assert export(plan).check.difference < 1e-4
    assert "base.resize_token_embeddings(len(tokenizer))" in (folder / "out-False" / "README.md").read_text()
    auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder / "out-False", num_labels=2)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "out-True")
    ids = torch.tensor([add_tokens(folder / "model") * 3])
    torch.testing.assert_close(auto.eval()(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert unbroken.status == "done"


def test_full_fine_tuning_saves_the_grown_model(marked: tuple[Path, list[int]]) -> None:
    folder, numbers = marked
    train(tiny_run(folder, method="full", budget="2steps"), results_dir=folder, name="r")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "r" / "model")
    assert model.get_input_embeddings().num_embeddings == numbers[-1] + 1 == model.config.vocab_size


@pytest.mark.parametrize("tied", some([True, False]))
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_language_model_reads_and_writes_them(method: str, tied: bool, tmp_path: Path) -> None:
    """The answer is a new token by itself."""
    run = problem_run(tmp_path, budget="60steps", method=method, evaluation={"max_new_tokens": 4, "every": "end"})
    make_causal_lm(tmp_path / "model", "qwen3", tie_word_embeddings=tied, max_position_embeddings=128, vocab_size=99)
    numbers = add_tokens(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["#### 2", "#### 13"])
    tokenizer.save_pretrained(tmp_path / "model")
    result = train(run, results_dir=tmp_path, name="r")
    assert result.status == "done"
    assert numbers == [99, 100]
    losses = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in losses if event["type"] == "step"]
    assert losses[-1] < 0.5 * losses[0]
    if method == "lora":
        stored = load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors")
        assert sum("trainable_tokens" in name for name in stored) == (1 if tied else 2)
    plan = make_plan("r", results_dir=tmp_path, to=tmp_path / "out", merge=True, weights="last")
    assert export(plan).check.difference < 1e-4


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, model_folders: dict[str, Path]) -> None:
    """What lacks was never added: no row that could be trained would make them belong together."""
    run = tiny_run(tmp_path)
    path = tmp_path / "model" / "tokenizer.json"
    data: dict[str, Any] = json.loads(path.read_text())
    data["model"]["vocab"] |= {f"word{i}": 40 + i for i in range(30)}
    path.write_text(json.dumps(data))
    with pytest.raises(UnavailableError, match=r"of the others were not added to it, such as 'word\d+'"):
        train(run, results_dir=tmp_path, name="r")


def test_a_model_in_4_bits_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.config.schema import ModelConfig
    from fastpeft.models import backbone

    folder = make_causal_lm(tmp_path, vocab_size=99)
    add_tokens(folder)
    monkeypatch.setattr(backbone, "nf4_arguments", lambda *_: {})
    with pytest.raises(UserError, match="has 2 tokens that the model has no embedding for"):
        backbone.load_causal_lm(ModelConfig(name=str(folder), quantisation="nf4"), torch.float32, torch.device("cpu"))


def test_a_model_with_rows_to_spare_stays_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path)
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    train(tiny_run(tmp_path, method="lora", budget="1steps"), results_dir=tmp_path, name="r")
    assert not any(
        "trainable_tokens" in name for name in load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors")
    )
    assert 0 <= peft_accuracy(tmp_path, tmp_path / "r" / "adapter") <= 1
