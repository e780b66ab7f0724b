"""One layer: the kernels where it is plain LoRA, PEFT's own forward and result wherever it is not."""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager, nullcontext

import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft.kernels import dropout_mask
from fastpeft.models import layers

NUM_IN, NUM_OUT = 7, 5


class Model(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x, **kwargs):
        return self.linear(x, **kwargs)


def adapted(seed, linear=None, **config):
    """A PEFT model of one layer, with factors at random."""
    torch.manual_seed(seed)
    linear = nn.Linear(NUM_IN, NUM_OUT) if linear is None else linear
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["linear"]} | config
    model = peft.get_peft_model(Model(linear), peft.LoraConfig(**settings))
    return drawn(model)


def drawn(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def layer_of(model):
    return model.base_model.model.linear


def result(model, x, mode=nullcontext, **kwargs):
    """y, dx and the gradients of all that is trained."""
    model.zero_grad()
    x = x.clone().requires_grad_(True)
    with mode():
        y = model(x, **kwargs)
    y.backward(dy_of(y))
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def dy_of(y):
    return torch.arange(y.numel()).cos().view(y.shape).to(y.dtype)


def assert_close(mine, theirs, limit=1e-5):
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert float((one.double() - other.double()).norm()) <= limit * float(other.double().norm()) + 1e-6


@pytest.fixture
def computed(monkeypatch):
    calls = []
    real = layers.lora_linear

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(layers, "lora_linear", counted)
    return calls


# ---- plain ---------------------------------------------------------------------------------

PLAIN = {
    "default": {},
    "rank-stabilised": {"use_rslora": True},
    "the widest rank": {"r": 256},
    "rank 1": {"r": 1},
    "no bias": {"linear": nn.Linear(NUM_IN, NUM_OUT, bias=False)},
    "dropout, but evaluated": {"lora_dropout": 0.5},
    "PiSSA": {"init_lora_weights": "pissa"},
    "fp64": {"linear": nn.Linear(NUM_IN, NUM_OUT, dtype=torch.float64)},
}


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("shape", [(4, NUM_IN), (2, 3, NUM_IN), (NUM_IN,), (0, NUM_IN)])
def test_plain(case, shape, seed, computed):
    model = adapted(seed, **PLAIN[case]).eval()
    if case == "fp64":
        model.double()
    x = torch.randn(shape, dtype=layer_of(model).base_layer.weight.dtype)
    want = result(model, x)
    fastpeft.accelerate(model)
    assert_close(result(model, x), want)
    assert len(computed) == 1


def test_another_adapter_than_the_default(seed, computed):
    model = adapted(seed)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["linear"]))
    drawn(model).set_adapter("other")
    want = result(model, torch.ones(2, NUM_IN))
    fastpeft.accelerate(model)
    assert_close(result(model, torch.ones(2, NUM_IN)), want)
    assert len(computed) == 1


def test_a_changed_scale(seed, computed):
    model = adapted(seed)
    fastpeft.accelerate(model)
    layer_of(model).set_scale("default", 4.0)
    x = torch.randn(3, NUM_IN)
    want = layer_of(model).base_layer(x) + x @ layer_of(model).get_delta_weight("default").t()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    assert len(computed) == 1


# ---- dropout -------------------------------------------------------------------------------


def test_dropout_has_the_right_mean(seed):
    """Over 4000 masks within five standard errors, of the result and of the gradient of A."""
    model = adapted(seed, lora_dropout=0.3)
    fastpeft.accelerate(model)
    x = torch.randn(1, NUM_IN).expand(4000, NUM_IN)
    exact = model.eval()(x[:1])
    ys = model.train()(x)
    error = ys.std(0) / len(x) ** 0.5
    assert bool((error > 0).all())
    assert bool(((ys.mean(0) - exact[0]).abs() <= 5 * error).all())


def test_dropout_follows_torchs_generator(seed):
    model = adapted(seed, lora_dropout=0.4).train()
    fastpeft.accelerate(model)
    x = torch.randn(6, NUM_IN)
    state = torch.get_rng_state()
    first, second = result(model, x), result(model, x)
    torch.set_rng_state(state)
    again = result(model, x)
    assert all(torch.equal(one, other) for one, other in zip(first, again))
    assert not torch.equal(first[0], second[0])


def test_dropout_and_its_gradients_have_one_mask(seed):
    model = adapted(seed, lora_dropout=0.4).train()
    fastpeft.accelerate(model)
    x = torch.randn(6, NUM_IN)
    torch.manual_seed(seed)
    got = result(model, x)
    torch.manual_seed(seed)
    kept = dropout_mask(x.shape, 0.4, torch.randint(2**63 - 1, (1,))) / 0.6
    layer = layer_of(model)

    class WithMask(nn.Module):
        def forward(self, x):
            update = layer.lora_B["default"](layer.lora_A["default"](x * kept))
            return layer.base_layer(x) + layer.scaling["default"] * update

    with_mask = WithMask()
    with_mask.layer = layer
    assert_close(got, result(with_mask, x))


# ---- what PEFT computes --------------------------------------------------------------------


def two_adapters(model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["linear"]))
    drawn(model).base_model.set_adapter(["default", "other"])


def another_is_active(model):
    """An adapter that this layer has not."""
    layer_of(model)._active_adapter = ["elsewhere"]


def merged(model):
    model.merge_adapter()


def trained_base(model):
    layer_of(model).base_layer.weight.requires_grad_(True)


def trained_bias(model):
    layer_of(model).base_layer.bias.requires_grad_(True)


def hook_on(path, kind="register_forward_hook"):
    def change(model):
        hooks = {
            "register_forward_hook": lambda module, args, y: y * 2,
            "register_forward_pre_hook": lambda module, args: (args[0] * 2,),
            "register_full_backward_hook": lambda module, dx, dy: tuple(None if d is None else d * 2 for d in dx),
        }
        getattr(layer_of(model).get_submodule(path), kind)(hooks[kind])

    change.__name__ = f"{kind} on {path}"
    return change


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def another_class(model):
    layer_of(model).base_layer.__class__ = Doubled


def another_class_of_factor(model):
    layer_of(model).lora_B["default"].__class__ = Doubled


def parametrised(model):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(layer_of(model).base_layer, "weight", Twice())


def wrapped_forward(model):
    base = layer_of(model).base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias) * 2


def drops_all(model):
    layer_of(model).lora_dropout["default"] = nn.Dropout(1.0)
    model.train()


def drops_channels(model):
    layer_of(model).lora_dropout["default"] = nn.Hardtanh()


CHANGES = [
    two_adapters, another_is_active, merged, trained_base, trained_bias, another_class, another_class_of_factor,
    parametrised, wrapped_forward, drops_all, drops_channels,
    hook_on("base_layer"), hook_on("lora_A.default"), hook_on("lora_B.default"), hook_on("lora_dropout.default"),
    hook_on("base_layer", "register_forward_pre_hook"), hook_on("base_layer", "register_full_backward_hook"),
    hook_on("lora_A.default", "register_full_backward_hook"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_pefts_after_a_change(change, seed, computed):
    """Before or after accelerate(): each is asked for at every call."""
    model, x = adapted(seed), torch.randn(3, NUM_IN)
    early, late = copy.deepcopy(model), copy.deepcopy(model)
    fastpeft.accelerate(late)
    for one in (model, early, late):
        torch.manual_seed(seed)
        change(one)
    fastpeft.accelerate(early)
    want = result(model, x)
    for one in (early, late):
        for mine, theirs in zip(result(one, x), want, strict=True):
            assert torch.equal(mine, theirs)
    assert not computed


KEPT = {
    "DoRA": ({"use_dora": True}, "Dora"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "aLoRA": ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "ALora"),
    "too wide": ({"r": 257}, "rank 257 is above 256"),
    "Conv1D": ({"linear": Conv1D(NUM_OUT, NUM_IN), "fan_in_fan_out": True}, "the base layer is Conv1D, not nn.Linear"),
    "an embedding": ({"linear": nn.Embedding(9, 4)}, "the layer is PEFT's lora.layer.Embedding"),
    "a convolution": ({"linear": nn.Conv1d(NUM_IN, NUM_OUT, 1)}, "the layer is PEFT's lora.layer.Conv1d"),
}


@pytest.mark.parametrize("case", KEPT)
def test_kept_with_a_reason(case, seed, computed):
    config, reason = KEPT[case]
    config = copy.deepcopy(config)
    config.pop("task_type", None)
    model = adapted(seed, **config)
    x = torch.randint(9, (3, 4)) if case == "an embedding" else torch.randn(3, NUM_IN, 1)
    x = x if case in ("an embedding", "a convolution") else x[..., 0]
    want = model(x)
    before = type(layer_of(model))
    accelerated = fastpeft.accelerate(model)
    assert accelerated.kept == {"base_model.model.linear": reason}
    assert repr(accelerated) == f"Accelerated(0 LoRA layers swapped; 1 kept: {reason})"
    assert type(layer_of(model)) is before
    assert torch.equal(model(x), want)
    assert not computed


def test_a_variant_beside_a_plain_adapter(seed, computed):
    """The layer is swapped for the plain one; the variant is PEFT's when it is active."""
    model = adapted(seed)
    model.add_adapter("dora", peft.LoraConfig(r=2, target_modules=["linear"], use_dora=True))
    x, twin = torch.randn(3, NUM_IN), copy.deepcopy(model)
    assert len(fastpeft.accelerate(model).swapped) == 1
    for name, calls in (("default", 1), ("dora", 1), ("default", 2)):
        model.set_adapter(name)
        twin.set_adapter(name)
        assert_close(result(model, x), result(twin, x))
        assert len(computed) == calls


def test_adapters_mixed_in_one_batch(seed, computed):
    model = adapted(seed).eval()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["linear"]))
    drawn(model)
    x, names = torch.randn(3, NUM_IN), ["other", "__base__", "default"]
    want = model(x, adapter_names=names)
    fastpeft.accelerate(model)
    assert torch.equal(model(x, adapter_names=names), want)
    assert not computed
    model(x)
    assert len(computed) == 1


def test_disabled(seed, computed):
    model = adapted(seed)
    fastpeft.accelerate(model)
    x = torch.randn(3, NUM_IN)
    with model.disable_adapter():
        assert torch.equal(model(x), layer_of(model).base_layer(x))
    assert not computed
    model(x)
    assert len(computed) == 1


def test_per_sample_gradients(seed, computed):
    """torch.func's transforms go through PEFT's forward."""
    model = adapted(seed)
    x = torch.randn(4, NUM_IN)

    def per_sample():
        parameters = dict(model.named_parameters())

        def loss(parameters, row):
            return torch.func.functional_call(model, parameters, (row,)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    want = per_sample()
    with fastpeft.accelerate(model):
        got = per_sample()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not computed


# ---- dtypes --------------------------------------------------------------------------------


@contextmanager
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.parametrize("mode", [nullcontext, autocast])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_are_pefts(mode, base, factors, given, seed, computed):
    """Where PEFT computes, the same dtypes and values; where it refuses, the same refusal."""
    model = adapted(seed)
    layer_of(model).base_layer.to(base)
    layer_of(model).lora_A.to(factors)
    layer_of(model).lora_B.to(factors)
    x = torch.randn(33, NUM_IN).to(given)
    try:
        want = result(model, x, mode)
    except RuntimeError as error:
        refusal = re.escape(str(error))
        fastpeft.accelerate(model)
        with pytest.raises(RuntimeError, match=refusal):
            result(model, x, mode)
        return
    fastpeft.accelerate(model)
    exact = {base, factors, given} <= {torch.float32, torch.float64} and mode is nullcontext
    assert_close(result(model, x, mode), want, 1e-5 if exact else 5e-2)


def test_without_casting_of_the_input(seed, computed):
    model = adapted(seed)
    layer_of(model).base_layer.to(torch.bfloat16)
    x = torch.randn(3, NUM_IN, dtype=torch.bfloat16)
    fastpeft.accelerate(model)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(x)
    assert not computed
    assert model(x).dtype == torch.bfloat16
    assert len(computed) == 1


# ---- 4 bits --------------------------------------------------------------------------------


@pytest.fixture
def four_bit(seed):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

    def make(compute=torch.float32, quant_type="nf4", bias=True, **config):
        torch.manual_seed(seed)
        linear = bnb.nn.Linear4bit(64, 32, bias=bias, compute_dtype=compute, quant_type=quant_type)
        state = {"weight": torch.randn(32, 64) / 8} | ({"bias": torch.randn(32)} if bias else {})
        linear.load_state_dict(state)
        model = Model(linear.to("cpu"))
        model.is_loaded_in_4bit = True
        model.requires_grad_(False)
        return drawn(peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["linear"], **config)))

    return make


@pytest.mark.parametrize("mode", [nullcontext, autocast])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit(four_bit, mode, compute, given, quant_type, computed):
    model, x = four_bit(compute, quant_type), torch.randn(9, 64).to(given)
    twin = copy.deepcopy(model)
    accelerated = fastpeft.accelerate(model)
    assert len(accelerated.swapped) == 1
    exact = torch.bfloat16 not in (given, compute) and mode is nullcontext
    for _ in range(2):
        assert_close(result(model, x, mode), result(twin, x, mode), 1e-5 if exact else 2e-2)
    assert len(computed) == 2
    accelerated.undo()
    assert type(layer_of(model)) is type(layer_of(twin))
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_4_bit_under_checkpointing(four_bit, reentrant, dropout, seed):
    model = four_bit(torch.float32, lora_dropout=dropout).train()
    fastpeft.accelerate(model)
    twin, x = copy.deepcopy(model), torch.randn(9, 64)

    def again(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)

    torch.manual_seed(seed)
    want = result(twin, x)
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_(True)
    y = again(x)
    y.backward(dy_of(y))
    got = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert_close(got, want)


def test_4_bit_without_gradients_is_bitsandbytes_own(four_bit, computed):
    """It multiplies without dequantising the whole weight."""
    model, x = four_bit().eval(), torch.randn(1, 64)
    want = model(x)
    fastpeft.accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    assert not computed
