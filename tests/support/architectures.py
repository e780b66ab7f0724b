"""Every architecture of transformers that builds from a tiny config, through the trainer and beside itself.

    python tests/support/architectures.py causal|classifier [NAME ...]

A model is built at random, saved, and set up as a run of LoRA, or of full fine-tuning where it has no linear layers.
What the trainer computes is then compared with the plain model of transformers, one unpadded row at a time: the loss of
a batch, and the tokens that are decoded, or the logits that validation rows get. A row of the table is `right`,
`slower` (right in a way that the run names), `refused` (with the reason), or `WRONG`. `lacks` is no row: it needs more
than a tiny config.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import yaml
from torch import nn

from fastpeft.config import load_run
from fastpeft.data.batches import micro_batches
from fastpeft.errors import UserError, first_line
from fastpeft.tasks.causal_lm.generate import DecodeOptions, decode
from fastpeft.tasks.sequences.scoring import answer_rows
from fastpeft.trainer.build import Job, build_job
from tests.support.problem_runs import write_problems
from tests.support.tiny import save_character_tokenizer, save_tokenizer
from tests.support.tiny_runs import write_pairs

LOSS_TOLERANCE = 1e-4
"""Of a loss, as a share: fp32 rounds to some 1e-6."""
NEAR_TIE = 1e-4
"""Two ways to compute a token may differ where the two largest logits are as near as this, as a share of their size."""

MOST_WEIGHTS = 4_000_000
MOST_NEW, NUM_DECODED = 12, 4
POSITIONS, WINDOW = 64, 8

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "d_embed"), 32),
    **dict.fromkeys(("attention_hidden_size", "word_embed_proj_dim", "input_dim", "linear_attn_hidden"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "d_inner", "dff", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "block_ff_dim", "dim_ff"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_dim", "feed_forward_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "encoder_num_hidden_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "n_head_kv", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), POSITIONS),
    **dict.fromkeys(("max_sequence_length", "max_seq_length", "seq_length", "max_target_positions"), POSITIONS),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window", "local_attention"), WINDOW),
    **dict.fromkeys(("attention_window_size",), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "global_head_dim", "index_head_dim"), 8),
    "index_n_heads": 4,
    "lru_width": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.18,
    "init_std": 0.18,
}  # fmt: skip
"""Names of configs' fields -> a small value, set where the config has the field."""

_LATENT = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
           "longcat_flash", "minicpm3", "mistral4", "youtu", "sarvam_mla")  # fmt: skip
"""As many keys as queries."""

_OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    **{name: {"num_key_value_heads": 4} for name in _LATENT},
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{name: {"decoder_start_token_id": 0} for name in ("t5", "mt5", "umt5")},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 8},
    "zamba2": {"mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16, "num_mem_blocks": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "nemotron_h": {"hybrid_override_pattern": "M*M-", "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16,
                         "num_local_experts": 0, "shared_intermediate_size": 64},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "funnel": {"block_sizes": [1, 1], "d_head": 8},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
                 "is_decoder": True},
    "longformer": {"attention_window": 8},
    "bert": {"is_decoder": True},
    "xlm": {"causal": True},
}  # fmt: skip
"""What a family needs besides, or to be what it is: both kinds of layers of a hybrid, a decoder of BERT's kind."""

_ENCODERS_TOO = ("big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
                 "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
                 "bert-generation")  # fmt: skip
"""Encoders that transformers also has as decoders, by is_decoder."""


@dataclass(frozen=True)
class Row:
    name: str
    status: str
    why: str = ""
    seconds: float = 0.0


class NothingToCompare(Exception):
    """The plain model does not work here."""


def names(kind: str) -> list[str]:
    """Model types that transformers maps to a causal language model, or to a sequence classifier."""
    from transformers.models.auto import modeling_auto

    mapping = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }[kind]
    return list(mapping)


def sweep(kind: str, chosen: list[str]) -> Iterator[Row]:
    for name in chosen:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, _quiet():
            torch.manual_seed(0)
            try:
                built = _build(Path(folder), kind, name)
            except Exception as error:  # a config that needs more than sizes
                yield Row(name, "lacks", f"{type(error).__name__}: {first_line(error)}"[:160])
                continue
            status, why = _judge(_CHECKS[kind], Path(folder), built)
        yield Row(name, status, why, time.perf_counter() - start)


def _judge(check: Callable[[Job, Any], str], folder: Path, auto: Any) -> tuple[str, str]:
    try:
        job = _job(folder)
    except UserError as error:
        return "refused", first_line(error)
    except Exception as error:
        return "WRONG", f"{type(error).__name__} while it is set up: {first_line(error)}"
    slower = [note for note in job.notes if "exact and slower" in note]
    try:
        fault = check(job, _plain(auto, folder / "model"))
    except NothingToCompare as error:
        return "lacks", str(error)
    except Exception as error:
        fault = f"{type(error).__name__}: {first_line(error)}"
    if fault:
        return "WRONG", "; ".join([fault, *slower])
    return ("slower", "; ".join(slower)) if slower else ("right", "")


def _plain(auto: Any, folder: Path) -> Any:
    try:
        return auto.from_pretrained(folder, dtype=torch.float32)
    except Exception as error:  # BART's config takes back a number of labels that differs from its own
        raise NothingToCompare(f"transformers cannot load it: {first_line(error)}") from error


def _job(folder: Path) -> Job:
    """LoRA where there are linear layers to adapt."""
    try:
        return build_job(load_run(folder / "run.yaml"))
    except UserError as error:
        if "matches no linear layer" not in str(error):
            raise
    return build_job(load_run(folder / "run.yaml", {"method": "full"}))


# ---- building ------------------------------------------------------------------------------


def tiny_config(name: str, kind: str, tokens: dict[str, int | None], vocab_size: int) -> Any:
    import transformers

    default = transformers.CONFIG_MAPPING[name]()
    if any(medium in part for part in default.sub_configs for medium in ("vision", "audio", "image", "perception")):
        raise ValueError("it reads more than text")
    own = _OWN.get(name, {}) if kind == "causal" or name not in ("bert", "xlm", "reformer") else {}
    if kind == "causal" and name in _ENCODERS_TOO:
        own = own | {"is_decoder": True}
    fixed = {key for key in _SIZES if isinstance(getattr(type(default), key, None), property)}
    sizes = {
        key: value
        for key, value in _SIZES.items()
        if isinstance(_value(default, key), int | float | list) and key not in fixed
    }
    sizes |= {"num_hidden_layers": 2} if "block_types" in own else {}
    if name == "funnel":
        del sizes["num_hidden_layers"]
    vocabularies = {key: vocab_size for key in ("vocab_size", "vocab_size_per_layer_input") if hasattr(default, key)}
    settings = sizes | vocabularies | tokens | own
    return transformers.AutoConfig.for_model(name, **settings)


def _value(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except Exception:  # an attribute that differs from layer to layer
        return None


def _build(folder: Path, kind: str, name: str) -> Any:
    """Model, data and run.yaml in `folder`; returns the class of transformers that loads the model."""
    import transformers

    auto = {"causal": transformers.AutoModelForCausalLM, "classifier": transformers.AutoModelForSequenceClassification}
    if kind == "causal":
        vocab = save_character_tokenizer(folder / "model")
        tokens = {"pad_token_id": vocab["<pad>"], "eos_token_id": vocab["</s>"], "bos_token_id": None}
        write_problems(folder / "data")
        dataset = {"task": "word-problems", "held_out": 6, "prompt": "{question}"}
        more = {"evaluation": {"max_new_tokens": MOST_NEW}}
    else:
        pads_with_1 = getattr(transformers.CONFIG_MAPPING[name](), "pad_token_id", 0) == 1
        vocab = save_tokenizer(folder / "model", "roberta" if pads_with_1 else "bert")
        tokens = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0} if pads_with_1 else {"pad_token_id": 0}
        write_pairs(folder / "data", num_train=16, num_dev=12)
        dataset, more = {}, {}
    config = tiny_config(name, kind, tokens, -(-len(vocab) // 8) * 8)
    if kind == "classifier":
        config.num_labels = 2
    with torch.device("meta"):  # what the sizes did not make small may have gigabytes
        count = sum(parameter.numel() for parameter in auto[kind].from_config(config).parameters())
    if count > MOST_WEIGHTS:
        raise ValueError(f"{count:,} weights")
    model = auto[kind].from_config(config)
    for parameter in model.parameters():  # biases and norms of a trained model are not 0 and 1
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder / "model")
    run = {
        "run_id": "tiny",
        "method": "lora",
        "model": {"name": str(folder / "model")},
        "adapter": {"target_modules": "all-linear", "rank": 4},
        "dataset": {"path": str(folder / "data"), "max_length": 48, **dataset},
        "training": {"batch_size": 8, "precision": "fp32", "threads": 1},
        "budget": "2steps",
        **more,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return auto[kind]


# ---- comparing -----------------------------------------------------------------------------


def _check_causal(job: Job, plain: nn.Module) -> str:
    """What is wrong, in words; empty if nothing is."""
    task: Any = job.task
    encoded, rows = task.train, job.batches.rows(0)
    num_items = task.num_items(rows)
    model, ours = job.adapter.model.eval(), 0.0
    for part in micro_batches(encoded, rows, job.limits.training):
        loss = task.loss(model, task.collate(part, job.device), num_items).loss
        loss.backward()
        ours += float(loss)
    gradient = float(job.adapter.flat.grad.norm())
    theirs = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]].astype("int64"))
            logits = plain(input_ids=ids[None], use_cache=False).logits[0].float()
            first = int(encoded.prompt_lengths[row])
            theirs += float(nn.functional.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum"))
    theirs /= num_items
    if not abs(ours - theirs) <= LOSS_TOLERANCE * abs(theirs):
        return f"loss {ours:.5f}, transformers {theirs:.5f}"
    if not (math.isfinite(gradient) and gradient > 0):
        if not all(_plain_gradient_is_finite(task, plain, int(row)) for row in rows):
            raise NothingToCompare("the plain model's gradient of a row is not finite either")
        return f"the gradient's norm is {gradient}"
    return _check_tokens(job, plain)


def _check_tokens(job: Job, plain: Any) -> str:
    task: Any = job.task
    prompts = [task.validation.prompt(row).tolist() for row in range(NUM_DECODED)]
    found = decode(
        job.adapter.model,
        prompts,
        options=DecodeOptions(MOST_NEW),
        eos_tokens=[-1],
        pad_token=task.validation.pad_token,
        max_tokens=1000,
        method=task._plain.method,
    )
    assert found is not None
    for prompt, (answer,) in zip(prompts, found.answers):
        where = _first_difference(plain, prompt, answer.tokens)
        if where is not None:
            generated = _generated(plain, prompt)
            agrees = "generate agrees with it" if generated == answer.tokens else "generate does not either"
            return f"token {where} of an answer is not the one of the model run anew ({agrees})"
    return ""


@torch.no_grad()
def _first_difference(plain: nn.Module, prompt: list[int], answer: list[int]) -> int | None:
    """Where the answer is not what the plain model, run from the start for each token, gives; near ties count as it."""
    tokens = list(prompt)
    for i, token in enumerate(answer):
        logits = plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
        if float(logits.max() - logits[token]) > NEAR_TIE * float((logits - logits.mean()).norm()):
            return i
        tokens.append(token)
    return None


def _generated(plain: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": MOST_NEW, "eos_token_id": -1, "pad_token_id": 0}
    try:
        return plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
    except Exception:  # a model that transformers cannot generate with
        return []


def _check_classifier(job: Job, plain: nn.Module) -> str:
    task: Any = job.task
    model: Any = job.adapter.model.eval()
    merged = copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
    plain.load_state_dict(merged.state_dict())  # the head is drawn when it is loaded; LoRA's update is still zero
    rows, ours, theirs, wanted = job.batches.rows(0), 0.0, 0.0, []
    for part in micro_batches(task.train, rows, job.limits.training):
        loss = task.loss(model, task.collate(part, job.device), len(rows)).loss
        loss.backward()
        ours += float(loss)
    gradient = float(job.adapter.flat.grad.norm())
    found = answer_rows(model, task.validation, task.row_losses, job.limits.evaluation, job.device)
    assert found is not None
    with torch.no_grad():
        for row in rows:
            logits = _own_logits(plain, task.train, row)
            theirs += float(nn.functional.cross_entropy(logits, torch.tensor([task.train.labels[row]]))) / len(rows)
        wanted = torch.cat([_own_logits(plain, task.validation, row) for row in range(len(task.validation))])
    apart = float((found.logits_NC - wanted).abs().max()) / float(wanted.abs().max())
    if not abs(ours - theirs) <= LOSS_TOLERANCE * abs(theirs):
        return f"loss {ours:.5f}, transformers {theirs:.5f}"
    if not (math.isfinite(gradient) and gradient > 0):
        if not all(_plain_gradient_is_finite(task, plain, int(row)) for row in rows):
            raise NothingToCompare("the plain model's gradient of a row is not finite either")
        return f"the gradient's norm is {gradient}"
    return "" if apart <= LOSS_TOLERANCE * 10 else f"logits of validation rows differ by {apart:.2g} of their size"


def _plain_gradient_is_finite(task: Any, plain: nn.Module, row: int) -> bool:
    plain.zero_grad()
    logits = _own_logits(plain, task.train, row)
    nn.functional.cross_entropy(logits, torch.tensor([task.train.labels[row]])).backward()
    return all(bool(p.grad.isfinite().all()) for p in plain.parameters() if p.grad is not None)


def _own_logits(plain: nn.Module, encoded: Any, row: int) -> torch.Tensor:
    places = slice(int(encoded.offsets[row]), int(encoded.offsets[row + 1]))
    inputs = {"input_ids": torch.from_numpy(encoded.tokens[places].astype("int64"))[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if encoded.segments is not None:
        inputs["token_type_ids"] = torch.from_numpy(encoded.segments[places].astype("int64"))[None]
    return plain.eval()(**inputs).logits.float()


_CHECKS: dict[str, Callable[[Job, Any], str]] = {"causal": _check_causal, "classifier": _check_classifier}


@contextmanager
def _quiet() -> Iterator[None]:
    from fastpeft.models.backbone import quiet_transformers

    random.seed(0)
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    kind, *chosen = sys.argv[1:]
    counts: Counter[str] = Counter()
    for row in sweep(kind, chosen or names(kind)):
        counts[row.status] += 1
        print(f"| {row.name} | {row.status} | {row.why} | {row.seconds:.1f} |", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
