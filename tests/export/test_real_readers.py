"""Exports read by the real readers, each in an environment of its own.

    python -m pytest -m soak --timeout 7200 -s tests/export/test_real_readers.py

What cannot be installed is skipped. vLLM and SGLang need a GPU: tests/support/adapter_readers.py has their rules.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from fastpeft.adapters import Adapter
from fastpeft.export.plan import make_plan
from fastpeft.export.rope_keys import add_rope_keys
from fastpeft.export.write import export
from fastpeft.models.inject import ADAPTER_NAME
from fastpeft.runs.store import RunFolder, read_json
from tests.support.causal_runs import IDS, PATTERNS, READER_CASES, base_of, make_reader_runs, wanted_of, write_problems
from tests.support.environments import python_with, run
from tests.support.exported_runs import CASES as ENCODERS
from tests.support.exported_runs import Trained
from tests.support.rotary_models import ROTARY, auto_class, make_rotary

pytestmark = pytest.mark.soak
SUPPORT = Path(__file__).parents[1] / "support"
TORCH = "torch==2.13.0"
TRANSFORMERS = {
    "4.57.6": (TORCH, "transformers==4.57.6 peft==0.21.2"),
    "5.24.0": (TORCH, "transformers==5.24.0 peft==0.21.2"),
}
MLX = ("mlx-lm==0.32.2 mlx[cpu]==0.32.4",)
LLAMA_CPP = "llama-cpp-python==0.3.36"
GGUF = (TORCH, "transformers==5.24.0 numpy pyyaml requests tqdm sentencepiece protobuf")
TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def causal_home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real_readers")
    write_problems(folder / "problems")
    return folder


@pytest.fixture(scope="session")
def causal(causal_home) -> dict[str, Adapter]:
    runs = make_reader_runs(causal_home)
    for case in READER_CASES:
        complete(causal_home / "models" / case)
    return runs


def complete(folder: Path) -> None:
    """As the folders of the hub are, most of which an older transformers has saved."""
    file = folder / "config.json"
    file.write_text(json.dumps(add_rope_keys(read_json(file) or {})))


def job(model: Path, adapter: Path | None = None, auto: str = "AutoModelForCausalLM", **more: Any) -> dict[str, Any]:
    ids = more.pop("ids", IDS.tolist())
    return {"model": str(model), "adapter": adapter and str(adapter), "auto": auto, "ids": ids, **more}


def logits_of(child: str, python: Path, jobs: dict[str, dict[str, Any]], folder: Path) -> dict[str, np.ndarray]:
    """What each job's model answers in the other environment."""
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    run(python, SUPPORT / child, folder / "jobs.json", folder / "out.npz")
    with np.load(folder / "out.npz") as found:
        return {name: found[str(i)] for i, name in enumerate(jobs)}


def assert_same(reader: str, found: dict[str, np.ndarray], wanted: dict[str, torch.Tensor]) -> None:
    """Prints every difference before it fails."""
    wrong = []
    for name, logits in found.items():
        difference = np.abs(logits - wanted[name].numpy()).max() if logits.dtype.kind == "f" else logits
        print(f"{reader}, {name}: {difference if logits.dtype.kind != 'f' else f'{difference:.1e}'}")
        if logits.dtype.kind != "f" or not difference < TOLERANCE:
            wrong.append(name)
    assert not wrong


# ---- transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", TRANSFORMERS)
def test_transformers_reads_what_was_trained(version, causal, causal_home, tmp_path):
    python = python_with(*TRANSFORMERS[version])
    jobs = {}
    for case in READER_CASES:
        for merge in (False, True):
            out = tmp_path / f"{case}-{merge}"
            export(make_plan(case, results_dir=causal_home / "results", to=out, merge=merge))
            base = causal_home / "models" / case
            jobs[f"{case}, {'merged' if merge else 'PEFT'}"] = job(
                out if merge else base, None if merge else out, text="Ann has 3 apples."
            )
    wanted = {name: wanted_of(name.partition(",")[0], causal_home, causal) for name in jobs}
    assert_same(version, logits_of("child_transformers.py", python, jobs, tmp_path), wanted)


@pytest.mark.parametrize("version", TRANSFORMERS)
def test_transformers_reads_classifiers(version, trained: dict[str, Trained], home, tmp_path):
    python = python_with(*TRANSFORMERS[version])
    ids = [[2, 7, 8, 9, 3, 6, 5, 3]]
    jobs = {}
    for case in ENCODERS:
        out = tmp_path / case
        export(make_plan(case, results_dir=home / "results", to=out, merge=True, weights="last"))
        jobs[case] = job(out, auto="AutoModelForSequenceClassification", ids=ids, text="the dog ran")
    with torch.no_grad():
        wanted = {case: trained[case].job.adapter.model.eval()(input_ids=torch.tensor(ids)).logits for case in jobs}
    assert_same(version, logits_of("child_transformers.py", python, jobs, tmp_path), wanted)


@pytest.mark.parametrize("version", TRANSFORMERS)
def test_transformers_reads_the_rotary_settings_of_a_merged_model(version, tmp_path):
    python = python_with(*TRANSFORMERS[version])
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))  # over each window and old length
    jobs, wanted = {}, {}
    for name in ROTARY:
        folder = tmp_path / name.replace(", ", "-").replace(" ", "-")
        model = make_rotary(name, folder)
        complete(folder)
        with torch.no_grad():
            wanted[name] = model(input_ids=ids).logits
        jobs[name] = job(folder, auto=auto_class(name), ids=ids.tolist())
    make_rotary("llama", tmp_path / "bare")
    jobs["bare"] = job(tmp_path / "bare", ids=ids.tolist())
    found = logits_of("child_transformers.py", python, jobs, tmp_path)
    apart = np.abs(found.pop("bare") - wanted["llama"].numpy()).max()
    assert_same(version, found, wanted)
    assert (apart > 0.1) == version.startswith("4.")  # what transformers 5 saves is read wrongly there, in silence


# ---- mlx-lm ------------------------------------------------------------------------------------


def test_mlx_lm_reads_what_was_trained(causal, causal_home, tmp_path):
    python = python_with(*MLX)
    jobs = {}
    for case in READER_CASES:
        for merge in (False, True):
            out = tmp_path / f"{case}-{merge}"
            export(make_plan(case, results_dir=causal_home / "results", to=out, merge=merge, reader="mlx"))
            base = causal_home / "models" / case
            jobs[f"{case}, {'merged' if merge else 'adapter'}"] = job(out if merge else base, None if merge else out)
    wanted = {name: wanted_of(name.partition(",")[0], causal_home, causal) for name in jobs}
    assert_same("mlx-lm", logits_of("child_mlx.py", python, jobs, tmp_path), wanted)


# ---- llama.cpp ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def converter(tmp_path_factory) -> tuple[Path, Path]:
    """An interpreter, and the folder of llama.cpp's scripts out of llama-cpp-python's source archive."""
    python, folder = python_with(*GGUF), tmp_path_factory.mktemp("llama_cpp")
    try:
        options = ("--quiet", "--no-deps", "--no-binary", LLAMA_CPP.partition("==")[0], "--dest", folder)
        run(sys.executable, "-m", "pip", "download", *options, LLAMA_CPP)
    except Exception as error:
        pytest.skip(f"{LLAMA_CPP} cannot be had: {error}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (scripts,) = folder.glob("*/vendor/llama.cpp")
    return python, scripts


NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


@pytest.mark.parametrize("case", READER_CASES)
def test_llama_cpps_converter_keeps_what_was_trained(case, causal, causal_home, converter, tmp_path):
    python, scripts = converter
    export(make_plan(case, results_dir=causal_home / "results", to=tmp_path / "out", reader="llama.cpp"))
    base, file = causal_home / "models" / case, tmp_path / "adapter.gguf"
    command = ("convert_lora_to_gguf.py", "--base", base, "--outfile", file, "--outtype", "f32", tmp_path / "out")
    run(python, scripts / command[0], *command[1:])
    run(python, SUPPORT / "child_gguf.py", file, tmp_path / "out.npz", env={"PYTHONPATH": str(scripts / "gguf-py")})
    wanted = updates_of(case, causal, causal_home)
    with np.load(tmp_path / "out.npz") as found:
        seen = set()
        for name in (n for n in found.files if n.endswith(".lora_a")):
            _, block, kind, *_ = name.split(".")
            a_RI, b_OR = found[name], found[name.removesuffix("a") + "b"]
            module = f"model.layers.{block}.{NAMES[kind]}"
            update = found["alpha"] / b_OR.shape[1] * b_OR @ a_RI
            rotated = kind in ("attn_q", "attn_k") and "qwen" not in case
            expected = rotated_rows(wanted[module], 4 if kind == "attn_q" else 2) if rotated else wanted[module]
            np.testing.assert_allclose(update, expected, rtol=0, atol=1e-6)
            seen.add(module)
    assert {name for name, update in wanted.items() if update.any()} <= seen


def updates_of(case: str, causal: dict[str, Adapter], home: Path) -> dict[str, np.ndarray]:
    """s B A by module, as PEFT computes it."""
    folder = RunFolder.at(home / "results", case).weights("adapter")
    model: Any = peft.PeftModel.from_pretrained(base_of(case, home), str(folder))
    layers = model.get_base_model().named_modules()
    return {
        name: layer.get_delta_weight(ADAPTER_NAME).detach().numpy()
        for name, layer in layers
        if isinstance(layer, LoraLayer)
    }


def rotated_rows(update: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows: the two halves of each head are interleaved."""
    rows, columns = update.shape
    return update.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def test_the_form_that_peft_reads_would_be_wrong_there(causal, causal_home, converter, tmp_path):
    """Or the test above would pass without anything done: patterns and the rank-stabilised scale are ignored."""
    python, scripts = converter
    export(make_plan(PATTERNS, results_dir=causal_home / "results", to=tmp_path / "out"))
    base, file = causal_home / "models" / PATTERNS, tmp_path / "adapter.gguf"
    run(python, scripts / "convert_lora_to_gguf.py", "--base", base, "--outfile", file, tmp_path / "out")
    run(python, SUPPORT / "child_gguf.py", file, tmp_path / "out.npz", env={"PYTHONPATH": str(scripts / "gguf-py")})
    wanted = updates_of(PATTERNS, causal, causal_home)["model.layers.0.mlp.up_proj"]
    with np.load(tmp_path / "out.npz") as found:
        a_RI, b_OR = (found[f"blk.0.ffn_up.weight.lora_{letter}"] for letter in "ab")
        assert np.abs(found["alpha"] / b_OR.shape[1] * b_OR @ a_RI - wanted).max() > 0.01
