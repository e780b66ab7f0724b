"""Pretrain qwen3_tiny from nothing: `python -m fastpeft.standins.build_qwen3 [--out DIR] [--steps N]`.

A Qwen3-shaped causal LM learns to continue `fastpeft.standins.problem_text.raw_text`: equations and single
statements, an end token after each text. It sees no question, no worked answer and no calculator note."""

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, get_cosine_schedule_with_warmup
from transformers.utils import logging

from fastpeft.standins import PATHS
from fastpeft.standins.problem_text import raw_text

PAD, EOS = "<|pad|>", "<|endoftext|>"
WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
"""Qwen2's split into words, every digit alone, without its list of English contractions."""
MARKS = "Question: Answer: <<>>\n#### .\n####"
"""What only the word problems write."""
CHAT_TEMPLATE = """\
{%- if tools %}{{ 'Tools:\\n' + (tools | tojson) + '\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ 'Question:\\n' + message.content + '\\n' }}
{%- elif message.role == 'assistant' and message.tool_calls %}{{ (message.tool_calls | tojson) + '\\n' }}
{%- elif message.role == 'assistant' %}{{ 'Answer:\\n' + message.content + eos_token + '\\n' }}
{%- else %}{{ message.content + '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Answer:\\n' }}{% endif %}"""
"""Turns of a conversation by words that the vocabulary has; the end of text ends the assistant's."""
NUM_VOCAB_TEXTS, VOCAB_SIZE, MIN_COUNT = 30_000, 1024, 20


def build_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, so that any text can be encoded and comes back as it was. MARKS get tokens too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(PAD, special=True), AddedToken(EOS, special=True)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *[MARKS] * MIN_COUNT], trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_config(tokenizer: Tokenizer, options: argparse.Namespace) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=options.hidden_size // 4,
        intermediate_size=3 * options.hidden_size,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=options.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def rows(tokenizer: Tokenizer, num_rows: int, length: int, seed: int) -> Tensor:
    """Rows of `length` tokens, cut from the texts and the end token behind each."""
    end, flat, texts = tokenizer.token_to_id(EOS), [], raw_text(num_rows * length, seed)
    while len(flat) < num_rows * length:
        for encoding in tokenizer.encode_batch(list(islice(texts, 10_000)), add_special_tokens=False):
            flat += [*encoding.ids, end]
    return torch.tensor(flat[: num_rows * length], dtype=torch.int32).view(num_rows, length)


def pretrain(model: Qwen3ForCausalLM, ids_NT: Tensor, options: argparse.Namespace) -> None:
    # N rows, B rows of one batch, T tokens, V vocabulary
    # Tokens that the text never shows are no candidates: pushing them all down would make their embeddings one.
    unseen_V = torch.bincount(ids_NT.flatten(), minlength=model.config.vocab_size) == 0
    decayed = [p for p in model.model.layers.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if all(p is not q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    started_s, mean = time.perf_counter(), 0.0
    model.train()
    for step, ids_BT in enumerate(ids_NT.split(options.batch_size), 1):
        ids_BT = ids_BT.long()
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
        logits_BTV = logits_BTV.masked_fill(unseen_V, -torch.inf)
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        mean += (loss.item() - mean) / min(step, 50)
        if step % 100 == 0:
            print(f"step {step} loss {mean:.4f} {time.perf_counter() - started_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PATHS["qwen3_tiny"])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--initializer-range", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer(list(raw_text(NUM_VOCAB_TEXTS, options.seed + 1)), VOCAB_SIZE)
    model = Qwen3ForCausalLM(build_config(tokenizer, options))
    pretrain(model, rows(tokenizer, options.steps * options.batch_size, options.length, options.seed), options)
    options.out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(options.out)
    save_tokenizer(tokenizer, options.out, model.config.max_position_embeddings)


if __name__ == "__main__":
    main()
