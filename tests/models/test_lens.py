"""Which layer and which norm the lens takes, and what it leaves behind."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from fastpeft.errors import UserError
from fastpeft.models.lens import FirstLayer
from tests.support.tiny import causal_model

IDS = torch.arange(2, 22).view(2, 10)


def adapted(family: str, targets: str) -> nn.Module:
    model = causal_model(family, num_hidden_layers=3)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("family", "targets", "layer"),
    [
        ("qwen3", r".*q_proj", 0),
        ("llama", r".*layers\.[12]\..*v_proj", 1),
        ("mistral", r".*layers\.2\..*down_proj", 2),
        ("gpt2", r".*h\.1\..*c_attn", 1),
    ],
)
def test_reads_behind_the_first_adapted_layer(family: str, targets: str, layer: int) -> None:
    model = adapted(family, targets).eval()
    lens = FirstLayer(model)
    rows = torch.tensor([0, 7, 19])
    with lens.watching():
        model(input_ids=IDS)
    found = lens.read(rows)
    core = model.get_base_model()
    decoder = core.get_decoder()
    with torch.no_grad():
        states = core(input_ids=IDS, output_hidden_states=True).hidden_states
        if layer < 2:  # transformers gives the last one normalised
            states = [*states[:3], None]
            wanted = (decoder.ln_f if family == "gpt2" else decoder.norm)(states[layer + 1])
        else:
            wanted = states[3]
    torch.testing.assert_close(found, wanted.flatten(0, 1)[rows])
    assert not found.requires_grad


def test_an_unadapted_model_has_its_first_layer() -> None:
    model = causal_model("llama")
    lens = FirstLayer(model)
    assert lens.layer is model.model.layers[0]
    assert lens.norm is model.model.norm


def test_leaves_no_hook_and_no_states_behind_even_after_an_error() -> None:
    model = adapted("qwen3", ".*q_proj")
    lens = FirstLayer(model)
    with pytest.raises(IndexError), lens.watching():
        model(input_ids=IDS + 1000)
    assert not lens.layer._forward_hooks
    with lens.watching():
        model(input_ids=IDS)
    with lens.watching():
        pass
    with pytest.raises(AssertionError):  # what the pass before left is gone
        lens.read(torch.tensor([0]))
    with lens.watching():
        model(input_ids=IDS)
    lens.read(torch.tensor([0]))
    with pytest.raises(AssertionError):
        lens.read(torch.tensor([0]))


def test_a_decoder_of_another_shape_is_refused() -> None:
    model = causal_model("llama")
    model.model.norm = nn.Identity()
    with pytest.raises(UserError, match="LlamaForCausalLM has no list of layers with a norm and a head"):
        FirstLayer(model)
