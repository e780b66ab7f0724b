"""Causal language models: what is loaded, and what is refused and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastpeft.config import ConfigError, load_run
from fastpeft.config.schema import ModelConfig
from fastpeft.errors import UnavailableError, UserError
from fastpeft.models import nf4
from fastpeft.models.backbone import Backbone, load_causal_lm
from fastpeft.models.files import fetch_model
from fastpeft.models.lm_head import fewer_logits, hidden_states
from tests.support.classifiers import load_backbone
from tests.support.tiny import CAUSAL_FAMILIES, MAX_POSITIONS, causal_model, make_causal_lm, save_character_tokenizer

CPU = torch.device("cpu")


def load(folder: Path | str, dtype: torch.dtype = torch.float32, trained: bool = False, **model: str) -> Backbone:
    return load_causal_lm(ModelConfig(name=str(folder), **model), dtype, CPU, trained)


def refusal(folder: Path | str) -> str:
    with pytest.raises(UnavailableError) as error:
        load(folder)
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def edit(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (settings | values).items() if v is not None}))


@pytest.fixture
def qwen3(causal_folders, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(causal_folders["qwen3"], tmp_path / "qwen3")


# ---- what is loaded ------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_families(causal_folders, family):
    backbone = load(causal_folders[family])
    assert (backbone.task_type, backbone.head, backbone.head_is_frozen) == ("CAUSAL_LM", [], True)
    assert (backbone.max_positions, backbone.reads_segments) == (MAX_POSITIONS, False)
    assert backbone.eos_token_ids == (backbone.tokenizer.eos_token_id,) == (1,)
    assert backbone.tokenizer.decode(backbone.tokenizer("2 + 2\n= 4")["input_ids"]) == "2 + 2\n= 4"
    model = backbone.model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    saved = load_file(causal_folders[family] / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        family in ("qwen3", "gpt2")
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_stay_in_fp32(causal_folders, dtype):
    """In half precision far positions would fall together."""
    backbone = load(causal_folders["qwen3"], dtype)
    assert {p.dtype for p in backbone.model.parameters()} == {dtype} == {backbone.dtype}
    frequencies = backbone.model.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, load(causal_folders["qwen3"]).model.model.rotary_emb.inv_freq)


def test_a_model_that_is_trained_is_in_fp32_with_a_head_that_is_not_frozen(causal_folders):
    backbone = load(causal_folders["qwen3"], torch.bfloat16, trained=True)
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}
    assert (backbone.dtype, backbone.head_is_frozen) == (torch.bfloat16, False)


def test_ends_of_sequence_are_the_tokenizers_and_the_generation_configs(qwen3):
    edit(qwen3, "generation_config.json", eos_token_id=[7, 1, 5, 10_000])
    assert load(qwen3).eos_token_ids == (1, 7, 5)
    edit(qwen3, "tokenizer_config.json", eos_token=None)
    assert load(qwen3).eos_token_ids == (7, 1, 5)


@pytest.mark.parametrize("tokenizer_knows", [True, False])
def test_without_padding_the_end_of_sequence_pads(tmp_path, tokenizer_knows):
    folder = make_causal_lm(tmp_path / "model", pad=False)
    if not tokenizer_knows:
        edit(folder, "tokenizer_config.json", eos_token=None)
    backbone = load(folder)
    assert backbone.tokenizer.pad_token_id == 1 == backbone.eos_token_ids[0]


def test_a_hub_model_is_named_by_its_name(causal_folders, fake_hub):
    files = {path.name: path.read_bytes() for path in causal_folders["qwen3"].iterdir()}
    fake_hub.add("model", "Qwen/Qwen3-0.6B", files)
    backbone = load("Qwen/Qwen3-0.6B")
    assert backbone.model.name_or_path == "Qwen/Qwen3-0.6B"
    assert fetch_model("Qwen/Qwen3-0.6B", "main").is_dir()
    assert "generation_config.json" in fake_hub.downloads()


# ---- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "distilbert"])
def test_an_encoder(model_folders, family):
    message = refusal(model_folders[family])
    assert "no causal language model" in message or "no whole causal language model" in message


def test_an_encoder_with_a_language_models_head(tmp_path):
    """transformers has a BertLMHeadModel; its tokens see those that follow."""
    model = causal_model("bert", vocab_size=104, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    model.save_pretrained(tmp_path)
    save_character_tokenizer(tmp_path)
    assert "see those that follow" in refusal(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_on_a_causal_model(tmp_path, tied):
    """With a tied head not even a weight is missing."""
    folder = make_causal_lm(tmp_path, "qwen3", tie_word_embeddings=tied)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    classifier.save_pretrained(folder)
    message = refusal(folder)
    assert "Qwen3ForSequenceClassification" in message


def test_an_encoder_decoder(tmp_path):
    config = transformers.T5Config(vocab_size=104, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    save_character_tokenizer(tmp_path)
    assert "T5ForConditionalGeneration" in refusal(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_weights_that_are_quantised(qwen3, method):
    edit(qwen3, "config.json", quantization_config={"quant_method": method, "bits": 4})
    message = refusal(qwen3)
    assert method in message
    assert "model.quantisation=nf4" in message


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", [None, b"", b"{", b"\xff\xfe\x00garbage"])
def test_damaged_files(qwen3, file, damage):
    if damage is None:
        (qwen3 / file).unlink()
    else:
        (qwen3 / file).write_bytes(damage)
    refusal(qwen3)


def test_missing_weights(qwen3):
    tensors = load_file(qwen3 / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, qwen3 / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights of Qwen3ForCausalLM, such as model.layers.1.mlp.up_proj.weight" in refusal(qwen3)


def test_weights_of_another_size(causal_folders, tmp_path):
    other = make_causal_lm(tmp_path / "other", "qwen3", intermediate_size=64)
    shutil.copy(causal_folders["qwen3"] / "model.safetensors", other)
    refusal(other)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    assert "its tokenizer has 99 tokens, but the model only 64" in refusal(make_causal_lm(tmp_path, vocab_size=64))


def test_no_end_of_sequence(tmp_path):
    folder = make_causal_lm(tmp_path, "qwen3", eos_token_id=None)
    edit(folder, "tokenizer_config.json", eos_token=None)
    assert "names an end of sequence" in refusal(folder)


@pytest.mark.parametrize("known_type", [True, False])
def test_code_in_the_folder_never_runs(qwen3, tmp_path, monkeypatch, known_type):
    marker = tmp_path / "ran"
    (qwen3 / "planted.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class Config(Qwen3Config): pass\n"
        "class Model(Qwen3ForCausalLM): config_class = Config\n"
    )
    auto_map = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    edit(qwen3, "config.json", auto_map=auto_map, **({} if known_type else {"model_type": "planted"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if known_type:
        assert type(load(qwen3).model).__module__.startswith("transformers.")
    else:
        refusal(qwen3)
    assert not marker.exists()


# ---- the head ------------------------------------------------------------------------------

CURVED = {
    "gemma2": ({}, "final_logit_softcapping to 30.0"),
    "gemma3_text": ({"final_logit_softcapping": 20.0}, "final_logit_softcapping to 20.0"),
    "granite": ({"logits_scaling": 8.0}, "logits_scaling to 8.0"),
    "cohere": ({}, "logit_scale to 0.0625"),
}


@pytest.mark.parametrize("by_config", [True, False])
@pytest.mark.parametrize("family", CURVED)
def test_a_head_that_is_not_linear_is_refused_by_name(tmp_path, monkeypatch, family, by_config):
    """By what its config says, and by what it does: random weights give logits that soft capping hardly bends."""
    settings, field = CURVED[family]
    folder = make_causal_lm(tmp_path, family, **settings)
    if not by_config:
        monkeypatch.setattr("fastpeft.models.lm_head._BEYOND_LINEAR", {})
    with pytest.raises(UserError, match="not a linear map") as error:
        load(folder)
    assert error.value.exit_code == 2
    assert "ForCausalLM" in str(error.value)
    assert (field if by_config else "tried on a few tokens") in str(error.value)


@pytest.mark.parametrize("family", ["gemma3_text", "granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_families_with_a_linear_head_are_taken(tmp_path, family, dtype):
    assert load(make_causal_lm(tmp_path, family), dtype).task_type == "CAUSAL_LM"


def test_a_decoder_that_transformers_does_not_find_is_refused(causal_folders, monkeypatch):
    model_class = transformers.Qwen3ForCausalLM
    monkeypatch.setattr(model_class, "get_decoder", lambda self: self.lm_head, raising=False)
    with pytest.raises(UserError, match=r"Qwen3ForCausalLM .* decoder cannot be run by itself"):
        load(causal_folders["qwen3"])


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_hidden_states_give_the_models_own_logits(causal_folders, family, seed):
    model = load(causal_folders[family]).model
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (3, 17), generator=generator)
    with torch.no_grad():
        hidden, weight, bias = hidden_states(model, ids)
        logits = model(input_ids=ids).logits
    assert hidden.shape == (3, 17, 32)
    torch.testing.assert_close(torch.nn.functional.linear(hidden, weight, bias), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_fewer_logits_are_some_of_the_models_own(tied):
    model = causal_model("qwen3", tie_word_embeddings=tied).eval()
    head, ids = model.get_output_embeddings(), torch.arange(12).view(2, 6)
    whole, num = head.weight, len(head.weight)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        with fewer_logits(model, num // 3):
            torch.testing.assert_close(model(input_ids=ids).logits, wanted[..., :: -(-num // (num // 3))])
        with fewer_logits(model, num):
            assert model(input_ids=ids).logits.equal(wanted)
        with pytest.raises(ZeroDivisionError), fewer_logits(model, 1):
            raise ZeroDivisionError
    assert head.weight is whole
    assert (model.get_input_embeddings().weight is whole) == tied


@pytest.mark.parametrize("family", [*CAUSAL_FAMILIES, "opt", "bloom", "gpt_neox", "phi", "qwen3_moe"])
def test_padding_on_the_right_needs_no_mask(family, seed):
    """With a sliding window that is shorter than the rows, where the family has one."""
    settings = {"sliding_window": 4} if family == "mistral" else {}
    model = causal_model(family, seed, **settings).eval()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 32, (3, 17), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[1, 11:] = 0
    ids[mask == 0] = 0
    with torch.no_grad():
        plain = hidden_states(model, ids)[0]
        masked = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(plain[real], masked[real], rtol=0, atol=2e-6)


# ---- 4 bits --------------------------------------------------------------------------------


def test_without_bitsandbytes_the_command_that_gets_it_is_named(causal_folders, monkeypatch):
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fastpeft\[gpu\]'") as error:
        load(causal_folders["qwen3"], quantisation="nf4")
    assert error.value.exit_code == 2


def test_a_classifier_in_4_bits_is_refused(model_folders):
    config = ModelConfig(name=str(model_folders["bert"]), quantisation="nf4")
    with pytest.raises(UserError, match="is for causal language models"):
        load_backbone(config, ("no", "yes"), torch.float32, CPU)


def test_full_fine_tuning_in_4_bits_is_a_contradiction():
    with pytest.raises(ConfigError, match=r"model\.quantisation: nf4 freezes the weights that method full trains"):
        load_run("full_mnli", ["model.quantisation=nf4"])
    assert load_run("lora_mnli", ["model.quantisation=nf4"]).model.quantisation == "nf4"
