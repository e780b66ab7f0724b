"""The table of kernel choices: what is looked up, where it lies, what a damaged one does."""

from __future__ import annotations

import json
import os

import pytest
import torch

from fastpeft.kernels import dispatch
from fastpeft.kernels.dispatch import Choice, Config

FUSED = Choice("fused", Config(128, 128, 64, 8, 3), {"fused": 10.0, "split": 12.5})


@pytest.mark.parametrize(("num_tokens", "bucket"), [(1, 64), (64, 64), (65, 128), (1000, 1024), (10**6, 65536)])
def test_bucket_is_the_next_power_of_two(num_tokens, bucket):
    assert dispatch.bucket(num_tokens) == bucket


def test_a_table_is_read_as_it_was_written(tmp_path):
    rows = {dispatch.key_of("lora_forward", torch.bfloat16, 768, 3072, 8, 5000): FUSED}
    dispatch.write_table(tmp_path / "deep" / "gpu.json", rows, {"gpu": "X"})
    read = dispatch.read_table(tmp_path / "deep" / "gpu.json")
    assert read == rows
    assert read[("lora_forward", "bfloat16", 768, 3072, 8, 8192)].microseconds == FUSED.microseconds


GOOD = {"key": ["lora_forward", "bfloat16", 768, 768, 8, 64], "form": "fused", "microseconds": {}}
GOOD |= {"config": {"block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3}}
WRONG = [{"key": ["a"]}, {"form": None}, {"microseconds": None}, {"config": [64]}, {"key": [*GOOD["key"][:5], "64"]}]
WRONG += [{"config": GOOD["config"] | {"block_k": size}} for size in (0, -64, "64", 64.0)]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_row_that_no_kernel_can_take_is_refused_where_it_is_read(tmp_path, wrong):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"rows": [GOOD]}))
    assert dispatch.read_table(path)[tuple(GOOD["key"])].config.block_k == 64
    path.write_text(json.dumps({"rows": [GOOD | wrong]}))
    with pytest.raises(ValueError, match=r"gpu\.json is no table of kernel choices"):
        dispatch.read_table(path)


def test_without_a_home_folder_or_the_right_to_enter_it_there_is_no_table_and_no_error(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    real = os.stat

    def stat(path, *args, **options):
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    with monkeypatch.context() as entering:
        entering.setattr(os, "stat", stat)
        assert dispatch.table("NVIDIA X3") == {}

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(dispatch.Path, "home", nowhere)
    assert dispatch.table("NVIDIA X4") == {}
    with pytest.raises(ValueError, match="set HOME or XDG_CACHE_HOME"):
        dispatch.table_path("NVIDIA X4")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": [{"key": 1}]}', '{"rows": [{"key": [], "form": "fused"}]}'])
def test_a_damaged_table_is_named(tmp_path, text):
    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"gpu\.json is no table of kernel choices"):
        dispatch.read_table(tmp_path / "gpu.json")


def test_a_gpu_has_the_table_that_was_measured_on_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = (dispatch.key_of("lora_forward", torch.float16, n, n, 8, 64) for n in (768, 1024))
    rows = {first: Choice("split", None, {"fused": 3.0, "split": 2.0}), second: FUSED}
    dispatch.write_table(dispatch.table_path("NVIDIA X1"), rows, {})
    assert dispatch.table("NVIDIA X1") == rows
    assert dispatch.table("NVIDIA X2") == {}


def test_the_cpu_takes_pytorch_and_the_interpreter_takes_the_kernels(monkeypatch):
    x = torch.zeros(4, 8)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not dispatch.runs_triton(x)
    assert dispatch.choose("lora_forward", x, 8, 8, 4, 4).form == "split"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.runs_triton(x)
    assert not dispatch.runs_triton(x.double())
    assert dispatch.choose("lora_forward", x, 8, 8, 4, 4).form == "fused"


def test_forced_choices_end_with_their_block():
    x = torch.zeros(4, 8)
    with dispatch.forced(FUSED, "lora_forward"), dispatch.forced(Choice("split"), "lora_forward"):
        assert dispatch.choose("lora_forward", x, 8, 8, 4, 4).form == "split"
    with dispatch.forced(FUSED, "lora_forward"):
        assert dispatch.choose("lora_forward", x, 8, 8, 4, 4) is FUSED
        assert dispatch.choose("lora_backward", x, 8, 8, 4, 4).form == "split"
    assert dispatch.choose("lora_forward", x, 8, 8, 4, 4).form == "split"
