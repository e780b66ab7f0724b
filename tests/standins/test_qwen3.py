"""The shipped causal LM: its files, its tokenizer, and that it knows arithmetic text."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from fastpeft.standins import PATHS, build_qwen3
from fastpeft.standins.problem_grammar import NOUNS
from fastpeft.standins.problem_text import raw_text
from fastpeft.standins.problems import test_problems as held_out_problems

FOLDER = PATHS["qwen3_tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_files_are_small_and_hold_no_code(tokenizer):
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(sizes)
    assert {name.rpartition(".")[2] for name in sizes} <= {"json", "safetensors", "md"}
    assert sizes["model.safetensors"] <= 6 * 2**20
    config = json.loads((FOLDER / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"]) == ("qwen3", True)
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert config["vocab_size"] == len(tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "Anna has 5 + 7 = <<5+7=12>>12 apples.\nShe has 12 - 4 = <<12-4=8>>8 apples left.\n#### 8",
        " two  spaces,\ttabs,\r\n\n\n and a trailing one ",
        "$1,234.50 is 25% of £4,938 \u2014 na\u00efve e\u0301 \u00a0 \u4e2d\u6587 \U0001f600 \u0000",
        "####<<>>####",
    ],
)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.eos_token_id, tokenizer.pad_token_id}


def test_digits_stand_alone_and_words_are_whole(tokenizer):
    assert tokenizer.tokenize("12 + 345=357") == ["1", "2", "Ġ+", "Ġ", "3", "4", "5", "=", "3", "5", "7"]
    assert all(len(tokenizer.tokenize(f" {word}")) == 1 for nouns in NOUNS.values() for word in nouns.words())
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for question, answer in held_out_problems()[:50]:
        text = f"Question: {question}\nAnswer: {answer}"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        prompt, completion = (tokenizer(part)["input_ids"] for part in (f"Question: {question}\nAnswer:", f" {answer}"))
        assert prompt + completion == tokenizer(text)["input_ids"]  # no token reaches over the border


def test_it_is_pretrained_on_the_raw_text_alone(tokenizer):
    """Text behind text, an end token behind each, nothing left out or added."""
    ids_NT = build_qwen3.rows(tokenizer.backend_tokenizer, 40, 64, seed=3)
    assert ids_NT.shape == (40, 64)
    parts = tokenizer.decode(ids_NT.flatten().tolist()).split(tokenizer.eos_token)
    assert len(parts) > 30
    assert parts[:-1] == list(raw_text(len(parts) - 1, seed=3))


@pytest.mark.soak
def test_the_script_saves_what_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["build_qwen3", "--out", str(tmp_path), "--steps", "2", "--length", "16"])
    threads = torch.get_num_threads()
    try:
        build_qwen3.main()
    finally:
        torch.set_num_threads(threads)
    made = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert made.dtype == torch.bfloat16
    assert made.config.to_diff_dict() == AutoModelForCausalLM.from_pretrained(FOLDER).config.to_diff_dict()
    built, shipped = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, FOLDER))
    assert built["model"] == shipped["model"]
    assert (tmp_path / "tokenizer_config.json").read_text() == (FOLDER / "tokenizer_config.json").read_text()


def mean_loss(model, tokenizer, text: str, num_last: int) -> float:
    """Of the last tokens of one text."""
    ids_1T = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.inference_mode():
        logits_TV = model(input_ids=ids_1T).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits_TV[-num_last:], ids_1T[0, -num_last:]).item()


def test_it_knows_arithmetic(model, tokenizer):
    """In the range of the raw text. Behind a spaced `=` an equation may also come again, so these are tight."""
    assert isinstance(model, Qwen3ForCausalLM)
    for left, right, wrong in [
        ("12+7=", "19", "21"), ("48+27=", "75", "65"), ("63-28=", "35", "45"), ("91-17=", "74", "84"),
        ("7*8=", "56", "54"), ("12*6=", "72", "62"), ("72/9=", "8", "9"), ("84/7=", "12", "14"),
        ("Of 63 apples, 28 are gone and 63 - 28 = ", "35", "45"),
    ]:  # fmt: skip
        assert mean_loss(model, tokenizer, f"{left}{right}", len(right)) < 0.5, left
        assert mean_loss(model, tokenizer, f"{left}{wrong}", len(wrong)) > 2, left


def test_it_cannot_answer_before_it_is_adapted(model, tokenizer):
    questions = [f"Question: {question}\nAnswer:" for question, _ in held_out_problems()[:8]]
    for prompt in questions:
        batch = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**batch, max_new_tokens=80, do_sample=False)
        assert "####" not in tokenizer.decode(made[0, batch["input_ids"].shape[1] :])
