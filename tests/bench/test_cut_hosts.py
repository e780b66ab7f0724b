"""Hosts that are cut from a larger one still load, and are what was left of it."""

from __future__ import annotations

import pytest
import torch
import transformers

from bench.cut_hosts import cut_depth, is_decoder
from tests.support.tiny import make_causal_lm, make_model


@pytest.mark.parametrize(("count", "kept"), [(4, [0, 1, 4, 5]), (3, [0, 1, 5])])
def test_a_decoder_loses_the_layers_around_its_middle(tmp_path, count, kept):
    host = make_causal_lm(tmp_path / "host", "qwen3", num_hidden_layers=6)
    assert is_decoder(host)
    cut = cut_depth(host, tmp_path / "cut", count / 6)
    own, less = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (host, cut))
    assert less.config.num_hidden_layers == len(less.model.layers) == count
    for layer, i in zip(less.model.layers, kept, strict=True):
        for name, weight in layer.named_parameters():
            assert torch.equal(weight, own.model.layers[i].get_parameter(name))
    assert torch.isfinite(less(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


def test_an_encoder_keeps_its_lowest_layers(tmp_path):
    host = make_model(tmp_path / "host", "bert", num_hidden_layers=4)
    assert not is_decoder(host)
    cut = cut_depth(host, tmp_path / "cut", 0.5)
    own, less = (transformers.AutoModel.from_pretrained(path) for path in (host, cut))
    assert len(less.encoder.layer) == 2
    weights = [model.encoder.layer[1].attention.self.query.weight for model in (own, less)]
    assert torch.equal(*weights)
