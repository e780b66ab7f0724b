"""fastpeft.accelerate: losses and gradients of PEFT, adapters that PEFT reads, and nothing left when it is undone."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn

import fastpeft
from fastpeft.errors import UserError
from fastpeft.models import layers
from fastpeft.models.layers import LoraLinear
from tests.support.tiny import causal_model, classifier_model

TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "llama": "all-linear",
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
CAUSAL = ("llama", "qwen3")


def make(family, sizes=None, **config):
    """The same model in every call: its base by seed 0, its factors by seed 1."""
    base = (causal_model if family in CAUSAL else classifier_model)(family, **(sizes or {}))
    task = "CAUSAL_LM" if family in CAUSAL else "SEQ_CLS"
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type=task, target_modules=TARGETS[family], **config))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3 if ".lora_B." in name else 0.2)
    return model.eval()


def batch(family, seed=0, rows=3, columns=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 25, (rows, columns), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100) if family in CAUSAL else ids.sum(1) % 3
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(mine, theirs, limit=1e-4):
    (loss, gradients), (want, wanted) = mine, theirs
    assert abs(float(loss - want)) <= limit * max(1.0, abs(float(want)))
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert float((gradient - wanted[name]).norm()) <= limit * float(wanted[name].norm()) + 1e-6, name


@pytest.fixture
def computed(monkeypatch):
    """Counts the layers that the kernels compute, together or alone."""
    from fastpeft.models import fused_projections as siblings

    counts = {"layers": 0}
    alone, together = layers.lora_linear, siblings.lora_linear_grouped

    def counted_alone(*args, **kwargs):
        counts["layers"] += 1
        return alone(*args, **kwargs)

    def counted_together(x, weights, *args, **kwargs):
        counts["layers"] += len(weights)
        return together(x, weights, *args, **kwargs)

    monkeypatch.setattr(layers, "lora_linear", counted_alone)
    monkeypatch.setattr(siblings, "lora_linear_grouped", counted_together)
    return counts


# ---- one step ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TARGETS)
def test_a_step_is_pefts(family, computed):
    model = make(family)
    want = loss_and_gradients(model, batch(family))
    accelerated = fastpeft.accelerate(model)
    for run in (1, 2, 3):
        assert_same(loss_and_gradients(model, batch(family)), want)
        shared = 2 * 2 if family == "deberta-v2" else 0  # query and key once more, on the relative embeddings
        assert computed["layers"] == run * (len(accelerated.swapped) + shared)


def assert_no_further_from(exact, theirs, mine):
    """Of two results in half precision: about as near to fp32's as PEFT's is; single batches differ by up to 2.4."""

    def error(result):
        differences = [result[1][name].float() - gradient for name, gradient in exact[1].items()]
        return float(torch.cat([d.flatten() for d in differences]).norm())

    size = float(torch.cat([g.flatten() for g in exact[1].values()]).norm())
    assert mine[1].keys() == exact[1].keys()
    assert 0 < error(theirs) < 0.1 * size
    assert error(mine) <= 4 * error(theirs)
    assert abs(float(mine[0] - exact[0])) <= 5e-2 * float(exact[0])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_half_precision_weights(family, computed):
    """The usual case on a GPU: frozen weights in bf16, factors in fp32."""
    model = make(family)
    whole = [p for name, p in model.named_parameters() if ".lora_" not in name]
    for parameter in whole:
        parameter.data = parameter.data.bfloat16().float()
    exact = loss_and_gradients(model, batch(family))
    for parameter in whole:
        parameter.data = parameter.data.bfloat16()
    theirs = loss_and_gradients(model, batch(family))
    accelerated = fastpeft.accelerate(model)
    for _ in range(2):
        mine = loss_and_gradients(model, batch(family))
        assert all(g.dtype == torch.float32 for n, g in mine[1].items() if "lora_" in n)
        assert_no_further_from(exact, theirs, mine)
    assert computed["layers"] == 2 * len(accelerated.swapped)


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_autocast(family, backward_inside, computed):
    model = make(family)
    exact = loss_and_gradients(model, batch(family))

    def step():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch(family))
            if backward_inside:
                output.loss.backward()
        if not backward_inside:
            output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return (output.loss.detach(), gradients), output.logits.dtype

    theirs, dtype = step()
    accelerated = fastpeft.accelerate(model)
    for _ in range(2):
        mine, mine_dtype = step()
        assert_no_further_from(exact, theirs, mine)
        assert mine_dtype == dtype
    assert computed["layers"] == 2 * len(accelerated.swapped)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_gradient_checkpointing(family, dropout, reentrant, seed):
    model = make(family, lora_dropout=dropout).train()
    fastpeft.accelerate(model)
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    twin.enable_input_require_grads()
    for step in range(3):
        results = []
        for one in (model, twin):
            torch.manual_seed(seed + step)
            results.append(loss_and_gradients(one, batch(family, step)))
        assert_same(results[1], results[0])


def test_compiled(seed):
    """Whole, without a break in the graph."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0", "2"]), module)
    nn.init.normal_(model[2].lora_B["default"].weight)
    x = torch.randn(3, 6)

    def gradients(run):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    want = gradients(model)
    with fastpeft.accelerate(model):
        got = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.soak
def test_compiled_without_and_with_gradients(seed):
    """One graph each, where siblings have learnt to be computed together too."""
    torch._dynamo.reset()
    model, inputs = make("bert", {"num_hidden_layers": 1}), batch("bert", seed)
    with torch.no_grad():
        logits = model(**inputs).logits
    loss, gradients = loss_and_gradients(model, inputs)
    with fastpeft.accelerate(model):
        for _ in range(2):
            model(**inputs)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, logits)
        got, got_gradients = loss_and_gradients(compiled, inputs)
    torch.testing.assert_close(got, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(got_gradients[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-5)


# ---- a training run ------------------------------------------------------------------------


def train(model, family, folder, steps=20):
    rows = [{name: tensor[0] for name, tensor in batch(family, i, rows=1).items()} for i in range(40)]
    settings = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-3, seed=7,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hf_trainer(family, tmp_path, computed):
    """20 steps through transformers' Trainer, with PEFT's layers and with these: losses, adapters, what is left."""
    plain, model = make(family), make(family)
    before = plain(**batch(family)).logits
    want = train(plain, family, tmp_path)
    with fastpeft.accelerate(model) as accelerated:
        got = train(model, family, tmp_path)
        assert computed["layers"] == 20 * len(accelerated.swapped)
        model.eval()
        computed["layers"] = 0
        model.save_pretrained(tmp_path / "mine")
    plain.eval().save_pretrained(tmp_path / "theirs")
    assert len(got) == len(want) == 20
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert abs(want[0] - want[-1]) > 0.01
    assert not torch.allclose(plain(**batch(family)).logits, before)

    base = causal_model if family in CAUSAL else classifier_model
    logits = [model(**batch(family)).logits]
    for adapter in ("mine", "theirs"):
        loaded = peft.PeftModel.from_pretrained(base(family), str(tmp_path / adapter)).eval()
        logits.append(loaded(**batch(family)).logits)
        fastpeft.accelerate(loaded)
        torch.testing.assert_close(loaded(**batch(family)).logits, logits[-1], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits[0], logits[1]), "the undone model is PEFT's, to the bit"
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-2, atol=1e-2)


# ---- in and out ----------------------------------------------------------------------------


def modules_of(model):
    return {
        name: (type(m), len(m._forward_hooks), len(m._forward_pre_hooks), set(m.__dict__))
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("family", TARGETS)
def test_undo_leaves_nothing(family):
    model = make(family)
    before, want = modules_of(model), model(**batch(family))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerated = fastpeft.accelerate(model)
    assert {type(m) for m in model.modules() if isinstance(m, PeftLoraLinear)} == {LoraLinear}
    loss_and_gradients(model, batch(family))
    assert list(model.state_dict()) == list(state)
    accelerated.undo()
    assert modules_of(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**batch(family)).logits, want.logits)
    accelerated.undo()
    assert modules_of(model) == before


def test_the_second_call_swaps_nothing_and_undoes_nothing():
    model = make("llama")
    before = modules_of(model)
    first = fastpeft.accelerate(model)
    hooked = modules_of(model)
    with fastpeft.accelerate(model) as second:
        assert (len(first.swapped), second.swapped) == (14, [])
        assert second.already == first.swapped
        assert repr(second) == "Accelerated(0 LoRA layers swapped; 14 swapped before)"
    assert modules_of(model) == hooked
    first.undo()
    assert modules_of(model) == before


def test_a_with_block_that_fails_is_undone():
    model = make("bert")
    before = modules_of(model)
    with pytest.raises(KeyError), fastpeft.accelerate(model):
        raise KeyError
    assert modules_of(model) == before


def test_layers_that_come_later():
    """Another adapter on other layers: a second call takes those, and both are undone in either order."""
    for order in (0, 1):
        model = make("llama")
        model.delete_adapter("default")
        model.add_adapter("first", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        model.set_adapter("first")
        one = fastpeft.accelerate(model)
        want = model(**batch("llama")).loss.detach()
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
        two = fastpeft.accelerate(model)
        assert (len(two.already), len(two.swapped), len(two.kept)) == (4, 2, 8)
        assert set(two.kept.values()) == {"the layer has no adapter"}
        for _ in range(2):
            torch.testing.assert_close(model(**batch("llama")).loss.detach(), want, rtol=1e-4, atol=1e-5)
        for accelerated in (one, two)[:: 1 if order else -1]:
            accelerated.undo()
            torch.testing.assert_close(model(**batch("llama")).loss.detach(), want, rtol=1e-4, atol=1e-5)
        assert not any(isinstance(m, LoraLinear) or m._forward_hooks for m in model.modules())


def test_merging_switching_and_copying(computed):
    model = make("llama")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    inputs = batch("llama")

    def everything(model):
        found = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            found[name] = model(**inputs).logits
            with model.disable_adapter():
                found[f"{name} off"] = model(**inputs).logits
        model.merge_adapter()
        found["merged"] = model(**inputs).logits
        model.unmerge_adapter()
        model.set_adapter("default")
        found["copy"] = copy.deepcopy(model)(**inputs).logits
        found["unloaded"] = copy.deepcopy(model).merge_and_unload()(**inputs).logits
        return found

    want = everything(model)
    assert computed["layers"] == 0
    fastpeft.accelerate(model)
    for name, logits in everything(model).items():
        torch.testing.assert_close(logits, want[name], rtol=1e-3, atol=1e-4, msg=name)
    assert computed["layers"] == 3 * 14, "default, other, and the copy"


def test_a_plain_module_with_adapters_in_it():
    module = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    accelerated = fastpeft.accelerate(module)
    assert accelerated.swapped == ["0"]
    assert repr(accelerated) == "Accelerated(1 LoRA layers swapped)"


@pytest.mark.parametrize("model", [nn.Linear(3, 3), causal_model(), "a name", None])
def test_a_model_without_lora(model):
    with pytest.raises(UserError, match="accelerate: ") as error:
        fastpeft.accelerate(model)
    assert type(model).__name__ in str(error.value)


def test_it_needs_nothing_but_torch_and_peft():
    """Where the package is not installed, as on a machine with no index, the rest may be missing."""
    code = (
        "import sys\n"
        "for name in ('pydantic', 'datasets', 'textual', 'optuna', 'wandb', 'typer'): sys.modules[name] = None\n"
        "import peft, fastpeft, torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=['0']), model)\n"
        "print(fastpeft.accelerate(model), model(torch.zeros(2, 4)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.stdout == "Accelerated(1 LoRA layers swapped) torch.Size([2, 4])\n", done.stderr
