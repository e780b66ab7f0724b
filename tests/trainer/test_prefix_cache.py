"""The frozen prefix is left out where its result is known, and gives what it would have given."""

from __future__ import annotations

import re
import signal

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastpeft.data.batches import Batch, TokenRows, pad
from fastpeft.errors import UserError
from fastpeft.models.fast import speed_up
from fastpeft.models.prefix import FrozenPrefix
from fastpeft.trainer import StopRequest, prefix_cache, train
from fastpeft.trainer.prefix_cache import PrefixCache
from tests.support.tiny_runs import Listener, assert_same_outcome, assert_same_weights, tiny_run, weights

CPU, HIDDEN = torch.device("cpu"), 32
SIZES = {"vocab_size": 97, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 0}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "type_vocab_size": 0}
KINDS = {
    "bert": (AutoModelForSequenceClassification, {}, r".*layer\.[23]\..*query"),
    "deberta-v2": (AutoModelForSequenceClassification, DEBERTA, r".*layer\.[23]\..*query_proj"),
    "qwen3": (AutoModelForCausalLM, {"num_key_value_heads": 2, "head_dim": 8}, r".*layers\.[23]\..*q_proj"),
}


def adapted(kind: str, targets: str | None = None) -> tuple[nn.Module, list[str]]:
    auto, more, upper = KINDS[kind]
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, hidden_size=HIDDEN, **SIZES, **more)).eval()
    speed_up(model)
    names = [name for name, _ in model.named_modules() if re.fullmatch(targets or upper, name)]
    return get_peft_model(model, LoraConfig(target_modules=names, init_lora_weights=False)).eval(), names


def token_rows(lengths: list[int]) -> TokenRows:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(0).integers(1, 97, offsets[-1]).astype(np.int32)
    return TokenRows(tokens=tokens, offsets=offsets, pad_token=0, max_length=64)


ROWS = token_rows([9, 4, 12, 7, 7, 3])


def batch(rows: np.ndarray) -> Batch:
    return Batch(pad(ROWS, rows, CPU), torch.zeros(len(rows)), int(ROWS.lengths[rows].sum()))


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.zero_grad()
    logits = model(**inputs).logits
    (logits if logits.ndim == 2 else logits[inputs["attention_mask"].bool()]).square().sum().backward()
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if p.requires_grad])


def cache(tmp_path, prefix: FrozenPrefix, precision: str = "fp32") -> PrefixCache:
    return PrefixCache(tmp_path / "cache", prefix, ROWS, HIDDEN, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_whole_model(kind, precision, tmp_path):
    model, names = adapted(kind)
    part = np.array([0, 3, 5])
    expected = gradients(model, batch(part).inputs)
    prefix = FrozenPrefix(model, names)
    assert prefix.num_layers == 2
    prefix.check(batch(part).inputs)
    kept = cache(tmp_path, prefix, precision)
    for _ in range(2):
        with kept.reading(part, batch(part), batch):
            found = gradients(model, batch(part).inputs)
        assert (found - expected).norm() <= (1e-5 if precision == "fp32" else 2e-2) * expected.norm()
    assert torch.equal(gradients(model, batch(part).inputs), expected), "outside, the whole model is computed"


@pytest.mark.parametrize("kind", KINDS)
def test_lower_layers_are_computed_once_a_row(kind, tmp_path):
    model, names = adapted(kind)
    kept = cache(tmp_path, FrozenPrefix(model, names))
    seen: list[int] = []
    first = next(module for name, module in model.named_modules() if re.search(r"layers?\.0$", name))
    *_, inner = (module for module in first.modules() if isinstance(module, nn.Linear))
    inner.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    for rows in ([0, 1], [2, 3], [1, 2], [4, 0]):
        part = np.array(rows)
        with kept.reading(part, batch(part), batch), torch.no_grad():
            model(**batch(part).inputs)
    assert sum(seen) == 5


def test_rows_are_found_again_by_a_resume(tmp_path, monkeypatch):
    model, names = adapted("bert")
    prefix, part = FrozenPrefix(model, names), np.array([2, 4])
    with cache(tmp_path, prefix).reading(part, batch(part), batch):
        expected = gradients(model, batch(part).inputs)
    monkeypatch.setattr(prefix, "take", lambda inputs: pytest.fail("computed again"))
    with cache(tmp_path, prefix).reading(part, batch(part), batch):
        assert torch.equal(gradients(model, batch(part).inputs), expected)


def test_dropout_reaches_the_upper_layers_only(tmp_path):
    model, names = adapted("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    kept, part = cache(tmp_path, FrozenPrefix(model, names)), np.array([0, 1])
    taken = []
    layer = model.get_base_model().bert.encoder.layer[2]
    layer.register_forward_pre_hook(lambda module, args: taken.append(args[0].clone()))
    model.train()
    logits = []
    for _ in range(2):
        with kept.reading(part, batch(part), batch), torch.no_grad():
            logits.append(model(**batch(part).inputs).logits)
    assert torch.equal(taken[-1], taken[-2])
    assert not torch.equal(*logits)
    assert model.training


@pytest.mark.parametrize("targets", [r".*layer\.[03]\..*query", r".*query"])
def test_an_adapted_first_layer_is_refused(targets):
    model, names = adapted("bert", targets)
    with pytest.raises(UserError, match=r"training\.cache_prefix: the first layer is adapted"):
        FrozenPrefix(model, names)


def test_a_model_that_hands_more_upwards_is_refused(monkeypatch):
    model, names = adapted("bert")
    base = model.get_base_model().bert
    memory = {}
    base.embeddings.register_forward_hook(lambda *_: memory.clear())
    base.encoder.layer[0].output.register_forward_hook(lambda m, a, out: memory.update(first=out))
    base.encoder.layer[3].output.register_forward_hook(lambda m, a, out: out + memory.pop("first", torch.zeros(1)))
    prefix = FrozenPrefix(model, names)
    with pytest.raises(UserError, match="hands more than hidden states"):
        prefix.check(batch(np.array([0, 1])).inputs)


def test_a_full_disk_is_told_before(tmp_path, monkeypatch):
    model, names = adapted("bert")
    usage = prefix_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prefix_cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"training\.cache_prefix fp16: 42 tokens take 0 MB"):
        cache(tmp_path, FrozenPrefix(model, names), "fp16")


# ---- whole runs ------------------------------------------------------------------------------

UPPER = {"target_modules": r".*layer\.1\..*(query|dense)", "rank": 4, "dropout": 0.1}
TWO_EPOCHS = "20steps"


def upper_run(tmp_path, precision=True, **sections):
    return tiny_run(tmp_path, adapter=UPPER, training={"cache_prefix": precision}, budget=TWO_EPOCHS, **sections)


@pytest.mark.parametrize("at", [5, 15])  # in the epoch that fills the cache, and in the one that reads it
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, at):
    whole = train(upper_run(tmp_path), results_dir=tmp_path, name="whole")
    assert whole.status == "done"
    stop = StopRequest()
    listener = Listener(lambda event: event["step"] >= at and setattr(stop, "signal", signal.SIGTERM))
    parts = train(upper_run(tmp_path), results_dir=tmp_path, name="parts", stop=stop, reporter=listener)
    assert (parts.status, at <= parts.steps < 20) == ("stopped", True)
    assert (tmp_path / "parts" / prefix_cache.FOLDER / "states.bin").is_file()
    (begun,) = (event for event in listener.events if event["type"] == "run")
    assert any("what the lowest 1 layers make of the training rows is kept" in note for note in begun["notes"])
    rest = train(None, results_dir=tmp_path, name="parts", resume=True)
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert_same_outcome(whole, rest)
    assert not (tmp_path / "parts" / prefix_cache.FOLDER).exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_with_nothing_below_is_refused(tmp_path, method):
    run = tiny_run(tmp_path, method=method, training={"cache_prefix": True})
    with pytest.raises(UserError, match=r"training\.cache_prefix: the first layer is adapted"):
        train(run, results_dir=tmp_path, name="refused")
    assert not (tmp_path / "refused").exists()
