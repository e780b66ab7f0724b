"""Rows one behind another have the logits and gradients that transformers gives them padded; or it is said why not."""

from __future__ import annotations

import random
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from fastpeft.kernels.ops.varlen_attention import op
from fastpeft.kernels.sequences import Sequences
from fastpeft.models import varlen
from fastpeft.models.checkpointed_layers import checkpoint_layers
from fastpeft.models.fast import speed_up, without
from fastpeft.models.lm_head import decoder_of
from fastpeft.models.varlen import attention_way, use_varlen
from tests.models.test_fast import PAD, VOCAB, build, close
from tests.support.closeness import Largest
from tests.support.row_lengths import DRAWN, draw_lengths
from tests.support.tiny import causal_model

ENCODERS = ("bert", "roberta", "distilbert", "deberta, one key", "deberta, keys of their own", "deberta, c2p")
HEADS = {"sequences": AutoModelForSequenceClassification, "tokens": AutoModelForTokenClassification}
WINDOW = 6
DECODERS = {
    "llama": {},
    "qwen3": {},
    "qwen3, a window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
}


def decoder(kind: str, head: str | None = None) -> nn.Module:
    """With another head than a language model's where one is named."""
    model = causal_model(kind.split(",")[0], vocab_size=VOCAB, pad_token_id=PAD, **DECODERS[kind])
    if head is not None:
        torch.manual_seed(1)
        model = HEADS[head].from_config(model.config)
    return model.eval().requires_grad_(False)


class Rows:
    """A batch, padded and one row behind another."""

    def __init__(self, lengths: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        self.rows = [torch.randint(2, VOCAB, (length,), generator=generator) for length in lengths]

    def padded(self) -> dict[str, torch.Tensor]:
        ids = nn.utils.rnn.pad_sequence(self.rows, batch_first=True, padding_value=PAD)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in self.rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask}

    def concatenated(self) -> dict:
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        ids = {"input_ids": torch.cat(self.rows)[None], "position_ids": positions[None]}
        return ids | {"attention_mask": Sequences.of(self.lengths)}


def outputs(model: nn.Module, inputs: dict) -> tuple[torch.Tensor, ...]:
    """Logits of rows, or of all real tokens, and gradients by the embeddings and by the matrices of the first layer."""
    matrices = [p for name, p in model.named_parameters() if ".0." in name and p.ndim == 2]
    leaves = [p.requires_grad_(True) for p in (model.get_input_embeddings().weight, *matrices)]
    logits = model(**inputs).logits
    if logits.ndim == 3:
        mask = inputs["attention_mask"]
        logits = logits[0] if isinstance(mask, Sequences) else logits[mask.bool()]
    of_embeddings, *rest = torch.autograd.grad(logits.square().sum(), leaves)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return logits.detach(), of_embeddings, torch.cat([gradient.flatten() for gradient in rest])


def check(model: nn.Module, rows: Rows, *decoder: nn.Module) -> None:
    """What the model of transformers gives for padded rows is given without padding, and for padded rows still."""
    expected = outputs(model, rows.padded())
    speed_up(model, *decoder)
    fast = outputs(model, rows.padded())
    assert use_varlen(model) is None
    close(outputs(model, rows.concatenated()), expected)
    for found, before in zip(outputs(model, rows.padded()), fast):
        assert torch.equal(found, before)


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder(kind, head, drawn, fresh_seed):
    rows = Rows(draw_lengths(drawn, random.Random(fresh_seed), longest=40), fresh_seed)
    model = build(kind, HEADS[head])
    check(model, rows)


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder(kind, drawn, fresh_seed):
    rows = Rows(draw_lengths(drawn, random.Random(fresh_seed), longest=40), fresh_seed)
    model = decoder(kind)
    check(model, rows, decoder_of(model))


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize(
    ("kind", "head"),
    [(kind, head) for head in HEADS for kind in DECODERS if (kind, head) != ("gemma3_text", "tokens")],
)
def test_a_decoder_as_a_classifier(kind, head, drawn, fresh_seed):
    rows = Rows(draw_lengths(drawn, random.Random(fresh_seed), longest=40), fresh_seed)
    rows.rows[0][len(rows.rows[0]) // 2 :] = PAD  # as where the token that ends a text is the padding token too
    model = decoder(kind, head)
    check(model, rows)


def test_which_token_counts_last():
    """Of a row of padding tokens alone the first, as transformers has it."""
    counts = torch.tensor([1, 1, 0, 0, 0, 1, 0, 1], dtype=torch.bool)
    assert Sequences.of([3, 2, 1, 2]).last(counts).tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize("kind", ["bert", "deberta, one key"])
def test_the_last_layer_may_compute_every_token(kind, seed):
    rows, model = Rows([4, 9, 9, 2], seed), build(kind)
    expected = outputs(model, rows.padded())
    with without("last_layer"):
        speed_up(model)
    assert use_varlen(model) is None
    close(outputs(model, rows.concatenated()), expected)


@pytest.mark.parametrize("kind", ["roberta", "deberta, one key", "gemma3_text"])
def test_layers_may_be_computed_again(kind, seed):
    """The rows are known to the second pass as well."""
    rows = Rows([4, 9, 9, 2], seed)
    model = build(kind) if kind in ENCODERS else decoder(kind)
    speed_up(model, None if kind in ENCODERS else decoder_of(model))
    assert use_varlen(model) is None
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = outputs(model, rows.concatenated())
    assert checkpoint_layers(model) > 1
    close(outputs(model, rows.concatenated()), expected)


@pytest.mark.parametrize("kind", ["bert", "deberta, one key", "llama", "gemma3_text"])
def test_nothing_of_all_tokens_by_all_tokens(kind, seed):
    rows = Rows([12] * 40, seed)
    model = build(kind, HEADS["tokens"]) if kind in ENCODERS else decoder(kind)
    speed_up(model, None if kind in ENCODERS else decoder_of(model))
    assert use_varlen(model) is None
    with Largest() as largest, torch.no_grad():
        model(**rows.concatenated())
    assert largest.elements < 480**2 / 2


# ---- what a set-up says of attention ------------------------------------------------------------


ASKED = {  # heads, those of keys, whether it is causal
    "bert": (4, 4, False),
    "distilbert": (4, 4, False),
    "llama": (4, 2, True),
    "gemma3_text": (4, 2, True),
}


@pytest.mark.parametrize("kind", ASKED)
def test_the_way_of_attention_is_asked_for_as_it_is_computed(kind, monkeypatch):
    asked, computed = [], []

    def choose_way(query, num_key_heads, causal, dropout, **more):
        into = computed if len(query) else asked
        into.append((query.shape[1:], query.dtype, num_key_heads, causal))
        return original(query, num_key_heads, causal, dropout, **more)

    original = op.choose_way
    for module in (op, varlen):
        monkeypatch.setattr(module, "choose_way", choose_way)
    model = build(kind) if kind in ENCODERS else decoder(kind)
    assert use_varlen(model) is None
    way = attention_way(model)
    assert way is not None
    assert way.name == op.RUNS
    model(**Rows([4, 9, 2], 0).concatenated())
    assert {*computed} == {*asked}
    (heads, _), _, key_heads, causal = asked[0]
    assert (heads, key_heads, causal) == ASKED[kind]


def test_deberta_has_no_choice():
    model = build("deberta, one key")
    speed_up(model)
    assert use_varlen(model) is None
    assert attention_way(model) is None


# ---- what keeps its padded batches -------------------------------------------------------------


@pytest.mark.parametrize("version", ["4.57.6", "5.16.2", "5.25.0", "6.0.0.dev0"])
def test_an_unknown_version(version, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # which is not the one imported above
    model = build("bert")
    kind = type(model.bert)
    assert use_varlen(model) == f"transformers {version} is none of 5.17 to 5.24, whose models it knows"
    assert type(model.bert) is kind


@pytest.mark.parametrize(
    ("kind", "auto", "told"),
    [
        ("electra", AutoModelForSequenceClassification, "ElectraForSequenceClassification is no model that it knows"),
        ("gpt_neox", AutoModelForCausalLM, "GPTNeoXForCausalLM is no model that it knows"),
    ],
)
def test_an_unknown_model(kind, auto, told):
    assert use_varlen(build(kind, auto)) == told


def test_deberta_with_attention_of_its_own():
    told = "its attention is transformers' own, which takes padded rows only"
    assert use_varlen(build("deberta, one key")) == f"DebertaV2ForSequenceClassification: {told}"


def test_deberta_with_a_convolution():
    config = transformers.AutoConfig.for_model(
        "deberta-v2", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, relative_attention=True, pos_att_type=["c2p"], conv_kernel_size=3, conv_act="gelu",
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    speed_up(model)
    assert use_varlen(model) == "DebertaV2ForSequenceClassification: it has a convolution, which reads beyond a row"


def test_eager_attention():
    model = decoder("llama")
    model.set_attn_implementation("eager")
    assert use_varlen(model) == "LlamaForCausalLM: its attention is eager, not sdpa"


def test_what_transformers_records_is_found_all_the_same(seed):
    model, rows = build("bert"), Rows([4, 9], seed)
    expected = model(**rows.padded(), output_hidden_states=True).hidden_states
    assert use_varlen(model) is None
    found = model(**rows.padded(), output_hidden_states=True).hidden_states
    assert len(found) == len(expected) > 2
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)
