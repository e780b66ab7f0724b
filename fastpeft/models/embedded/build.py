"""Pretrain deberta_tiny from nothing: `python -m fastpeft.models.embedded.build [--out DIR] [--steps N]`.

A DeBERTa-v2-shaped encoder learns by masked language modelling on `fastpeft.data.embedded.raw_sentences`, that is on
unlabelled single sentences. An input has two segments, so that the model knows its separator and a pair's length: two
unrelated sentences, or one sentence twice, each copy with its own words masked, replaced and dropped, so that a word
masked here can be looked up there.
"""

import argparse
import json
import time
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, get_linear_schedule_with_warmup
from transformers.utils import logging

from fastpeft.data.embedded import raw_sentences
from fastpeft.models.embedded import PATHS

SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
PAD, CLS, SEP, UNK, MASK = range(len(SPECIAL_TOKENS))
MASKED_SHARE = 0.3
TWICE_SHARE = 0.5
DROPPED_SHARE = 0.05
IGNORED = -100
BATCHES_PER_SORT = 16


def build_tokenizer(sentences: list[str]) -> Tokenizer:
    """One token a word, in alphabetical order behind the special tokens."""
    words = sorted({word for sentence in sentences for word in sentence.split()})
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 128,
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_config(vocab_size: int, hidden_size: int, num_layers: int) -> DebertaV2Config:
    return DebertaV2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden_size,
        relative_attention=True,
        share_att_key=True,
        pos_att_type=["c2p", "p2c"],
        norm_rel_ebd="layer_norm",
        position_buckets=32,
        max_position_embeddings=128,
        position_biased_input=False,
        type_vocab_size=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=hidden_size**-0.5,
        pad_token_id=PAD,
    )


def drop_words(ids: list[int], rng: Random) -> list[int]:
    return [token for token in ids if rng.random() >= DROPPED_SHARE] or ids


def batches(tokenizer: Tokenizer, sentences: list[str], batch_size: int, rng: Random) -> list[Tensor]:
    """Inputs of two segments, of similar length within a batch: one sentence twice, or two unrelated ones."""
    encoded = []
    for first, second in zip(sentences[::2], sentences[1::2]):
        is_twice = rng.random() < TWICE_SHARE
        first, second = (
            drop_words(tokenizer.encode(text, add_special_tokens=False).ids, rng)
            for text in (first, first if is_twice else second)
        )
        encoded.append([CLS, *first, SEP, *second, SEP])
    found = []
    for start in range(0, len(encoded), batch_size * BATCHES_PER_SORT):
        chunk = sorted(encoded[start : start + batch_size * BATCHES_PER_SORT], key=len)
        groups = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            width = max(map(len, group))
            found.append(torch.tensor([ids + [PAD] * (width - len(ids)) for ids in group]))
    return found


def mask(ids_BT: Tensor, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BERT's recipe with more of everything: of the chosen tokens 70 % are masked, 20 % replaced, 10 % kept."""
    chosen = (torch.rand(ids_BT.shape, generator=generator) < MASKED_SHARE) & (ids_BT > UNK)
    fate = torch.rand(ids_BT.shape, generator=generator)
    noise = torch.randint(len(SPECIAL_TOKENS), vocab_size, ids_BT.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.7), MASK, ids_BT)
    inputs = torch.where(chosen & (fate > 0.8), noise, inputs)
    return inputs, torch.where(chosen, ids_BT, IGNORED)


def masked_loss(model: DebertaV2ForMaskedLM, inputs_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross entropy at the chosen positions only; the vocabulary product skips all others."""
    hidden_BTH = model.deberta(input_ids=inputs_BT, attention_mask=(inputs_BT != PAD).long()).last_hidden_state
    chosen = labels_BT != IGNORED
    return torch.nn.functional.cross_entropy(model.cls(hidden_BTH[chosen]), labels_BT[chosen])


def pretrain(model: DebertaV2ForMaskedLM, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01, betas=(0.9, 0.98))
    scheduler = get_linear_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    rng, started_s = Random(options.seed), time.perf_counter()
    num_sentences = 2 * options.steps * options.batch_size
    model.train()
    sentences = list(raw_sentences(num_sentences, options.seed))
    for step, ids_BT in enumerate(batches(tokenizer, sentences, options.batch_size, rng)):
        loss = masked_loss(model, *mask(ids_BT, model.config.vocab_size, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(
                f"step {step} loss {loss.item():.3f} {time.perf_counter() - started_s:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PATHS["deberta_tiny"])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer(list(raw_sentences(20_000, options.seed + 1)))
    config = build_config(tokenizer.get_vocab_size(), options.hidden_size, options.num_layers)
    model = DebertaV2ForMaskedLM(config)
    pretrain(model, tokenizer, options)
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    save_tokenizer(tokenizer, options.out)


if __name__ == "__main__":
    main()
