"""The rotary settings of a merged model, under the names that readers other than transformers 5 know."""

from __future__ import annotations

import copy

import pytest
import transformers

from fastpeft.export.rope_keys import add_rope_keys, missing_rope_keys
from tests.support.rotary_models import LINEAR, ROTARY, THETA, rotary_config


@pytest.mark.parametrize("name", ROTARY)
def test_transformers_5_reads_the_same_settings(name):
    config = rotary_config(name)
    saved = config.to_dict()
    again = type(config).from_dict(add_rope_keys(saved))
    read = {key: value for key, value in again.rope_parameters.items() if key != "type"}  # the old word for rope_type
    assert read == config.rope_parameters
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        assert getattr(again, key, None) == getattr(config, key, None) or key in again.rope_parameters


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"rope_theta": THETA}),
        ("llama, linear", {"rope_theta": THETA, "rope_scaling": LINEAR}),
        ("gpt_neox, a half", {"rotary_emb_base": THETA, "rotary_pct": 0.5}),
        ("gemma3", {"rope_theta": THETA, "rope_local_base_freq": 7000.0, "rope_scaling": LINEAR}),
        ("modernbert", {"global_rope_theta": THETA, "local_rope_theta": 7000.0}),
    ],
)
def test_the_older_names_are_written(name, keys):
    saved = rotary_config(name).to_dict()
    before = copy.deepcopy(saved)
    assert missing_rope_keys(saved) == keys
    assert add_rope_keys(saved) == before | keys
    assert saved == before


def test_models_inside_a_model_are_completed_as_well():
    inner = {"model_type": "llama", "rope_parameters": {"rope_theta": THETA, "rope_type": "default"}}
    config = {"model_type": "llava", "text_config": inner, "vision_config": {"model_type": "clip"}}
    assert add_rope_keys(config)["text_config"]["rope_theta"] == THETA
    assert "rope_theta" not in add_rope_keys(config)


def test_what_is_there_stays():
    there = {"model_type": "llama", "rope_theta": 5.0, "rope_parameters": {"rope_theta": THETA, "rope_type": "default"}}
    assert add_rope_keys(there)["rope_theta"] == 5.0
    assert missing_rope_keys(there) == {}
    assert add_rope_keys(transformers.BertConfig().to_dict()) == transformers.BertConfig().to_dict()
