"""Projections of one input: computed together where they are called in turn, and never anything stale or foreign."""

from __future__ import annotations

import copy
import gc
import importlib.util
import weakref

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastpeft
from fastpeft.models import fused_projections as siblings
from fastpeft.models import layers
from tests.support.tiny import causal_model, classifier_model

WIDTH = 6
NAMES = ("q", "k", "v")


class Parent(nn.Module):
    """Runs whatever it is given, as a model's attention would run its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, 5)
        self.k = nn.Linear(WIDTH, 4, bias=False)
        self.v = nn.Linear(WIDTH, 5)

    def forward(self, program, *args):
        return program(self, *args)


def in_turn(parent, x):
    return parent.q(x), parent.k(x), parent.v(x)


@pytest.fixture
def pair(seed):
    """The same adapted Parent twice: PEFT's own, and accelerated."""
    return make_pair(seed)


def make_pair(seed, **config):
    torch.manual_seed(seed)
    plain = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=list(NAMES), **config), Parent())
    for name in NAMES:
        nn.init.normal_(getattr(plain, name).lora_B["default"].weight)
    fused = copy.deepcopy(plain)
    fastpeft.accelerate(fused)
    return plain, fused


@pytest.fixture
def alone(monkeypatch):
    """One entry for each layer that was computed by itself."""
    calls = []
    real = layers.lora_linear

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(layers, "lora_linear", counted)
    return calls


def close(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        assert one.shape == other.shape
        assert float((one - other).detach().norm()) <= 1e-5 * float(other.detach().norm()) + 1e-6


def gradients(parent, program, x):
    x = x.clone().requires_grad_(True)
    parent.zero_grad()
    ys = parent(program, x)
    sum((y * (i + 1)).sin().sum() for i, y in enumerate(ys)).backward()
    return [*(y.detach() for y in ys), x.grad, *(p.grad.clone() for p in parent.parameters() if p.grad is not None)]


# ---- together ------------------------------------------------------------------------------


def test_the_second_run_computes_them_together(pair, grouped, alone):
    plain, fused = pair
    for expected in ([], [3], [3, 3]):
        x = torch.randn(2, 3, WIDTH)
        close(gradients(fused, in_turn, x), gradients(plain, in_turn, x))
        assert grouped == expected
    assert len(alone) == 3


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,)])
def test_only_some_results_are_used(pair, wanted, grouped):
    plain, fused = pair

    def some(parent, x):
        ys = in_turn(parent, x)
        return [ys[i] for i in wanted]

    for _ in range(2):
        x = torch.randn(4, WIDTH)
        for parent in pair:
            parent.zero_grad()
        close(gradients(fused, some, x), gradients(plain, some, x))
        assert [p.grad is None for p in fused.parameters()] == [p.grad is None for p in plain.parameters()]
    assert grouped == [3]


def test_a_result_may_be_changed_in_place(pair, grouped):
    plain, fused = pair

    def scaled(parent, x):
        q = parent.q(x).mul_(3.0)
        return [q, parent.k(x).add_(1.0).sin(), parent.v(x).relu_()]

    for _ in range(2):
        x = torch.randn(4, WIDTH)
        close(gradients(fused, scaled, x), gradients(plain, scaled, x))
    assert grouped == [3]


def test_an_x_made_inside_the_parent(pair, grouped):
    """As behind a norm: nothing else holds it when the parent returns."""
    plain, fused = pair

    def inside(parent, x):
        return in_turn(parent, x * 2)

    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(4, WIDTH)
            close(fused(inside, x), plain(inside, x))
    assert grouped == [3]


def test_deberta_shares_both_inputs(grouped):
    """query_proj and key_proj are called on the relative embeddings too."""
    config = peft.LoraConfig(r=2, target_modules=["query_proj", "key_proj", "value_proj"], init_lora_weights=False)
    model = peft.get_peft_model(classifier_model("deberta-v2"), config).eval()
    ids = torch.randint(5, 30, (2, 7))
    want = model(input_ids=ids).logits
    with fastpeft.accelerate(model):
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)
    assert sorted(grouped) == [2, 2, 3, 3], "for each of two layers"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_decoders_share_in_attention_and_feed_forward(grouped, alone, family):
    model = peft.get_peft_model(
        causal_model(family), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    ids = torch.randint(1, 30, (2, 7))
    want = model(input_ids=ids).logits
    with fastpeft.accelerate(model):
        model(input_ids=ids)
        alone.clear()
        torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
    assert sorted(grouped) == [2, 2, 3, 3]
    assert len(alone) == 4, "o_proj and down_proj of two layers"


def test_a_copy_has_its_own(pair, grouped):
    _, fused = pair
    x = torch.randn(4, WIDTH)
    fused(in_turn, x)
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        for name in NAMES:
            getattr(twin, name).lora_B["default"].weight.mul_(-2)
    want = [getattr(twin, name)(x) for name in NAMES]
    close(twin(in_turn, x), want)
    assert grouped == [3]
    assert twin.q.siblings is twin.k.siblings is not fused.q.siblings


# ---- never anything stale ------------------------------------------------------------------


def change(parent, name, action):
    layer = getattr(parent, name)
    with torch.no_grad():
        if action == "weight":
            layer.base_layer.weight.mul_(1.5)
        elif action == "factor":
            layer.lora_B["default"].weight.add_(1)
        elif action == "replaced":
            layer.lora_A["default"].weight = nn.Parameter(torch.ones(2, WIDTH))
        elif action == "scale":
            layer.scaling["default"] *= 3
        elif action == "disabled":
            layer.enable_adapters(False)
        elif action == "enabled":
            layer.enable_adapters(True)


STEPS = st.one_of(
    st.tuples(st.just("call"), st.sampled_from(NAMES), st.integers(0, 1)),
    st.tuples(st.just("call"), st.sampled_from(NAMES), st.just(0)),
    st.tuples(st.just("in turn"), st.integers(0, 1)),
    st.tuples(st.just("copy"), st.sampled_from(NAMES)),
    st.tuples(st.just("x"), st.integers(0, 1)),
    st.tuples(st.just("change"), st.sampled_from(NAMES), st.sampled_from(
        ["weight", "factor", "replaced", "scale", "disabled", "enabled"])),
    st.tuples(st.just("grad"), st.booleans()),
    st.tuples(st.just("autocast"), st.booleans()),
    st.tuples(st.just("nested"),),
)  # fmt: skip


def run_program(steps):
    def program(parent, *xs):
        ys, autocast = [], False
        with torch.enable_grad():
            for kind, *what in steps:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    if kind == "call":
                        ys.append(getattr(parent, what[0])(xs[what[1]]))
                    elif kind == "in turn":
                        ys.extend(in_turn(parent, xs[what[0]]))
                    elif kind == "copy":
                        ys.append(getattr(parent, what[0])(xs[0].clone()))
                    elif kind == "x":
                        xs[what[0]].mul_(1.5)
                    elif kind == "change":
                        change(parent, *what)
                    elif kind == "grad":
                        torch.set_grad_enabled(what[0])
                    elif kind == "autocast":
                        autocast = what[0]
                    elif kind == "nested":
                        ys.extend(parent(in_turn, xs[0]))
        return ys

    return program


@given(runs=st.lists(st.lists(STEPS, max_size=7), min_size=1, max_size=3), draw=st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_whatever_the_parent_does(runs, draw):
    """After a lesson, runs that keep to it or not, with weights, modes and x changed on the way."""
    plain, fused = make_pair(draw)
    for steps in ([("in turn", 0)], [("in turn", 0), *runs[0]], *runs, [("in turn", 1)], [("in turn", 0)]):
        xs = [torch.randn(3, WIDTH) for _ in range(2)]
        mine = fused(run_program(steps), *(x.clone() for x in xs))
        theirs = plain(run_program(steps), *(x.clone() for x in xs))
        assert [y.dtype for y in mine] == [y.dtype for y in theirs]
        assert [y.requires_grad for y in mine] == [y.requires_grad for y in theirs]
        for one, other in zip(mine, theirs, strict=True):
            half = one.dtype == torch.bfloat16
            torch.testing.assert_close(one, other, rtol=4e-2 if half else 1e-4, atol=1e-1 if half else 1e-4)


def test_a_parent_whose_calls_vary_is_left_alone(pair, grouped):
    _, fused = pair
    x = torch.randn(4, WIDTH)
    for _ in range(10):
        fused(in_turn, x)
        fused(lambda parent, x: [parent.q(x)], x)
    assert len(grouped) == siblings._LESSONS


def test_one_of_them_becomes_another_layer(pair, grouped):
    plain, fused = pair
    x = torch.randn(4, WIDTH)
    fused(in_turn, x)
    for parent in pair:
        parent.k = parent.k.base_layer
    for _ in range(2):
        close(gradients(fused, in_turn, x), gradients(plain, in_turn, x))
    assert grouped == []


def test_an_optimizer_step_between_runs(pair, grouped):
    plain, fused = pair
    optimizers = [torch.optim.SGD(p.parameters(), lr=1e-4) for p in pair]
    for _ in range(5):
        x = torch.randn(4, WIDTH)
        close(gradients(fused, in_turn, x), gradients(plain, in_turn, x))
        for optimizer in optimizers:
            optimizer.step()
    assert grouped == [3] * 4


# ---- nothing is kept -----------------------------------------------------------------------


def only_first(parent, x):
    return [parent.q(x)]


def then_raise(parent, x):
    parent.q(x)
    raise RuntimeError("midway")


@pytest.mark.parametrize("last", [in_turn, only_first, then_raise])
@pytest.mark.parametrize("with_grad", [True, False])
def test_nothing_outlives_the_run(pair, last, with_grad, grouped):
    _, fused = pair
    with torch.set_grad_enabled(with_grad):
        fused(in_turn, torch.randn(4, WIDTH))
        x = torch.randn(4, WIDTH)
        alive = weakref.ref(x)
        try:
            fused(last, x)
        except RuntimeError as error:
            assert str(error) == "midway"  # noqa: PT017
        del x
    gc.collect()
    assert alive() is None
    assert grouped == [3]


def test_after_an_exception_it_goes_on(pair, grouped):
    plain, fused = pair
    x = torch.randn(4, WIDTH)
    fused(in_turn, x)
    with pytest.raises(RuntimeError, match="midway"):
        fused(then_raise, x)
    for _ in range(2):
        close(gradients(fused, in_turn, x), gradients(plain, in_turn, x))
    assert grouped == [3, 3], "the one that broke, and the one after the next lesson"


def test_inference_mode_in_the_midst_of_a_run(pair, grouped):
    plain, fused = pair

    def half(parent, x):
        q = parent.q(x)
        with torch.inference_mode():
            k = parent.k(x * 1)
        return [q, k.clone(), parent.v(x)]

    x = torch.randn(4, WIDTH)
    fused(in_turn, x)
    close(fused(half, x), plain(half, x))
    assert grouped == [3]


def test_outside_of_its_parent_a_layer_is_alone(pair, grouped):
    plain, fused = pair
    x = torch.randn(4, WIDTH)
    fused(in_turn, x)
    close(in_turn(fused, x), in_turn(plain, x))
    assert grouped == []


# ---- another torch -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["torch._C._current_graph_task_id", "torch._C._autograd._top_saved_tensors_default_hooks"]
)
def test_a_torch_that_cannot_be_asked_is_not_grouped(pair, grouped, monkeypatch, name):
    plain, fused = pair
    monkeypatch.delattr(name)
    for _ in range(2):
        x = torch.randn(4, WIDTH)
        close(gradients(fused, in_turn, x), gradients(plain, in_turn, x))
    assert grouped == []


def test_layers_load_in_a_torch_without_transforms(monkeypatch):
    spec = importlib.util.spec_from_file_location("other_layers", layers.__file__)
    other = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.delattr(torch._C, "_are_functorch_transforms_active")
        spec.loader.exec_module(other)
    model = nn.Sequential(nn.Linear(WIDTH, 3))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
    model[0].__class__ = other.LoraLinear
    assert model[0].plain_call(torch.randn(2, WIDTH)) is not None


# ---- checkpointing -------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_repeats_the_same(seed, reentrant, dropout):
    """The first repetition comes when there was one lesson, later ones when there is nothing left to learn."""
    _, fused = make_pair(seed, lora_dropout=dropout)
    fused.train()
    twin = copy.deepcopy(fused)
    torch.manual_seed(seed)

    def again(parent, x):
        return torch.utils.checkpoint.checkpoint(lambda x: parent(in_turn, x), x, use_reentrant=reentrant)

    def outer(program, parent, x):
        state = torch.get_rng_state()
        x = x.clone().requires_grad_(True)
        parent.zero_grad()
        sum(y.sin().sum() for y in program(parent, x)).backward()
        torch.set_rng_state(state)
        return [x.grad, *(p.grad.clone() for p in parent.parameters() if p.grad is not None)]

    for _ in range(4):
        x = torch.randn(4, WIDTH)
        close(outer(again, fused, x), outer(lambda parent, x: parent(in_turn, x), twin, x))
