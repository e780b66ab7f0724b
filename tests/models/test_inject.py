"""Which layers are adapted, and that an adapted layer computes what PEFT's own does."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import Linear as PeftLoraLinear

from fastpeft.adapters.adapter import method_class
from fastpeft.config import load_run
from fastpeft.config.methods import METHODS
from fastpeft.config.schema import AdapterConfig, ModelConfig
from fastpeft.errors import UserError
from fastpeft.kernels import dropout_mask
from fastpeft.models.backbone import Backbone, load_causal_lm
from fastpeft.models.inject import _adaptable, _why_not, inject_lora
from fastpeft.models.layers import LoraLinear
from fastpeft.models.targets import match_targets, projection_of
from tests.support.classifiers import load_backbone
from tests.support.tiny import FAMILIES, NUM_LAYERS, save_character_tokenizer

CPU = torch.device("cpu")
SECOND_LAYER = r".*\.layer\.1\..*"
# family: (query, value, key, attention output, the two of the feed-forward)
PROJECTIONS = {
    "deberta-v2": ("query_proj", "value_proj", "key_proj", "attention.output.dense", "intermediate.dense"),
    "bert": ("query", "value", "key", "attention.output.dense", "intermediate.dense"),
    "roberta": ("query", "value", "key", "attention.output.dense", "intermediate.dense"),
    "distilbert": ("q_lin", "v_lin", "k_lin", "out_lin", "lin1"),
}
LAST = {"distilbert": "lin2"}


def load(model_folders, family: str) -> Backbone:
    return load_backbone(ModelConfig(name=str(model_folders[family])), ("no", "yes"), torch.float32, CPU)


def inject(model_folders, family: str, target_modules="all-linear", **fields):
    """The PeftModel and its blocks, with A and B drawn at random."""
    model, blocks = inject_lora(
        load(model_folders, family), AdapterConfig(rank=4, target_modules=target_modules, **fields)
    )
    for block in blocks:
        torch.nn.init.normal_(block.lora_a, std=0.3)
        torch.nn.init.normal_(block.lora_b, std=0.3)
    return model, blocks


# ---- which layers --------------------------------------------------------------------------


def causal(folder, family, **settings) -> Backbone:
    vocab = save_character_tokenizer(folder)
    tokens = {"pad_token_id": vocab["<pad>"], "eos_token_id": vocab["</s>"], "bos_token_id": None}
    sizes = {"vocab_size": 104, "hidden_size": 32, "num_hidden_layers": 2}
    config = transformers.AutoConfig.for_model(family, **tokens | sizes | settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_causal_lm(ModelConfig(name=str(folder)), torch.float32, CPU)


def test_layers_that_peft_would_not_adapt_are_left_out_and_said(tmp_path):
    """By name they are refused."""
    backbone = causal(tmp_path, "mamba", state_size=8)
    with pytest.raises(UserError, match=r"MambaForCausalLM's out_proj: .* past an adapter"):
        inject_lora(backbone, AdapterConfig(target_modules=["out_proj"]))
    model, blocks = inject_lora(backbone, AdapterConfig(target_modules="all-linear"))
    assert blocks
    assert "out_proj" not in {block.projection for block in blocks}
    (note,) = backbone.notes
    assert "all-linear leaves them out" in note
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(blocks)


@pytest.mark.parametrize(("kind", "name", "taken"), [
    ("deepseek_v3", "shared_experts.down_proj", True),
    ("deepseek_v3", "shared_experts.up_proj", True),
    ("deepseek_v3", "self_attn.o_proj", False),
    ("qwen3", "mlp.down_proj", False),
])  # fmt: skip
def test_names_that_peft_takes_for_experts(kind, name, taken):
    """It would adapt the experts' stacked weights, and not the layer of that name."""
    model = SimpleNamespace(config=SimpleNamespace(model_type=kind), get_submodule=lambda _: torch.nn.Linear(2, 2))
    why = _why_not(model, f"model.layers.1.mlp.{name}")
    assert (why is not None and "in place of" in why) is taken


class Router(torch.nn.Linear):
    """Chooses experts as well."""

    def forward(self, x):
        scores = super().forward(x)
        return scores.sigmoid(), scores


class Scaled(torch.nn.Linear):
    """Some models have linear layers of their own that are no more than that."""

    def forward(self, x):
        return super().forward(x)


def test_a_router_is_left_out_and_said(model_folders):
    backbone = load(model_folders, "bert")
    for layer, kind in zip(backbone.model.bert.encoder.layer, (Router, Scaled)):
        layer.intermediate.dense.__class__ = kind
    name = "bert.encoder.layer.0.intermediate.dense"
    with pytest.raises(UserError, match="Router gives more than a matrix product"):
        inject_lora(backbone, AdapterConfig(target_modules=[name]))
    names = match_targets(backbone.model, backbone.head, "all-linear")
    left = _adaptable(backbone, "all-linear", names)
    assert set(names) - set(left) == {name}
    assert any("Router" in note and "leaves them out" in note for note in backbone.notes)


def test_names_that_end_as_other_modules_do_are_given_whole(tmp_path):
    """CTRL's linear layers are ffn.0 and ffn.2, and its blocks h.0 and h.1."""
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "dff": 16, "n_positions": 32, "tie_word_embeddings": True}
    backbone = causal(tmp_path, "ctrl", **settings)
    _, blocks = inject_lora(backbone, AdapterConfig(target_modules="all-linear"))
    assert any(block.name.endswith("ffn.0") for block in blocks)
    assert all(isinstance(block.module, PeftLoraLinear) for block in blocks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("wanted", "kinds"), [("qv", 2), ("attention", 4), ("all-linear", 6)])
def test_keywords(model_folders, family, wanted, kinds):
    backbone = load(model_folders, family)
    names = match_targets(backbone.model, backbone.head, wanted)
    expected = [*PROJECTIONS[family], LAST.get(family, "output.dense")]
    expected = expected[:kinds] if wanted != "attention" else expected[:4]
    assert sorted(projection_of(name) for name in names) == sorted(expected * NUM_LAYERS)
    order = [name for name, _ in backbone.model.named_modules()]
    assert names == sorted(names, key=order.index)
    assert len(set(names)) == kinds * NUM_LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_list_identifier_and_regular_expression(model_folders, family):
    backbone = load(model_folders, family)
    query, value = PROJECTIONS[family][:2]

    def count(wanted):
        return len(match_targets(backbone.model, backbone.head, wanted))

    assert count([query, value]) == 2 * NUM_LAYERS
    assert count([query]) == count(query) == NUM_LAYERS
    assert count(SECOND_LAYER) == 6
    assert count(rf".*\.0\..*{query}") == 1
    whole = match_targets(backbone.model, backbone.head, query)[0]
    assert match_targets(backbone.model, backbone.head, [whole]) == [whole]
    assert match_targets(backbone.model, backbone.head, whole) == [whole]


def test_endings_match_whole_parts_of_a_name(model_folders):
    backbone = load(model_folders, "bert")
    with pytest.raises(UserError):
        match_targets(backbone.model, backbone.head, ["uery"])
    both = match_targets(backbone.model, backbone.head, ["output.dense"])  # the attention's and the layer's
    assert len(both) == 2 * NUM_LAYERS
    assert len(match_targets(backbone.model, backbone.head, ["attention.output.dense"])) == NUM_LAYERS


@pytest.mark.parametrize(("family", "expected"), [("deberta-v2", 6), ("bert", 7), ("roberta", 6)])
def test_the_head_is_never_adapted(model_folders, family, expected):
    """`dense` also names DeBERTa's fresh pooler and RoBERTa's head; BERT's pooler is pretrained."""
    backbone = load(model_folders, family)
    assert len(match_targets(backbone.model, backbone.head, "dense")) == expected
    with pytest.raises(UserError):
        match_targets(backbone.model, backbone.head, "classifier")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wanted", ["no_such_layer", ["no", "such"], [], "", r".*\.layer\.9\..*"])
def test_no_match_lists_the_linear_layers(model_folders, family, wanted):
    backbone = load(model_folders, family)
    with pytest.raises(UserError) as error:
        match_targets(backbone.model, backbone.head, wanted)
    assert repr(wanted) in str(error.value)
    for projection in PROJECTIONS[family]:
        assert projection in str(error.value)


@pytest.mark.parametrize(
    ("wanted", "idle"),
    [
        (r".*\.(query|valu)", r".*\.(valu)"),
        (r".*\.(?:query|value|kei)", r".*\.(?:kei)"),
        (r".*\.query|.*\.valu", r".*\.valu"),
    ],
)
def test_every_alternative_of_a_regular_expression_has_to_match(model_folders, wanted, idle):
    backbone = load(model_folders, "bert")
    with pytest.raises(UserError, match="did you mean") as error:
        match_targets(backbone.model, backbone.head, wanted)
    assert f"{idle!r} matches no linear layer" in str(error.value)
    assert str(error.value).count("matches no") == 1


@pytest.mark.parametrize(
    "wanted", [r".*\.(query|value)", r"(?!.*(key|output)).*\.\d+\..*", r".*\.layer\.[0|1]\..*query"]
)
def test_a_regular_expression_of_which_all_match(model_folders, wanted):
    backbone = load(model_folders, "bert")
    assert match_targets(backbone.model, backbone.head, wanted)


@pytest.mark.parametrize("method", ["lora", "rslora", "iw_lora", "adalora"])
def test_every_entry_has_to_match_whatever_the_method(model_folders, method):
    adapter = AdapterConfig(target_modules=["query", "valu"])
    own = METHODS.own_section(load_run("lora_mnli", {"method": method}))
    with pytest.raises(UserError, match=r"'valu' matches no linear layer of this model, did you mean value\?") as error:
        method_class(method).build(adapter, own, load(model_folders, "bert"))
    assert "'query' matches" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["query", "valu", "kei"], "'valu' matches no linear layer of this model, did you mean value?; 'kei' matches"),
        (["attention.output.dens"], "did you mean attention.output.dense?"),
        (["bert.encoder.layer.0.attention.self.qury"], "did you mean bert.encoder.layer.0.attention.self.query?"),
        (["layer.1.attention.self"], "it is a BertSelfAttention"),
        (["query", "word_embeddings"], "it is a Embedding"),
        (["query", "classifier"], "it is of the head, which is not adapted"),
        (["query", "qv"], "the word stands alone and in no list, adapter.target_modules=qv"),
        ("qury", "did you mean query?"),
        ("atention", "did you mean attention?"),
        ("all_linear", "did you mean all-linear?"),
        ("all-liner", "did you mean all-linear?"),
        (r".*\.layer\.0\..*qury", "did you mean query?"),
        (r".*\.layer\.9\..*query", "matches no linear layer of this model, did you mean query?"),
        ([], "it names no layer"),
    ],
)
def test_what_matches_nothing_is_named_with_the_nearest(model_folders, wanted, words):
    backbone = load(model_folders, "bert")
    with pytest.raises(UserError) as error:
        match_targets(backbone.model, backbone.head, wanted)
    assert words in str(error.value)
    assert "Its linear layers end in" in str(error.value)


@pytest.mark.parametrize("wanted", ["(", "*query", "[a-"])
def test_bad_regular_expression(model_folders, wanted):
    backbone = load(model_folders, "bert")
    with pytest.raises(UserError, match="no regular expression") as error:
        match_targets(backbone.model, backbone.head, wanted)
    assert repr(wanted) in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wanted", ["qv", "attention", "all-linear", "dense", SECOND_LAYER])
def test_exactly_the_matched_layers_are_adapted(model_folders, family, wanted):
    if (family, wanted) == ("distilbert", "dense"):
        wanted = "lin1"
    backbone = load(model_folders, family)
    names = match_targets(backbone.model, backbone.head, wanted)
    model, blocks = inject_lora(backbone, AdapterConfig(rank=4, alpha=12.0, target_modules=wanted))
    found = [name for name, module in model.base_model.model.named_modules() if isinstance(module, PeftLoraLinear)]
    assert found == names == [block.name for block in blocks]
    for block in blocks:
        assert type(block.module) is LoraLinear
        assert block.scale == 3.0
        assert not block.lora_b.any()
        assert block.lora_a.any()
        assert block.projection == projection_of(block.name)
        pooler = "pooler" in block.name
        assert block.layer == (0 if pooler else int(block.name.split(".layer.")[1].split(".")[0]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    head = {name for name in trained if ".lora_" not in name}
    assert len(trained - head) == 2 * len(names)
    assert all("modules_to_save.default" in name for name in head)
    assert {h for h in backbone.head if any(f".{h}.modules_to_save" in name for name in head)} == set(backbone.head)


# ---- what a layer computes -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_equal_pefts_own(model_folders, seed, family):
    torch.manual_seed(seed)
    _, blocks = inject(model_folders, family)
    for block in blocks:
        x = torch.randn(3, 5, block.module.in_features)
        mine, theirs = block.module(x), PeftLoraLinear.forward(block.module, x)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-5)
        assert float((mine - block.module.base_layer(x)).detach().norm()) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_equals_pefts_own(model_folders, seed, family):
    """The same configuration and weights, in a model that PEFT has made."""
    torch.manual_seed(seed)
    model, _ = inject(model_folders, family)
    plain = copy.deepcopy(model.peft_config["default"])
    plain._custom_modules = None
    other = peft.get_peft_model(load(model_folders, family).model, plain)
    other.load_state_dict(model.state_dict())
    assert not any(isinstance(module, LoraLinear) for module in other.modules())
    ids = torch.randint(5, 20, (4, 9))
    with torch.inference_mode():  # layer by layer
        torch.testing.assert_close(
            model.eval()(input_ids=ids).logits, other.eval()(input_ids=ids).logits, rtol=1e-6, atol=1e-5
        )

    def hidden(peft_model):  # the head stays fp32
        inner = peft_model.double().base_model.model
        return getattr(inner, inner.base_model_prefix)(input_ids=ids).last_hidden_state

    torch.testing.assert_close(hidden(model), hidden(other), rtol=0, atol=1e-8)


@pytest.mark.parametrize("family", ["deberta-v2", "distilbert"])
def test_merge_unmerge_and_disable(model_folders, seed, family):
    torch.manual_seed(seed)
    bare = load(model_folders, family).model.double()
    model, blocks = inject(model_folders, family)
    model.double().eval()
    ids = torch.randint(5, 20, (4, 9))

    def hidden(module):
        return getattr(module, bare.base_model_prefix)(input_ids=ids).last_hidden_state

    inner = model.base_model.model
    adapted, plain = hidden(inner), hidden(bare)
    assert float((adapted - plain).detach().norm()) > 1
    with model.disable_adapter():
        torch.testing.assert_close(hidden(inner), plain, rtol=0, atol=1e-12)
    weights = [block.module.base_layer.weight.clone() for block in blocks]
    model.merge_adapter()
    torch.testing.assert_close(hidden(inner), adapted, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    for block, weight in zip(blocks, weights):
        torch.testing.assert_close(block.module.base_layer.weight, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden(inner), adapted, rtol=1e-9, atol=1e-9)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(hidden(merged), adapted, rtol=1e-9, atol=1e-9)


def test_dropout_is_on_the_adapters_input(model_folders, seed):
    _, (block, *_) = inject(model_folders, "bert", dropout=0.4)
    x = torch.randn(6, block.module.in_features)
    module = block.module.train()
    torch.manual_seed(seed)
    got = module(x)
    torch.manual_seed(seed)
    dropped = x * dropout_mask(x.shape, 0.4, torch.randint(2**63 - 1, (1,))) / 0.6
    assert not torch.equal(dropped, x)
    want = module.base_layer(x) + block.scale * dropped @ block.lora_a.t() @ block.lora_b.t()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    module.eval()
    want = module.base_layer(x) + block.scale * x @ block.lora_a.t() @ block.lora_b.t()
    torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-4)


def test_gradients_reach_only_adapter_and_head(model_folders, seed):
    torch.manual_seed(seed)
    model, blocks = inject(model_folders, "deberta-v2", target_modules="qv")
    model.train()
    model(input_ids=torch.randint(5, 20, (4, 9))).logits.square().sum().backward()
    assert all(block.lora_a.grad.any() and block.lora_b.grad.any() for block in blocks)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
