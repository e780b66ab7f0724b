"""Fast layers give the model's own numbers; unknown ones stay as they are."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from fastpeft.kernels.launch import LAUNCHES
from fastpeft.models.fast import LEVERS, speed_up, without
from fastpeft.models.fast.swaps import Fast
from fastpeft.models.lm_head import decoder_of, hidden_states

VOCAB, PAD = 97, 1
_ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_DECODER = _ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
_DEBERTA = _ENCODER | {
    "relative_attention": True, "position_buckets": 8, "max_position_embeddings": 64, "norm_rel_ebd": "layer_norm",
    "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
KINDS = {
    "bert": ("bert", _ENCODER, {"attention", "norms", "dropout", "last_layer"}),
    "roberta": ("roberta", _ENCODER, {"attention", "norms", "dropout", "last_layer"}),
    "electra": ("electra", _ENCODER | {"embedding_size": 16}, {"attention", "norms", "dropout", "last_layer"}),
    "distilbert": ("distilbert", {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}, {"attention", "dropout"}),
    "deberta, one key": (
        "deberta-v2", _DEBERTA | {"share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
        {"attention", "norms", "dropout", "last_layer"},
    ),
    "deberta, keys of their own": (
        "deberta-v2", _DEBERTA | {"share_att_key": False, "pos_att_type": ["p2c", "c2p"]},
        {"attention", "norms", "dropout", "last_layer"},
    ),
    "deberta, c2p": (
        "deberta-v2", _DEBERTA | {"share_att_key": True, "pos_att_type": ["c2p"], "position_buckets": -1},
        {"attention", "norms", "dropout", "last_layer"},
    ),
    "qwen3": ("qwen3", _DECODER, {"rotary", "norms", "feed_forward"}),
    "llama": ("llama", _DECODER, {"rotary", "norms", "feed_forward"}),
    "gemma3": ("gemma3_text", _DECODER, {"rotary", "norms", "feed_forward"}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, {"dropout"}),
    "gpt_neox": ("gpt_neox", _ENCODER, {"dropout", "rotary"}),
}  # fmt: skip
LENGTHS = {"short": 9, "beyond the buckets": 40}


def build(kind: str, auto=AutoModelForSequenceClassification, dropout: float = 0.0) -> nn.Module:
    architecture, settings, _ = KINDS[kind]
    rates = (
        "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "seq_classif_dropout",
        "embd_pdrop", "attn_pdrop", "resid_pdrop", "classifier_dropout", "hidden_dropout",
    )  # fmt: skip
    config = AutoConfig.for_model(architecture, vocab_size=VOCAB, pad_token_id=PAD, **settings)
    for name in rates:
        if hasattr(config, name):
            setattr(config, name, dropout)
    if not dropout and architecture in ("bert", "roberta", "electra"):
        config.attention_probs_dropout_prob = 0.1  # so that the attention is changed; eval mode drops nothing
    elif not dropout and architecture == "distilbert":
        config.attention_dropout = 0.1
    torch.manual_seed(5)
    model = auto.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, VOCAB, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, short in enumerate((0, 3, length // 2)):
        if short:
            ids[row, -short:], mask[row, -short:] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at real places, and their gradient by the embeddings."""
    table = model.get_input_embeddings().weight.requires_grad_(True)
    logits = model(**inputs).logits
    if logits.ndim == 3:
        logits = logits[inputs["attention_mask"].bool()]
    gradient = torch.autograd.grad(logits.square().sum(), table)[0]
    table.requires_grad_(False)
    return logits.detach(), gradient


def close(found, expected) -> None:
    for mine, theirs in zip(found, expected):
        assert (mine - theirs).norm() <= 2e-5 * theirs.norm()


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        ("bert", {"residual_norm_kernel", "residual_norm_backward_kernel"}),
        ("qwen3", {"rms_norm_kernel", "rms_norm_backward_kernel", "rotary_kernel", "gated_kernel"}),
    ],
)
def test_the_same_numbers_from_triton(kind, kernels, monkeypatch):
    """The kernels that a GPU would run, interpreted."""
    model, inputs = build(kind), batch(9)
    expected = outputs(model, inputs)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    speed_up(model)
    before = Counter(LAUNCHES)
    close(outputs(model, inputs), expected)
    assert kernels <= set(LAUNCHES - before)


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_of_a_classifier(kind, length):
    model, inputs = build(kind), batch(length)
    expected = outputs(model, inputs)
    for module in model.modules():
        if type(module) is nn.Dropout and "dropout" in KINDS[kind][2]:
            module.p = 0.1  # so that they are changed
    assert set(speed_up(model)) == KINDS[kind][2]
    close(outputs(model, inputs), expected)


@pytest.mark.parametrize("kind", ["bert", "deberta, one key", "qwen3"])
@pytest.mark.parametrize("lever", LEVERS)
def test_each_lever_alone(kind, lever):
    model, inputs = build(kind), batch(12)
    expected = outputs(model, inputs)
    with without(*(set(LEVERS) - {lever})):
        done = speed_up(model)
    assert set(done) <= {lever}
    close(outputs(model, inputs), expected)


@pytest.mark.parametrize("kind", ["bert", "deberta, one key", "distilbert"])
def test_tags_read_every_token(kind):
    model, inputs = build(kind, AutoModelForTokenClassification), batch(9)
    expected = outputs(model, inputs)
    assert "last_layer" not in speed_up(model)
    close(outputs(model, inputs), expected)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3"])
def test_decoders_with_and_without_a_cache(kind):
    model, inputs = build(kind, AutoModelForCausalLM), batch(9)
    with torch.no_grad():
        expected = model(**inputs).logits
        speed_up(model)
        assert (model(**inputs).logits - expected)[inputs["attention_mask"].bool()].norm() <= 2e-5 * expected.norm()
        first = model(input_ids=inputs["input_ids"][:1, :5], use_cache=True)
        rest = model(input_ids=inputs["input_ids"][:1, 5:], past_key_values=first.past_key_values)
        both = torch.cat([first.logits, rest.logits], dim=1)
    assert (both - expected[:1]).norm() <= 2e-5 * expected[:1].norm()


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3", "gpt_neox"])
def test_rows_of_a_decoder(kind):
    """All tokens, then some; with the gradient that reaches the embeddings."""
    model, inputs = build(kind, AutoModelForCausalLM), batch(9)["input_ids"]
    rows = torch.tensor([3, 4, 11, 26])
    table = model.get_input_embeddings().weight.requires_grad_(True)

    def found(rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden_states(model, inputs, rows)[0]
        hidden = hidden.flatten(0, 1)[[3, 4, 11, 26]] if rows is None else hidden
        return hidden.detach(), torch.autograd.grad(hidden.square().sum(), table)[0]

    expected = found(None)
    close(found(rows), expected)
    done = speed_up(model, decoder_of(model))
    assert ("last_layer" in done) == (kind != "gpt_neox")
    close(found(rows), expected)
    close(found(None), expected)


@pytest.mark.parametrize("kind", ["bert", "deberta, one key"])
def test_dropout_keeps_the_mean_and_is_repeated_by_a_seed(kind):
    model, inputs = build(kind, dropout=0.2), batch(9)
    plain = copy.deepcopy(model)
    speed_up(model)
    assert model.training is False
    found = {}
    for name, each in (("fast", model), ("plain", plain)):
        each.train()
        torch.manual_seed(3)
        with torch.no_grad():
            draws = torch.stack([each(**inputs).logits for _ in range(400)])
            torch.manual_seed(3)
            assert torch.equal(each(**inputs).logits, draws[0])
        assert draws.std(0).min() > 0
        found[name] = draws
    error = ((found["fast"].var(0) + found["plain"].var(0)) / 400).sqrt()
    assert ((found["fast"].mean(0) - found["plain"].mean(0)).abs() < 5 * error).all()
    ratio = found["fast"].std(0) / found["plain"].std(0)
    assert ((ratio > 0.8) & (ratio < 1.25)).all()


def test_gradient_under_dropout_is_that_of_the_same_masks():
    """Along a direction, the difference of two losses drawn from one seed."""
    model, inputs = build("deberta, one key", dropout=0.2).double(), batch(7)
    speed_up(model)
    model.train()
    table = model.get_input_embeddings().weight.requires_grad_(True)
    direction = torch.randn(table.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss() -> torch.Tensor:
        torch.manual_seed(8)
        return model(**inputs).logits.square().sum()

    slope = (torch.autograd.grad(loss(), table)[0] * direction).sum()
    with torch.no_grad():
        table += 1e-5 * direction
        above = loss()
        table -= 2e-5 * direction
        below = loss()
    assert abs((above - below) / 2e-5 - slope) < 1e-5 * abs(slope)


def test_names_weights_and_saving_stay(tmp_path):
    model = build("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    speed_up(model)
    assert list(model.state_dict()) == list(before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not any(isinstance(module, Fast) for module in loaded.modules())
    assert loaded.config._attn_implementation == "sdpa"
    inputs = batch(9)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_layer_whose_numbers_differ_keeps_its_own(monkeypatch):
    from transformers.models.bert.modeling_bert import BertOutput

    def other(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + 1.01 * input_tensor)

    monkeypatch.setattr(BertOutput, "forward", other)
    model, inputs = build("bert"), batch(9)
    expected = outputs(model, inputs)
    assert speed_up(model)["norms"] == 3  # those behind the attention
    assert not any(isinstance(m, Fast) and isinstance(m, BertOutput) for m in model.modules())
    close(outputs(model, inputs), expected)


def test_a_head_that_reads_more_than_the_first_token_has_a_whole_last_layer(monkeypatch):
    from transformers.models.bert.modeling_bert import BertPooler

    monkeypatch.setattr(BertPooler, "forward", lambda self, x: self.activation(self.dense(x.mean(1))))
    model, inputs = build("bert"), batch(9)
    expected = outputs(model, inputs)
    assert "last_layer" not in speed_up(model)
    close(outputs(model, inputs), expected)


def test_hooked_modules_are_left_alone():
    model = build("bert")
    hooked = model.bert.encoder.layer[0].output
    hooked.register_forward_hook(lambda *_: None)
    speed_up(model)
    assert not isinstance(hooked, Fast)
    assert isinstance(model.bert.encoder.layer[1].output, Fast)


def test_trained_norms_are_computed_by_transformers():
    model, inputs = build("llama"), batch(9)
    speed_up(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    plain = build("llama").requires_grad_(True)
    for each in (model, plain):
        each(**inputs).logits.square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        assert (mine.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-8, name


def test_random_generators_are_not_touched():
    state = torch.get_rng_state()
    model = build("bert")
    torch.set_rng_state(state)
    speed_up(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_levers_are_named():
    with pytest.raises(ValueError, match="no levers: norm; there are"), without("norm"):
        pass
