"""What a run computes in: measured where it is left open, and a slower choice of the user's is said."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from fastpeft.config.schema import ModelConfig
from fastpeft.models import precision
from fastpeft.models.backbone import layer_shape
from fastpeft.models.precision import choose_precision, slowdown
from tests.support.tiny import make_causal_lm, make_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def wide() -> tuple[int, int]:
    return 1024, 3072


def of_ratio(ratio: float, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Measurements find this ratio. Returns what they were of."""
    asked: list[torch.dtype] = []

    def found(dtype: torch.dtype, device: torch.device, shape: tuple[int, int]) -> float:
        asked.append(dtype)
        return ratio

    monkeypatch.setattr(precision, "slowdown", found)
    return asked


# ---- auto ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "dtype", "name", "figure"),
    [
        (0.25, torch.bfloat16, "bf16", "0.25"),
        (0.95, torch.float32, "fp32", "0.95"),
        (21.4, torch.float32, "fp32", "21"),
    ],
)
def test_auto_is_bf16_only_where_it_is_clearly_faster(ratio, dtype, name, figure, monkeypatch):
    asked = of_ratio(ratio, monkeypatch)
    chosen = choose_precision("auto", CPU, wide)
    assert (chosen.dtype, chosen.ratio, chosen.warning) == (dtype, ratio, "")
    assert chosen.note == (
        f"precision auto is {name}: a product of 64 x 1024 x 3072 takes {figure} times as long in bf16 as in fp32 on "
        "this processor, measured"
    )
    assert asked == [torch.bfloat16]


def test_what_a_processor_says_it_has_plays_no_part(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_bf16": True}, raising=False)
    of_ratio(3.0, monkeypatch)
    assert choose_precision("auto", CPU, wide).dtype == torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype", "words"),
    [((9, 0), torch.bfloat16, "has native bf16"), ((7, 0), torch.float32, "has no native bf16")],
)
def test_auto_on_a_gpu_is_bf16_where_it_is_native(capability, dtype, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(precision, "slowdown", None)
    chosen = choose_precision("auto", GPU, wide)
    assert chosen.dtype == dtype
    assert words in chosen.note


# ---- asked for -------------------------------------------------------------------------------


def test_fp32_measures_nothing(monkeypatch):
    monkeypatch.setattr(precision, "slowdown", None)
    assert choose_precision("fp32", CPU, lambda: pytest.fail("not needed")).dtype == torch.float32


@pytest.mark.parametrize(("asked", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_slower_precision_is_kept_with_a_warning_that_says_what_to_change(asked, dtype, monkeypatch):
    assert of_ratio(18.3, monkeypatch) == []
    chosen = choose_precision(asked, CPU, wide)
    assert chosen.dtype == dtype
    assert chosen.warning == (
        f"training.precision is {asked}, which is slower here: a product of 64 x 1024 x 3072 takes 18 times as long in "
        f"{asked} as in fp32 on this processor, measured. Set training.precision=auto"
    )


@pytest.mark.parametrize("ratio", [0.3, 1.05])
def test_one_that_is_not_slower_is_no_warning(ratio, monkeypatch):
    of_ratio(ratio, monkeypatch)
    assert choose_precision("bf16", CPU, wide) == precision.Precision(torch.bfloat16, ratio=ratio)


# ---- measuring -------------------------------------------------------------------------------


def test_the_ratio_is_of_the_best_of_several_taken_in_turns(monkeypatch):
    """A machine that is busy for a while slows both down, and the noise of single products plays no part."""
    taken = []

    def times(dtype, device, shape):
        own = 0.002 if dtype == torch.float32 else 0.003
        for i in itertools.count():
            taken.append(dtype)
            yield own * (10 if i < 5 else 1) * (1 + (i % 3))

    monkeypatch.setattr(precision, "_times", times)
    monkeypatch.setattr(precision, "MEASURE_S", 0.01)
    assert slowdown(torch.bfloat16, CPU, (8, 8)) == pytest.approx(1.5)
    assert taken[:4] == [torch.float32, torch.bfloat16] * 2


def test_a_real_measurement_takes_little_time():
    began = time.perf_counter()
    ratio = slowdown(torch.float32, CPU, (64, 256))
    assert time.perf_counter() - began < 5
    assert 0.2 < ratio < 5  # of fp32 over itself


def test_large_layers_are_measured_in_part(monkeypatch):
    shapes = []
    monkeypatch.setattr(precision, "slowdown", lambda dtype, device, shape: shapes.append(shape) or 2.0)
    choose_precision("auto", CPU, lambda: (8192, 28672))
    assert shapes == [(1024, 4096)]


# ---- the shape -------------------------------------------------------------------------------


def test_the_shape_is_that_of_the_models_own_layers(tmp_path):
    make_model(tmp_path / "bert", "bert", hidden_size=24, intermediate_size=40)
    assert layer_shape(ModelConfig(name=str(tmp_path / "bert"))) == (24, 40)
    make_causal_lm(tmp_path / "gpt2", "gpt2", n_embd=32)  # other names, n_embd and n_inner
    assert layer_shape(ModelConfig(name=str(tmp_path / "gpt2"))) == (32, 48)


def test_a_config_that_names_no_width_has_the_usual_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    assert layer_shape(ModelConfig(name=str(tmp_path))) == (768, 3072)
