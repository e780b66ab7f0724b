"""Random models of the four encoder families, a few kB each, saved as a checkpoint from the hub would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = "the a every some no dog cat bird ran slept saw big small good bad very not and is it film plot".split()  # noqa: SIM905
FAMILIES = ("deberta-v2", "bert", "roberta", "distilbert")
CAUSAL_FAMILIES = ("qwen3", "llama", "mistral", "gpt2")
NUM_LAYERS = 2
MAX_POSITIONS = 64

# Special tokens in the order of their numbers: RoBERTa's padding is 1, which its positions depend on.
_BERT_TOKENS = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
_ROBERTA_TOKENS = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}


def make_model(folder: Path, family: str, seed: int = 0, masked_lm: bool = False, **settings: Any) -> Path:
    """Write config.json, model.safetensors and a word-level tokenizer into `folder`; returns it.

    Args:
        family: one of FAMILIES, or a decoder such as qwen3. deberta-v2 has deberta-v3's settings: relative attention,
            shared keys.
        masked_lm: save a masked language model, which has no pooler, instead of the bare encoder.
        settings: further fields of the model's config, such as hidden_dropout_prob=0.0.
    """
    import torch
    import transformers

    vocab = save_tokenizer(folder, family)
    config = transformers.AutoConfig.for_model(family, **_settings(family, len(vocab)) | settings)
    auto = transformers.AutoModelForMaskedLM if masked_lm else transformers.AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config)
        for parameter in model.parameters():  # biases and norms of a trained model are not 0 and 1
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, family: str) -> dict[str, int]:
    """One token a word of WORDS. Returns the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = _ROBERTA_TOKENS if family == "roberta" else _BERT_TOKENS
    vocab = {token: i for i, token in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=special["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    start, end = special["cls"], special["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} {end} $B {end}" if family == "roberta" else f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(start, vocab[start]), (end, vocab[end])],
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "padding_side": "right",
        **{f"{name}_token": token for name, token in special.items()},
    }
    if family == "bert":
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return vocab


def _settings(family: str, vocab_size: int) -> dict[str, Any]:
    names = {"hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
    if family == "distilbert":
        names = {"dim": 32, "n_layers": NUM_LAYERS, "n_heads": 4, "hidden_dim": 48}
    common = {
        "vocab_size": vocab_size,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 32**-0.5,
        "pad_token_id": 0,
        **names,
    }
    if family in ("llama", "qwen3", "gemma3_text"):
        common |= {"num_key_value_heads": 2, "head_dim": 8}
    if family == "roberta":
        common |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
        common["max_position_embeddings"] += 2
    if family == "deberta-v2":
        common |= {
            "relative_attention": True,
            "share_att_key": True,
            "pos_att_type": ["c2p", "p2c"],
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 8,
            "position_biased_input": False,
            "type_vocab_size": 0,
        }
    return common


def causal_model(family: str = "llama", seed: int = 0, **settings: Any) -> Any:
    """A random causal language model (llama, qwen3, ...) with grouped-query attention and a gated feed-forward."""
    import transformers

    sizes = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 32**-0.5, "pad_token_id": 0,
    }  # fmt: skip
    return _from_config(transformers.AutoModelForCausalLM, family, seed, sizes | settings)


def make_causal_lm(folder: Path, family: str = "qwen3", seed: int = 0, pad: bool = True, **settings: Any) -> Path:
    """Write a causal language model with a character-level tokenizer into `folder`, as the hub's are; returns it.

    Args:
        family: one of CAUSAL_FAMILIES or another that causal_model takes. The head is tied in qwen3 and gpt2.
        pad: whether the tokenizer has a padding token.
        settings: further fields of the model's config.
    """
    vocab = save_character_tokenizer(folder, pad)
    tokens = {"pad_token_id": vocab["<pad>"] if pad else None, "eos_token_id": vocab["</s>"], "bos_token_id": None}
    defaults = {"vocab_size": -(-len(vocab) // 8) * 8, "tie_word_embeddings": family in ("qwen3", "gpt2"), **tokens}
    if family == "gpt2":
        defaults |= {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    causal_model(family, seed, **defaults | settings).save_pretrained(folder)
    return folder


def save_character_tokenizer(folder: Path, pad: bool = True) -> dict[str, int]:
    """One token a character of printable ASCII and the newline. Returns the vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"pad_token": "<pad>"} if pad else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return vocab


def classifier_model(family: str = "bert", seed: int = 0, **settings: Any) -> Any:
    """A random encoder with a classification head, without dropout."""
    import transformers

    sizes = _settings(family, 32) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    return _from_config(transformers.AutoModelForSequenceClassification, family, seed, sizes | settings)


def _from_config(auto: Any, family: str, seed: int, settings: dict[str, Any]) -> Any:
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_config(transformers.AutoConfig.for_model(family, **settings))
