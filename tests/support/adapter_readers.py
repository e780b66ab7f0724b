"""Readers of adapters that cannot run in the tests, written anew from what the readers' own sources do.

    vLLM 0.33.0     vllm/lora/peft_helper.py, lora_model.py, utils.py, model_manager.py
    SGLang 0.5.23   sglang/srt/lora/lora_config.py, lora.py, mem_pool.py
    llama.cpp       convert_lora_to_gguf.py and llama_adapter_lora (llama-cpp-python 0.3.36)
    mlx-lm 0.32.2   mlx_lm/tuner/utils.py, lora.py

Each adds an adapter's updates to the weights of a plain transformers model, as it would compute them. What the reader
refuses is a Refused; what it leaves out in silence is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


class Refused(Exception):
    """The reader ends with an error."""


def read(reader: str, folder: Path, base: nn.Module) -> nn.Module:
    """`base` with the adapter in `folder`, by one of READERS."""
    with torch.no_grad():
        READERS[reader](folder, base)
    return base.eval()


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def _add(base: nn.Module, name: str, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float) -> None:
    base.get_submodule(name).get_parameter("weight").data.add_(b_OR @ a_RI, alpha=scale)


def _pairs(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """{module: {A: tensor, B: tensor}}, and what is neither under its full name."""
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", name)
        found[match.group(1) if match else name][match.group(2) if match else ""] = tensor
    return found


# ---- vLLM --------------------------------------------------------------------------------------


def _vllm(folder: Path, base: nn.Module) -> None:
    config = _config(folder)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    heads = [name for name in config.get("modules_to_save") or () if name not in ("classifier", "score")]
    init = config.get("init_lora_weights", True)
    if heads or any(config.get(key) for key in ("use_dora", "lora_bias", "layer_replication", "use_qalora")):
        raise Refused(f"unsupported: {heads}")
    if config.get("bias", "none") != "none" or (isinstance(init, str) and init.lower() not in _PLAIN_INITS):
        raise Refused("bias, or an init that changes the base")
    if max([config["r"], *ranks.values()]) > VLLM_RANKS[-1]:
        raise Refused("max_lora_rank")
    whole: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, factors in _pairs(load_file(folder / "adapter_model.safetensors")).items():
        if "" in factors:
            *_, module, kind = name.split(".")
            if module not in ("classifier", "score") or module not in (config.get("modules_to_save") or ()):
                raise Refused(f"{name} is unsupported LoRA weight")
            whole[module][kind] = factors[""]
            continue
        rank = _by_pattern(ranks, name) or config["r"]
        alpha = _by_pattern(alphas, name) or config["lora_alpha"]
        if factors["A"].shape[0] != rank or config["r"] not in VLLM_RANKS:
            raise Refused(f"{name}: rank {factors['A'].shape[0]}")
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        _add(base, name, factors["A"], factors["B"], scale)
    if len(whole) > 1:
        raise Refused("only one full classification module is supported")
    for module, parameters in whole.items():
        for kind, tensor in parameters.items():
            base.get_submodule(module).get_parameter(kind).data.copy_(tensor)


def _by_pattern(pattern: dict[str, Any], name: str) -> Any:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)


# ---- SGLang ------------------------------------------------------------------------------------


def _sglang(folder: Path, base: nn.Module) -> None:
    config = _config(folder)
    if not isinstance(config["target_modules"], list):
        raise Refused("target_modules is no list")
    scale = config["lora_alpha"] / config["r"]  # neither patterns nor use_rslora are read
    layers: dict[str, dict[str, dict[str, torch.Tensor]]] = defaultdict(dict)
    for name, factors in _pairs(load_file(folder / "adapter_model.safetensors")).items():
        if "" in factors or not re.search(r"\.layers\.\d+\.", f".{name}"):
            continue  # of no layer: nobody asks for it
        parent, _, last = name.rpartition(".")
        layers[parent][last] = factors
    for parent, found in layers.items():
        _check_stacked(found)
        for last, factors in found.items():
            if factors["A"].shape[0] != config["r"]:
                raise Refused(f"LoRA buffer shape does not match weight shape {tuple(factors['A'].shape)}")
            _add(base, f"{parent}.{last}", factors["A"], factors["B"], scale)


def _check_stacked(found: dict[str, dict[str, torch.Tensor]]) -> None:
    """Query, key and value are stacked when the query is seen, gate and up when the gate is; what is missing of key and
    up is zero. Those that are left under their own names find no buffer."""
    if "q_proj" in found and "v_proj" not in found:
        raise Refused("KeyError: v_proj")
    orphans = {"k_proj", "v_proj"} & found.keys() if "q_proj" not in found else set()
    orphans |= {"up_proj"} & found.keys() if "gate_proj" not in found else set()
    if orphans:
        raise Refused(f"cannot find target module name for {sorted(orphans)}")


# ---- llama.cpp ---------------------------------------------------------------------------------


def _llama_cpp(folder: Path, base: nn.Module) -> None:
    config = _config(folder)
    for name, factors in _pairs(load_file(folder / "adapter_model.safetensors")).items():
        if "" in factors:
            raise Refused(f"Unexpected name '{name}': Not a lora_A or lora_B tensor")
        _add(base, name, factors["A"], factors["B"], config["lora_alpha"] / factors["A"].shape[0])


# ---- mlx-lm ------------------------------------------------------------------------------------


def _mlx(folder: Path, base: nn.Module) -> None:
    config = _config(folder)
    if config.get("fine_tune_type", "lora") != "lora":
        raise Refused("only lora is tried here")
    settings = config["lora_parameters"]
    keys, rank = set(settings["keys"]), settings["rank"]
    layers = base.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    allowed = {}
    for i in range(max(0, len(layers) - config["num_layers"]), len(layers)):
        for key, module in layers[i].named_modules():
            if key in keys:
                assert isinstance(module, nn.Linear)
                allowed[f"model.layers.{i}.{key}.lora_a"] = (module.in_features, rank)
                allowed[f"model.layers.{i}.{key}.lora_b"] = (rank, module.out_features)
    tensors = load_file(folder / "adapters.safetensors")
    for name, tensor in tensors.items():
        if allowed.get(name) != tuple(tensor.shape):
            raise Refused(f"{name}: not an adapter parameter in the model, or of another shape")
    for name in tensors:
        if name.endswith(".lora_a"):
            module = name.removesuffix(".lora_a")
            a_IR, b_RO = tensors[name], tensors[f"{module}.lora_b"]
            _add(base, module, a_IR.t(), b_RO.t(), settings["scale"])


READERS = {"vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp, "mlx": _mlx}
