"""Merged layers compute what the adapted ones do, and afterwards every bit is where it was."""

from __future__ import annotations

import gc
import weakref

import peft
import pytest
import torch
from peft.tuners.adalora import SVDLinear
from torch import nn

import fastpeft
from fastpeft.models import merge
from fastpeft.models.inject import ADAPTER_NAME
from fastpeft.models.layers import LoraLinear, SvdLinear
from fastpeft.models.merge import merged
from tests.support.tiny import causal_model

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
IDS = torch.arange(2, 22).view(2, 10)


def adapted(dtype=torch.float32, factors=torch.float32, seed=0, **config):
    model = causal_model("qwen3", attention_bias=True, tie_word_embeddings=True).to(dtype)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | config
    model = peft.get_peft_model(model, peft.LoraConfig(**settings), autocast_adapter_dtype=False)
    drawn(model, seed, factors)
    fastpeft.accelerate(model)
    logits(model.eval())  # from now on the projections of one input are computed together
    return model


def drawn(model, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32).mul_(0.3).to(dtype)


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear | SvdLinear)}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def bits(tensor):
    return tensor.detach().view(torch.uint8 if tensor.element_size() == 1 else torch.int16).clone()


def state(model):
    """Everything that must be the same afterwards, bit for bit and object for object."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    values = {name: (id(tensor), tensor.data_ptr(), tensor.requires_grad, bits(tensor)) for name, tensor in tensors}
    return [(name, id(m), type(m), m.training) for name, m in model.named_modules()], values


def assert_same(before, after):
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    for name, (*identity, was) in before[1].items():
        assert after[1][name][:-1] == tuple(identity), name
        assert torch.equal(after[1][name][-1], was), name


@pytest.fixture
def full_device(monkeypatch):
    """No room beside the weights, but elsewhere."""
    monkeypatch.setattr(merge._Memory, "fits", lambda self, weight, device: device is merge._HOST)


@pytest.fixture(params=["beside", "in place"])
def room(request):
    if request.param == "in place":
        request.getfixturevalue("full_device")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_the_sum_rounded_once(dtype, room, seed):
    model = adapted(dtype, dtype, seed)
    layers = lora_layers(model)
    wanted = {}
    for name, layer in layers.items():
        a, b = (factor[ADAPTER_NAME].weight.double() for factor in (layer.lora_A, layer.lora_B))
        wanted[name] = layer.base_layer.weight.double() + layer.scaling[ADAPTER_NAME] * (b @ a)
    with merged(model) as done:
        for name, exact in wanted.items():
            plain = model.get_submodule(name)
            assert type(plain) is nn.Linear
            assert plain.weight.dtype == dtype
            assert not plain.weight.requires_grad
            assert plain.bias is layers[name].base_layer.bias
            half_ulp = torch.finfo(dtype).eps * exact.abs() / 2
            assert ((plain.weight.double() - exact).abs() <= 1.01 * half_ulp + 2e-6).all()
    assert (done.num_merged, done.kept) == (len(layers), {})
    assert done.num_on_host == (len(layers) if room == "in place" else 0)


def test_it_computes_the_same(room, seed):
    model = adapted(seed=seed)
    wanted, base = logits(model), model.get_base_model()
    with merged(model):
        assert (logits(model) - wanted).abs().max() < 1e-4
        assert (logits(base) - wanted).abs().max() < 1e-4
    with model.disable_adapter():
        assert (logits(model) - wanted).abs().max() > 1e-2
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("mode", ["done", "raises", "inference mode", "fails while merging"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_afterwards_every_bit_is_as_it_was(dtype, mode, room, monkeypatch):
    model = adapted(dtype).train()
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.base_layer.weight[0, :4] = torch.tensor([-0.0, 1e-40, float("nan"), float("inf")], dtype=dtype)
    before = state(model)
    if mode == "raises":
        with pytest.raises(KeyError), merged(model):
            raise KeyError
    elif mode == "fails while merging":
        real, calls = torch.addmm, []
        monkeypatch.setattr(
            torch, "addmm", lambda *a, **k: 1 / 0 if len(calls) > 3 else calls.append(0) or real(*a, **k)
        )
        with pytest.raises(ZeroDivisionError), merged(model):
            pass
    else:
        with torch.inference_mode(mode == "inference mode"), merged(model) as done:
            assert done.num_merged == 8
    assert_same(before, state(model))


def test_training_goes_on_as_if_nothing_had_been(room, seed):
    model = adapted(seed=seed).train()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    with torch.inference_mode(), merged(model):
        model(input_ids=IDS)
    found = gradients()
    assert len(found) == 16
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_the_merged_weights_are_freed():
    model = adapted()
    with merged(model):
        layer = next(m for name, m in model.named_modules() if name.endswith("q_proj"))
        weight = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert weight() is None


def test_tied_weights_are_merged_beside_or_not_at_all(full_device, monkeypatch):
    """The output layer's weight is the embedding's as well, which is not adapted."""
    model = adapted(target_modules=["lm_head", "q_proj"])
    assert model.get_base_model().lm_head.base_layer.weight is model.get_base_model().model.embed_tokens.weight
    wanted = logits(model)
    with merged(model) as done:
        assert (logits(model) - wanted).abs().max() < 1e-4
    assert list(done.kept) == ["base_model.model.lm_head"]
    monkeypatch.undo()
    with merged(model) as done:
        assert (logits(model) - wanted).abs().max() < 1e-4
    assert not done.kept


def test_adalora(seed):
    """W + s B diag(E) A."""
    settings = peft.AdaLoraConfig(target_modules=TARGETS, init_r=3, lora_alpha=5, total_step=10, task_type="CAUSAL_LM")
    model = peft.get_peft_model(causal_model("llama"), settings).eval()
    drawn(model, seed)
    for module in model.modules():
        if type(module) is SVDLinear:
            module.__class__ = SvdLinear
    assert lora_layers(model)
    wanted = logits(model)
    with merged(model) as done:
        assert (logits(model) - wanted).abs().max() < 1e-4
    assert done.num_merged == 8


class FourBit(nn.Linear):
    """Stands for a weight that is no matrix."""


def four_bit(model):
    for layer in lora_layers(model).values():
        layer.base_layer.__class__ = FourBit


def two_adapters(model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS))
    model.base_model.set_adapter([ADAPTER_NAME, "other"])
    drawn(model, 1)


def hooked(model):
    for layer in lora_layers(model).values():
        layer.register_forward_hook(lambda module, args, y: 2 * y)


def already_merged(model):
    model.base_model.merge_adapter()


def disabled(model):
    model.base_model.disable_adapter_layers()


def probed(model):
    for layer in lora_layers(model).values():
        layer.probe = lambda x, weight, bias: nn.functional.linear(x, weight, bias)


KEPT = {
    four_bit: "the base layer is FourBit",
    two_adapters: "not one active adapter",
    already_merged: "not one active adapter",
    disabled: "not one active adapter",
    hooked: "hooks",
    probed: "hooks",
}


@pytest.mark.parametrize("change", KEPT, ids=lambda change: change.__name__)
def test_what_is_left_as_it_is(change):
    model = adapted()
    change(model)
    wanted = logits(model)
    with merged(model) as done:
        assert torch.equal(logits(model), wanted)
    assert done.num_merged == 0
    assert len(done.kept) == 8
    assert all(KEPT[change] in reason for reason in done.kept.values()), done.kept


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_variant_of_lora_is_left_as_it_is(config):
    model = adapted(**config)
    wanted = logits(model)
    with merged(model) as done:
        assert torch.equal(logits(model), wanted)
    assert (done.num_merged, len(done.kept)) == (0, 8)


def test_where_there_is_no_memory_it_is_left_as_it_is(monkeypatch):
    model = adapted()
    wanted = logits(model)
    size = 4 * 32 * 32
    monkeypatch.setattr(merge, "free_bytes", lambda device: 2.2 * size)  # for one q_proj: half of it may be taken
    with merged(model) as done:
        assert (logits(model) - wanted).abs().max() < 1e-4
    assert done.num_merged == 1
    assert set(done.kept.values()) == {"there is no memory for a second weight"}


def test_memory_that_runs_out_after_all(monkeypatch):
    model = adapted()
    wanted, before = logits(model), state(model)
    real, calls = torch.addmm, []

    def addmm(*args, **more):
        calls.append(0)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("no room")
        return real(*args, **more)

    monkeypatch.setattr(torch, "addmm", addmm)
    with merged(model) as done:
        monkeypatch.undo()
        assert (logits(model) - wanted).abs().max() < 1e-4
    assert (done.num_merged, len(done.kept)) == (3, 5)
    assert_same(before, state(model))


def test_a_model_without_adapters():
    model = causal_model("qwen3")
    before = state(model)
    with merged(model) as done:
        pass
    assert (done.num_merged, done.kept) == (0, {})
    assert_same(before, state(model))
