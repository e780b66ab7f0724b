"""Exports of causal language models, loaded with transformers and PEFT alone, against the model that was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from fastpeft.adapters import Adapter
from fastpeft.export import write
from fastpeft.export.plan import CheckError, make_plan
from fastpeft.export.summary import closing
from fastpeft.runs.store import read_json
from tests.support.causal_runs import NO_PAD, answers, make_run, write_problems
from tests.support.tiny import make_causal_lm

TOLERANCE = 1e-4
CASES = ("lora-qwen3", "rslora-llama", "iw_lora-mistral", "adalora-llama", "full-qwen3", "full-llama")


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("causal_exports")
    write_problems(folder / "problems")
    return folder


@pytest.fixture(scope="session")
def trained(home) -> dict[str, Adapter]:
    return {case: make_run(home, case) for case in CASES}


def export_to(folder: Path, case: str, home: Path, **options) -> write.Exported:
    return write.export(make_plan(case, results_dir=home / "results", to=folder, **options))


def assert_answers(model: torch.nn.Module, adapter: Adapter) -> None:
    wanted = answers(adapter.model)
    base = transformers.AutoModelForCausalLM.from_pretrained(adapter.model.name_or_path)
    assert float((wanted - answers(base)).abs().max()) > 100 * TOLERANCE  # what was trained can be seen
    torch.testing.assert_close(answers(model), wanted, rtol=0, atol=TOLERANCE)


# ---- an adapter, a merged model ------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("full")])
def test_the_adapter_in_peft_answers_as_the_trainers_model(case, trained, home, tmp_path):
    exported = export_to(tmp_path / "out", case, home)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert_answers(model, trained[case])
    check = exported.check
    assert check.difference <= check.tolerance < 1e-2
    assert (check.num_rows, check.num_same) == (16 * 11, 16 * 11) or check.num_same == check.num_rows > 100
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    assert config["base_model_name_or_path"] == str(home / "models" / case)
    facts = read_json(tmp_path / "out" / "export.json")
    assert (facts["quantisation"], facts["check"]["where"]) == ("none", "answer tokens of validation problems")


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_needs_transformers_alone(case, trained, home, tmp_path):
    export_to(tmp_path / "out", case, home, merge=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_answers(model, trained[case])
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("lora" in name for name in saved)
    assert ("lm_head.weight" in saved) == ("qwen3" not in case)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == ("qwen3" in case)


@pytest.mark.parametrize("merge", [False, True])
def test_every_token_of_every_answer_is_predicted_alike(merge, trained, home, tmp_path, monkeypatch):
    """Of all held-out rows, where an export compares a sample."""
    for limit in ("CHECK_ROWS", "CHECK_POSITIONS"):
        monkeypatch.setattr(f"fastpeft.tasks.causal_lm.task.{limit}", 10**6)
    check = export_to(tmp_path / "out", "rslora-llama", home, merge=merge).check
    assert check.num_same == check.num_rows > 20 * 12
    assert check.difference < TOLERANCE


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("case", ["lora-qwen3", NO_PAD])
def test_the_code_in_the_card_generates_what_the_trained_model_does(case, merge, trained, home, tmp_path, capsys):
    export_to(tmp_path / "out", case, home, merge=merge)
    card = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("path/to/this/folder", str(tmp_path / "out")).replace("max_new_tokens=128", "max_new_tokens=9")
    capsys.readouterr()
    found: dict = {}
    exec(compile(code, "card", "exec"), found)
    said = capsys.readouterr().out
    adapter, ids = trained[case], found["batch"]["input_ids"]
    start = ids.shape[1]
    assert found["tokenizer"].decode(ids[0]).endswith("she have?\nAnswer:")
    with torch.inference_mode():
        for _ in range(9):
            ids = torch.cat([ids, adapter.model.eval()(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == 1:
                break
    assert said == found["tokenizer"].decode(ids[0, start:], skip_special_tokens=True) + "\n"
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["pipeline_tag"] == "text-generation"
    for words in ("sums, word problems", "answer tokens of validation problems (fp32); the largest is the same on"):
        assert words in card


# ---- trimming ------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_a_trimmed_adapter_and_what_it_costs(merge, trained, home, tmp_path):
    case = "rslora-llama"
    exported = export_to(tmp_path / "out", case, home, trim=0.9, merge=merge)
    ranks = [matrix.rank for matrix in exported.trimmed.matrices]
    assert len(ranks) == 14
    assert 1 <= min(ranks) < 4
    auto = transformers.AutoModelForCausalLM if merge else peft.AutoPeftModelForCausalLM
    model = auto.from_pretrained(str(tmp_path / "out"))
    assert (answers(model) - answers(trained[case].model)).abs().max() > 100 * TOLERANCE
    metric = exported.metric
    assert (metric.name, metric.num_rows) == ("token_accuracy", 20)
    assert metric.before == pytest.approx(token_accuracy(trained[case].model, home / "problems", tmp_path / "out"))
    assert metric.after == pytest.approx(token_accuracy(model, home / "problems", tmp_path / "out"))
    plan = make_plan(case, results_dir=home / "results", to=tmp_path / "other", trim=0.9)
    assert "metric    token_accuracy" in "\n".join(closing(plan, exported))


def token_accuracy(model: torch.nn.Module, problems: Path, tokenizer_folder: Path) -> float:
    """By the book: one held-out problem at a time."""
    from fastpeft.config.schema import DatasetConfig
    from fastpeft.tasks import load_task

    task = load_task(DatasetConfig(name="sums", path=str(problems), task="word-problems", held_out=20))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_folder))
    right = total = 0
    for question, answer in zip(task.splits.validation.question, task.splits.validation.answer):
        prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        ids = torch.tensor([prompt + tokenizer(f" {answer}")["input_ids"] + [1]])
        with torch.inference_mode():
            said = model.eval()(input_ids=ids).logits.argmax(-1)[0, len(prompt) - 1 : -1]
        right += int((said == ids[0, len(prompt) :]).sum())
        total += len(said)
    return right / total


# ---- faults --------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["update", "scale", "base"])
def test_an_export_that_answers_otherwise_is_an_error(lost, trained, home, tmp_path, monkeypatch):
    real = write._write_weights

    def damaged(plan, model, backbone, source, out, trimmed):
        real(plan, model, backbone, source, out, trimmed)
        config = read_json(out / "adapter_config.json")
        if lost == "update":
            tensors = load_file(out / "adapter_model.safetensors")
            name = next(n for n in tensors if "lora_B" in n)
            tensors[name] = tensors[name] * 0
            save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        elif lost == "scale":
            (out / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 13.0}))
        else:
            other = make_causal_lm(tmp_path / "base", "qwen3", 5, hidden_size=64, intermediate_size=128, head_dim=16)
            (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))

    monkeypatch.setattr(write, "_write_weights", damaged)
    with pytest.raises(CheckError, match="differ by up to"):
        export_to(tmp_path / "out", "lora-qwen3", home)
    assert not (tmp_path / "out").exists()


def test_where_the_gpu_has_no_room_the_cpu_has(trained, home, tmp_path, monkeypatch):
    real, devices, said = write._build, [], []

    def build(plan, source, out, device, say):
        devices.append(device.type)
        if device.type == "cuda":
            out.mkdir()
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(plan, source, out, device, say)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(write, "_build", build)
    plan = make_plan("lora-qwen3", results_dir=home / "results", to=tmp_path / "out")
    write.export(plan, said.append)
    assert devices == ["cuda", "cpu"]
    assert "the GPU has no room for it: once more on the CPU" in said
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


# ---- 4 bits --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_bit(home) -> Adapter:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    return make_run(home, "lora4-qwen3", method="lora", model__quantisation="nf4")


def test_an_adapter_on_4_bits(four_bit, home, tmp_path, capsys):
    """The base is loaded in 4 bits again, as the card says."""
    exported = export_to(tmp_path / "out", "lora4-qwen3", home)
    assert exported.check.difference < 1e-3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "held in 4 bits (NF4) while training" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict = {}
    exec(compile(code.replace("path/to/this/folder", str(tmp_path / "out")), "card", "exec"), found)
    torch.testing.assert_close(answers(found["model"]), answers(four_bit.model), rtol=0, atol=0.1)
    assert type(found["model"].base_model.model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"


def test_a_merge_on_4_bits_is_into_the_weights_that_they_stand_for(four_bit, home, tmp_path):
    export_to(tmp_path / "out", "lora4-qwen3", home, merge=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(answers(model), answers(four_bit.model), rtol=0, atol=1e-3)
    assert "not into the base model's own" in (tmp_path / "out" / "README.md").read_text()
