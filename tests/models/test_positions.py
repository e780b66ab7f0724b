"""How long a row a model takes, proved by rows of that length and of one token more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fastpeft.models.positions import position_limit

CPU = torch.device("cpu")
TOKEN = 9
SIZES = {
    "hidden_size": 16, "d_model": 16, "n_embd": 16, "num_hidden_layers": 2, "n_layer": 2, "encoder_layers": 1,
    "decoder_layers": 1, "num_attention_heads": 2, "n_head": 2, "intermediate_size": 16, "ffn_dim": 16,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "embedding_size": 16, "word_embed_proj_dim": 16, "dim": 16, "n_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 40, "dropout": 0.0, "d_inner": 16, "num_layers": 2, "num_heads": 2,
}  # fmt: skip

TABLES = {
    "bert": (20, {"max_position_embeddings": 20}),
    "distilbert": (20, {"max_position_embeddings": 20}),
    "electra": (20, {"max_position_embeddings": 20}),
    "albert": (20, {"max_position_embeddings": 20}),
    "roberta": (18, {"max_position_embeddings": 20, "pad_token_id": 1}),
    "roberta, padded with 4": (15, {"max_position_embeddings": 20, "pad_token_id": 4}),
    "xlm-roberta": (18, {"max_position_embeddings": 20, "pad_token_id": 1}),
    "camembert": (18, {"max_position_embeddings": 20, "pad_token_id": 1}),
    "data2vec-text": (18, {"max_position_embeddings": 20, "pad_token_id": 1}),
    "mpnet": (18, {"max_position_embeddings": 20, "pad_token_id": 1}),
    "gpt2": (20, {"n_positions": 20}),
    "opt": (20, {"max_position_embeddings": 20}),
    "gpt_neo": (20, {"max_position_embeddings": 20, "attention_types": [[["global", "local"], 1]]}),
    "openai-gpt": (20, {"n_positions": 20}),
}
UNBOUND = {
    "xlnet": (None, {}),
    "bloom": (None, {}),
    "mamba": (None, {}),
    "llama": (20, {"max_position_embeddings": 20}),
    "llama, of no length": (None, {"max_position_embeddings": -1}),
    "deberta-v2": (None, {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p"]}),
}


def make(name: str, **settings: Any) -> Any:
    family = name.partition(",")[0]
    default = transformers.CONFIG_MAPPING[family]()
    sizes = {key: value for key, value in SIZES.items() if hasattr(default, key)}
    config = transformers.AutoConfig.for_model(family, **sizes | settings)
    return transformers.AutoModel.from_config(config).eval()


def limit_of(model: Any) -> int | None:
    return position_limit(model.config, TOKEN, CPU, lambda ids_1L: model(input_ids=ids_1L))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_positions_takes_so_many_tokens_and_no_more(name: str) -> None:
    wanted, settings = TABLES[name]
    model = make(name, **settings)
    assert limit_of(model) == wanted
    with torch.no_grad():
        assert model(input_ids=torch.full((1, wanted), TOKEN)).last_hidden_state.isfinite().all()
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=torch.full((1, wanted + 1), TOKEN))


@pytest.mark.parametrize("name", UNBOUND)
def test_without_a_table_the_config_tells_if_its_number_is_one(name: str) -> None:
    wanted, settings = UNBOUND[name]
    assert limit_of(make(name, **settings)) == wanted


def test_a_model_that_cannot_read_the_probe_leaves_it_to_its_config() -> None:
    def fails(ids_1L: torch.Tensor) -> None:
        raise ValueError("an end of sequence in every row, please")

    assert position_limit(transformers.BartConfig(max_position_embeddings=33), TOKEN, CPU, fails) == 33
