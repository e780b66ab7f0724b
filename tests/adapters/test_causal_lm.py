"""Every method on causal language models: gradients through the frozen head, and what PEFT and transformers load."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastpeft.adapters import iw_lora, method_class
from fastpeft.config import load_run
from fastpeft.config.methods import METHODS
from fastpeft.errors import UserError
from fastpeft.kernels import linear_cross_entropy, logits_cross_entropy
from fastpeft.models.backbone import load_causal_lm
from fastpeft.models.layers import LoraLinear, SvdLinear
from fastpeft.models.lm_head import hidden_states
from fastpeft.signals import Rates, Signals
from fastpeft.trainer.optim import FlatAdamW
from tests.support.tiny import make_causal_lm

CPU = torch.device("cpu")
WITH_ADAPTER = [name for name in METHODS.names if METHODS.load(name).export_format == "peft"]
LOADED_BY_OTHERS = [name for name in METHODS.names if METHODS.load(name).export_format in ("peft", "transformers")]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "adapter.target_modules": "all-linear",
    "adapter.rank": 4,
    "adalora.initial_rank": 4,
    "adalora.target_rank": 2,
    "regulariser.warmup_steps": 2,
    "unihyperlora.max_extra_flops": 100.0,
    "unihyperlora.budget_weight": 0.0,
    "unihyperlora.delta_weight": 0.0,
    "sat_lora.max_extra_flops": 100.0,
    "training.precision": "fp32",
    "optimizer.weight_decay": 0.0,
    "optimizer.max_grad_norm": 0.0,
}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Widths that blocks of 64 weights divide, as quantisation takes them."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("causal")
    families = {"qwen3": WIDE, "llama": {}, "gpt2": {}}
    return {family: make_causal_lm(home / family, family, **settings) for family, settings in families.items()}


def build(folder, method: str, dtype: torch.dtype = torch.float32, **overrides):
    """(adapter, backbone), in training mode."""
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    run = load_run("lora_mnli", SETTINGS | {"model.name": str(folder), "method": method} | given)
    kind = method_class(method)
    backbone = load_causal_lm(run.model, dtype, CPU, trained=kind.trains_backbone)
    adapter = kind.build(run.adapter, METHODS.own_section(run), backbone)
    adapter.model.train()
    return adapter, backbone, run


def batch(seed: int, num_rows: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels of which the first half is masked as a prompt is."""
    ids = torch.randint(3, 99, (num_rows, length), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100)
    labels[:, length // 2 : -1] = ids[:, length // 2 + 1 :]
    return ids, labels


def backward(adapter, ids, labels) -> torch.Tensor:
    """As a trainer does it, without logits where the head is frozen."""
    adapter.flat.grad.zero_()
    hidden, weight, bias = hidden_states(adapter.model, ids)
    if weight.requires_grad:
        logits = adapter.model(input_ids=ids, use_cache=False).logits
        loss = logits_cross_entropy(logits, labels, reduction="sum").loss
    else:
        loss = linear_cross_entropy(hidden, weight, labels, bias, reduction="sum").loss
    loss.backward()
    return loss.detach()


def train(adapter, run, seed: int, num_steps: int = 3) -> None:
    optimizer = FlatAdamW(adapter.flat, run.optimizer, torch.float32)
    for i in range(num_steps):
        signals = Signals(loss=backward(adapter, *batch(seed + i)), num_tokens=36)
        adapter.after_backward(signals, i / num_steps)
        optimizer.clip_guard_and_update(signals, rates := Rates(lr=1e-2))
        adapter.after_step(signals, rates, i / num_steps)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("method", METHODS.names)
def test_gradients_are_those_of_the_models_own_loss(folders, family, method, seed):
    """Tied heads and untied; the model's own loss shifts the labels itself."""
    adapter, backbone, run = build(folders[family], method)
    assert backbone.head_is_frozen == (method != "full")
    train(adapter, run, seed)  # so that B is not zero
    ids, labels = batch(seed + 9)
    loss = backward(adapter, ids, labels)
    got = adapter.flat.grad.clone()
    adapter.flat.grad.zero_()
    logits = adapter.model(input_ids=ids, use_cache=False).logits
    want_loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="sum")
    want_loss.backward()
    torch.testing.assert_close(loss, want_loss.detach(), rtol=1e-5, atol=1e-5)
    assert float((got - adapter.flat.grad).norm()) <= 1e-5 * float(adapter.flat.grad.norm())
    assert got.any()


@pytest.mark.parametrize("method", WITH_ADAPTER)
def test_what_is_adapted(folders, method):
    adapter, backbone, _ = build(folders["qwen3"], method)
    assert [block.projection for block in adapter.blocks] == PROJECTIONS * 2
    assert {block.layer for block in adapter.blocks} == {0, 1}
    assert {type(block.module) for block in adapter.blocks} == {SvdLinear if method == "adalora" else LoraLinear}
    trained = {name for name, p in adapter.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert adapter.flat.data.numel() == adapter.flat.num_adapter
    assert not backbone.model.get_output_embeddings().weight.requires_grad


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("wanted", ["lm_head", ".*", ["lm_head", "q_proj"], "qv", "attention"])
def test_a_head_is_never_adapted_tied_or_not(folders, family, wanted):
    if "lm_head" in wanted:
        with pytest.raises(UserError, match="down_proj, gate_proj, k_proj"):
            build(folders[family], "lora", adapter__target_modules=wanted)
        return
    adapter, *_ = build(folders[family], "lora", adapter__target_modules=wanted)
    kinds = {"qv": ["q_proj", "v_proj"], "attention": PROJECTIONS[:4], ".*": PROJECTIONS}[wanted]
    assert [block.projection for block in adapter.blocks] == kinds * 2


def test_gpt2_has_no_layer_to_adapt_but_is_trained_whole(folders, seed):
    with pytest.raises(UserError, match="Conv1D layers, which are not adapted; take method full"):
        build(folders["gpt2"], "lora")
    adapter, _, run = build(folders["gpt2"], "full")
    before = adapter.flat.data.clone()
    train(adapter, run, seed, num_steps=1)
    assert not torch.equal(adapter.flat.data, before)


# ---- what is saved -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("method", LOADED_BY_OTHERS)
def test_others_load_what_was_saved(folders, tmp_path, family, method, seed):
    adapter, _, run = build(folders[family], method)
    train(adapter, run, seed)
    (tmp_path / "saved").mkdir()
    adapter.save(tmp_path / "saved")
    ids, _ = batch(seed)
    with torch.inference_mode():
        want = adapter.model.eval()(input_ids=ids).logits
        if method == "full":
            auto = transformers.AutoModelForCausalLM
            model, info = auto.from_pretrained(tmp_path / "saved", output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
        else:
            config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
            assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
            assert config["base_model_name_or_path"] == str(folders[family])
            saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
            assert all(".lora_" in name for name in saved)
            model = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "saved"))
        base = transformers.AutoModelForCausalLM.from_pretrained(folders[family])
        got, before = model.eval()(input_ids=ids).logits, base(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert float((want - before).abs().max()) > 2e-3


def test_a_tied_head_is_trained_and_written_once(folders, tmp_path, seed):
    adapter, _, run = build(folders["qwen3"], "full")
    model = adapter.model
    train(adapter, run, seed, num_steps=1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapter.save(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in saved
    assert torch.equal(saved["model.embed_tokens.weight"], model.lm_head.weight)
    assert sum(t.numel() for t in saved.values()) == adapter.flat.data.numel()
    loaded = load_causal_lm(run.model.__class__(name=str(tmp_path)), torch.float32, CPU).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_full_fine_tuning_computes_in_half_precision(folders):
    """Also where hidden_states goes past the model's forward."""
    adapter, *_ = build(folders["llama"], "full", torch.bfloat16)
    computed = []
    adapter.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, y: computed.append(y.dtype))
    ids, labels = batch(0)
    backward(adapter, ids, labels)
    assert computed == [torch.bfloat16] * 2
    assert not torch.is_autocast_enabled("cpu")
    assert adapter.flat.grad.isfinite().all()


# ---- calibration ---------------------------------------------------------------------------


def sensitivities(adapter, seed: int, num_micro: int = 1, num_batches: int = 2) -> list[float]:
    with adapter.calibrating():
        for i in range(num_batches):
            ids, labels = batch(seed + i, num_rows=4)
            adapter.before_calibration_batch()
            adapter.flat.grad.zero_()
            for rows in torch.arange(4).chunk(num_micro):
                hidden, weight, bias = hidden_states(adapter.model, ids[rows])
                linear_cross_entropy(hidden, weight, labels[rows], bias, reduction="sum").loss.backward()
            adapter.after_calibration_batch(1.0)
    adapter.finish_calibration()
    return adapter.importance().sensitivity


def exact_sensitivities(folder, adapter, seed: int, num_batches: int = 2) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return mean_norms(model, [block.name for block in adapter.blocks], seed, num_batches)


def mean_norms(model, names, seed: int, num_batches: int = 2) -> list[float]:
    weights = [model.get_submodule(name).weight for name in names]
    sums = torch.zeros(len(names), dtype=torch.float64)
    for i in range(num_batches):
        ids, labels = batch(seed + i, num_rows=4)
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="sum")
        sums += torch.stack([g.norm() for g in torch.autograd.grad(loss, weights)])
    return (sums / num_batches).tolist()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("num_micro", [1, 3])
def test_calibration_equals_autograd(folders, family, num_micro, seed):
    adapter, *_ = build(folders[family], "iw_lora")
    got = sensitivities(adapter, seed, num_micro)
    assert got == pytest.approx(exact_sensitivities(folders[family], adapter, seed), rel=1e-4)


@pytest.mark.parametrize("num_micro", [1, 3])
def test_calibration_that_would_hold_too_much_adds_up_as_it_goes(folders, num_micro, seed, monkeypatch):
    monkeypatch.setattr(iw_lora, "HELD_BYTES", 0)
    added = []
    real = iw_lora.weight_gradient
    monkeypatch.setattr(iw_lora, "weight_gradient", lambda x, g: added.append(x.shape) or real(x, g))
    adapter, *_ = build(folders["qwen3"], "iw_lora")
    got = sensitivities(adapter, seed, num_micro)
    assert got == pytest.approx(exact_sensitivities(folders["qwen3"], adapter, seed), rel=1e-4)
    assert len(added) >= len(adapter.blocks)


# ---- 4 bits --------------------------------------------------------------------------------


@pytest.fixture
def four_bit(folders):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    return lambda method, dtype=torch.float32, **overrides: build(
        folders["qwen3"], method, dtype, model__quantisation="nf4", **overrides
    )


def dequantised_model(backbone) -> torch.nn.Module:
    """A plain model with the weights that the 4 bits stand for, in float64."""
    from fastpeft.kernels.ops.lora_linear.quantised import dequantised

    model = transformers.AutoModelForCausalLM.from_pretrained(backbone.model.name_or_path, dtype=torch.float64)
    for name, module in backbone.model.named_modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            weight = dequantised(module.weight, torch.float64)
            model.get_submodule(name.replace(".base_layer", "")).weight.data.copy_(weight)
    return model


def test_4_bit_holds_the_blocks_only(four_bit):
    adapter, backbone, _ = four_bit("lora", torch.bfloat16)
    kinds = {block.projection: type(block.module.base_layer).__name__ for block in adapter.blocks}
    assert kinds == dict.fromkeys(PROJECTIONS, "Linear4bit")
    assert type(backbone.model.lm_head) is torch.nn.Linear
    state = adapter.blocks[0].module.base_layer.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert adapter.blocks[0].module.base_layer.compute_dtype == torch.bfloat16
    assert {type(block.module).__name__ for block in adapter.blocks} == {"LoraLinear4bit"}
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    assert all(block.module.plain_call(x) for block in adapter.blocks if block.module.in_features == 64)
    assert all(p.dtype == torch.float32 for name, p in adapter.model.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize("method", WITH_ADAPTER)
def test_4_bit_trains_as_its_dequantised_weights_do(four_bit, method, tmp_path, seed):
    """After evaluations as well: on some CPUs bitsandbytes would repack the weights, which then pass no gradient."""
    adapter, backbone, run = four_bit(method)
    ids, labels = batch(seed + 9)
    with torch.no_grad():
        adapter.model.eval()(input_ids=ids)
    adapter.model.train()
    train(adapter, run, seed)
    loss = backward(adapter, ids, labels)
    (tmp_path / "saved").mkdir()
    adapter.save(tmp_path / "saved")
    model = peft.PeftModel.from_pretrained(dequantised_model(backbone), str(tmp_path / "saved"), is_trainable=True)
    logits = model.train().double()(input_ids=ids).logits
    want = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="sum")
    assert float(loss) == pytest.approx(float(want.detach()), rel=1e-4)
    if method == "adalora":  # saved as plain LoRA, whose factors are others
        return
    want.backward()
    for block in adapter.blocks:
        theirs = model.base_model.model.get_submodule(block.name)
        for mine, factor in ((block.lora_a, theirs.lora_A), (block.lora_b, theirs.lora_B)):
            gradient = factor["default"].weight.grad
            assert float((mine.grad - gradient).norm()) <= 1e-3 * float(gradient.norm())


def test_calibration_in_4_bits(four_bit, seed):
    adapter, backbone, _ = four_bit("iw_lora")
    got = sensitivities(adapter, seed)
    want = mean_norms(dequantised_model(backbone), [block.name for block in adapter.blocks], seed)
    assert got == pytest.approx(want, rel=1e-3)
