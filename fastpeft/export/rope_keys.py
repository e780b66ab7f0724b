"""The rotary settings of a saved model where readers other than transformers 5 look for them.

transformers 5 writes them as `rope_parameters` alone. transformers 4 and mlx-lm do not know that key, and take their
default, a theta of 10,000 without scaling, in silence.
"""

from __future__ import annotations

from typing import Any

_THETA = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
_SHARE = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
"""Of models that had names of their own for rope_theta and partial_rotary_factor."""
_BY_LAYER = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}
"""Of models whose settings differ by the kind of layer: theta under full, and under sliding attention."""


def add_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the older keys beside `rope_parameters`, at its top level and in each model inside it.

    What is there already stays. transformers 5 reads the result as it read `config`.
    """
    config = {key: add_rope_keys(value) if _is_model(value) else value for key, value in config.items()}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    kind = config.get("model_type", "")
    if "rope_theta" in rope:
        return _flat(kind, rope) | config
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if kind not in _BY_LAYER or not full or not sliding:
        return config
    thetas = dict(zip(_BY_LAYER[kind], (full["rope_theta"], sliding["rope_theta"])))
    return thetas | (_scaling(kind, full) if kind.startswith("gemma3") else {}) | config


def missing_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What `add_rope_keys` adds at the top level."""
    return {key: value for key, value in add_rope_keys(config).items() if key not in config}


def _is_model(value: Any) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _flat(kind: str, rope: dict[str, Any]) -> dict[str, Any]:
    keys = {_THETA.get(kind, "rope_theta"): rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        keys[_SHARE.get(kind, "partial_rotary_factor")] = rope["partial_rotary_factor"]
    return keys | _scaling(kind, rope)


def _scaling(kind: str, rope: dict[str, Any]) -> dict[str, Any]:
    """rope_scaling, where there is any. It has to be whole: transformers 5 takes it in the place of rope_parameters."""
    if rope.get("rope_type", "default") == "default":
        return {}
    if kind == "phi3":  # transformers 4 takes these three keys and no others
        return {"rope_scaling": {"type": rope["rope_type"]} | {k: rope[k] for k in ("short_factor", "long_factor")}}
    beside = ("rope_theta", "partial_rotary_factor")
    return {"rope_scaling": {key: value for key, value in rope.items() if key not in beside}}
