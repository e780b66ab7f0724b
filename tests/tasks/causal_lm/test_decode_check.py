"""Decoding of recurrent, convolutional and windowed models: as the model would, run from the start for each token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastpeft.config.schema import ModelConfig
from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone, load_causal_lm
from fastpeft.tasks.causal_lm import decode_batches
from fastpeft.tasks.causal_lm.decode_batches import FASTEST, STATIC, Caching, DecodeMethod
from fastpeft.tasks.causal_lm.decode_check import find_decode_method
from fastpeft.tasks.causal_lm.generate import Answer, DecodeOptions, decode
from fastpeft.tasks.causal_lm.prompts import EncodedPrompts, Prompted, encode_prompts
from tests.support.tiny import save_character_tokenizer

CPU = torch.device("cpu")
MOST = 24
GROWING, NONE = DecodeMethod(Caching.GROWING), DecodeMethod(Caching.NONE)
UNPADDED = (DecodeMethod(Caching.GROWING, padded=False), DecodeMethod(Caching.NONE, padded=False))

MODELS: dict[str, tuple[DecodeMethod, dict[str, Any]]] = {
    "lfm2": (STATIC, {"full_attn_idxs": [1], "num_key_value_heads": 2, "intermediate_size": 64}),
    "qwen3_next": (
        STATIC,
        {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "num_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
         "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16},
    ),
    "gpt_neo": (
        GROWING,
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "mamba": (GROWING, {"state_size": 8}),
    "openai-gpt": (GROWING, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}  # fmt: skip


def load(folder: Path, name: str) -> Backbone:
    vocab = save_character_tokenizer(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    default = transformers.CONFIG_MAPPING[name]()
    sizes = {key: value for key, value in sizes.items() if hasattr(default, key)} | {"initializer_range": 0.18}
    tokens = {"vocab_size": 104, "pad_token_id": vocab["<pad>"], "eos_token_id": vocab["</s>"], "bos_token_id": None}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **sizes | tokens | MODELS[name][1])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_causal_lm(ModelConfig(name=str(folder)), torch.float32, CPU)


def prompts_of(backbone: Backbone) -> EncodedPrompts:
    texts = ["ab", "copy 12 and 7", "what is 3 + 4, and then some more?", "xyz"]
    prompted = Prompted(texts, ["1"] * len(texts), lambda row: f"row {row}")
    return encode_prompts(prompted, backbone.tokenizer, 64)


def reference(model: Any, prompt: list[int]) -> list[int]:
    """The model's own forward pass, unpadded, from the start for each token."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(MOST):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def answers(backbone: Backbone, encoded: EncodedPrompts, method: DecodeMethod, eos: list[int]) -> list[Answer]:
    found = decode(
        backbone.model,
        [encoded.prompt(row) for row in range(len(encoded))],
        options=DecodeOptions(MOST),
        eos_tokens=eos,
        pad_token=encoded.pad_token,
        max_tokens=1000,
        method=method,
    )
    assert found is not None
    return [samples[0] for samples in found.answers]


@pytest.mark.parametrize("name", MODELS)
def test_the_fastest_way_that_is_right_is_found_and_is_right(name: str, tmp_path: Path) -> None:
    backbone = load(tmp_path, name)
    encoded = prompts_of(backbone)
    state = torch.get_rng_state()
    method, notes = find_decode_method(backbone.model, backbone, encoded, MOST)
    assert torch.equal(torch.get_rng_state(), state)
    assert method == MODELS[name][0]
    assert len(notes) == (method not in (FASTEST, STATIC))
    assert all(type(backbone.model).__name__ in note and "exact and slower" in note for note in notes)
    wanted = [reference(backbone.model, encoded.prompt(row).tolist()) for row in range(len(encoded))]
    assert [answer.tokens for answer in answers(backbone, encoded, method, [-1])] == wanted
    ends = wanted[0][3]  # rows that end are taken out of the batch
    cut = [tokens[: tokens.index(ends)] if ends in tokens else tokens for tokens in wanted]
    assert [answer.tokens for answer in answers(backbone, encoded, method, [ends])] == cut


def test_rows_that_were_read_already_are_what_decoding_is_compared_with(tmp_path: Path) -> None:
    backbone = load(tmp_path, "gpt_neo")
    encoded, generator = prompts_of(backbone), torch.Generator().manual_seed(0)
    read = []
    for row in range(2):
        tokens = encoded.prompt(row).tolist() + torch.randint(5, 100, (20 * row + 4,), generator=generator).tolist()
        with torch.no_grad():
            read.append((tokens, backbone.model(input_ids=torch.tensor([tokens])).logits[0]))
    assert find_decode_method(backbone.model, backbone, encoded, MOST, read)[0] == MODELS["gpt_neo"][0]
    wrong = [(tokens, logits.flip(-1)) for tokens, logits in read]
    with pytest.raises(UserError, match="cannot be decoded"):
        find_decode_method(backbone.model, backbone, encoded, MOST, wrong)


@pytest.mark.parametrize("name", ["lfm2", "mamba"])
@pytest.mark.parametrize("method", [NONE, *UNPADDED])
def test_every_slower_way_gives_the_same_answers(name: str, method: DecodeMethod, tmp_path: Path) -> None:
    backbone = load(tmp_path, name)
    encoded = prompts_of(backbone)
    wanted = [reference(backbone.model, encoded.prompt(row).tolist()) for row in range(len(encoded))]
    assert [answer.tokens for answer in answers(backbone, encoded, method, [-1])] == wanted


def test_a_window_shorter_than_the_cache_is_wrong_without_the_check(tmp_path: Path) -> None:
    """So that the check is what makes GPT-Neo right: transformers reads other rows of a static cache."""
    backbone = load(tmp_path, "gpt_neo")
    encoded = prompts_of(backbone)
    wanted = [reference(backbone.model, encoded.prompt(row).tolist()) for row in range(len(encoded))]
    assert [answer.tokens for answer in answers(backbone, encoded, STATIC, [-1])] != wanted


def test_a_model_that_no_way_decodes_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load(tmp_path, "lfm2")
    encoded = prompts_of(backbone)
    for batch in decode_batches.BATCHES.values():
        real = batch.forward
        monkeypatch.setattr(batch, "forward", lambda self, real=real: real(self).flip(-1))
    with pytest.raises(UserError, match="Lfm2ForCausalLM cannot be decoded as its own forward pass would") as error:
        find_decode_method(backbone.model, backbone, encoded, MOST)
    assert "logits differ by" in str(error.value)
    assert str(tmp_path) in str(error.value)
