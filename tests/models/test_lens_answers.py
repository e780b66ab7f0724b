"""What the first adapted layer is read out as: by a model's own last layer it is the model's own answer."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from torch import nn

from fastpeft.config.schema import ModelConfig
from fastpeft.errors import UserError
from fastpeft.models.lens import MOST_ROWS, FirstLayer
from fastpeft.models.lm_head import hidden_states
from tests.support.classifiers import load_backbone
from tests.support.tiny import CAUSAL_FAMILIES, FAMILIES, NUM_LAYERS, causal_model, classifier_model

LAST = NUM_LAYERS - 1
TARGETS = {"distilbert": r".*layer\.{}\..*q_lin", "deberta-v2": r".*layer\.{}\..*query_proj"}


def classifier(folders, family: str, layer: int) -> nn.Module:
    """One layer is adapted, and the head is trained, as a run has them; with dropout in training mode."""
    config = ModelConfig(name=str(folders[family]))
    backbone = load_backbone(config, ["no", "maybe", "yes"], torch.float32, torch.device("cpu"))
    target = TARGETS.get(family, r".*layer\.{}\..*query").format(layer)
    model = peft.get_peft_model(
        backbone.model,
        peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=target, modules_to_save=list(backbone.head)),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def batch(num_rows: int = 5, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 20, (num_rows, length), generator=torch.Generator().manual_seed(num_rows))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_read_behind_its_last_layer_says_what_it_says(model_folders, family: str) -> None:
    model = classifier(model_folders, family, LAST).eval()
    lens = FirstLayer(model)
    with torch.no_grad(), lens.watching():
        logits = model(**batch()).logits
    assert logits.std() > 0.01
    torch.testing.assert_close(lens.read_classes(), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_read_behind_its_first_layer_is_one_cut_off_there(model_folders, family: str) -> None:
    model = classifier(model_folders, family, 0).eval()
    lens = FirstLayer(model)
    with torch.no_grad(), lens.watching():
        whole = model(**batch()).logits
    found = lens.read_classes()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    del layers[1:]
    with torch.no_grad():
        torch.testing.assert_close(found, model(**batch()).logits, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, whole, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_draws_no_random_number_and_leaves_no_trace(model_folders, family: str) -> None:
    model = classifier(model_folders, family, 0).train()
    lens = FirstLayer(model)
    modes = [module.training for module in model.modules()]
    with lens.watching():
        model(**batch())
    before = torch.get_rng_state()
    found = lens.read_classes()
    assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_of_many_rows_some_are_read(model_folders) -> None:
    model = classifier(model_folders, "bert", LAST).eval()
    lens = FirstLayer(model)
    with torch.no_grad(), lens.watching():
        logits = model(**batch(2 * MOST_ROWS + 1, 3)).logits
    torch.testing.assert_close(lens.read_classes(), logits[::3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", [family for family in CAUSAL_FAMILIES if family != "gpt2"])
def test_a_language_model_read_behind_its_last_layer_says_what_it_says(family: str) -> None:
    model = causal_model(family)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=rf".*layers\.{LAST}\..*v_proj")).eval()
    lens, ids = FirstLayer(adapted), torch.randint(3, 32, (2, 6))
    with torch.no_grad(), lens.watching():
        hidden, *_ = hidden_states(adapted, ids)
    rows = torch.tensor([0, 3, 11])
    torch.testing.assert_close(lens.read(rows), hidden.flatten(0, 1)[rows])


def test_a_model_with_another_head_is_refused() -> None:
    config = transformers.AutoConfig.for_model(
        "electra", vocab_size=32, hidden_size=16, embedding_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = transformers.AutoModelForQuestionAnswering.from_config(config)
    with pytest.raises(UserError, match=r"ElectraForQuestionAnswering has no list of layers.*another schedule"):
        FirstLayer(model)


def test_a_classifier_without_adapters_is_read_behind_its_first_layer() -> None:
    model = classifier_model("bert").eval()
    lens = FirstLayer(model)
    with torch.no_grad(), lens.watching():
        output = model(**batch(), output_hidden_states=True)
    read = model.classifier(model.bert.pooler(output.hidden_states[1]))
    torch.testing.assert_close(lens.read_classes(), read)
