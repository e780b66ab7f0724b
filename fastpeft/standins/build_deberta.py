"""Pretrain deberta_tiny from nothing: `python -m fastpeft.standins.build_deberta [--out DIR] [--steps N]`.

A DeBERTa-v2-shaped encoder learns from `sentence_text.raw_sentences`, unlabelled sentences, one an input.
Masked words are restored. In half of the sentences some words are wrong: the model tells which, and at [CLS] whether
there are any. These targets come from the corruption alone, none from the task."""

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, get_linear_schedule_with_warmup
from transformers.utils import logging

from fastpeft.standins import PATHS
from fastpeft.standins.sentence_text import raw_sentences

SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
PAD, CLS, SEP, UNK, MASK = range(len(SPECIAL_TOKENS))
MASKED_SHARE, FREQUENT_MASKED_SHARE = 0.2, 0.06
CORRUPTED_SHARE = 0.5
DROPPED_SHARE = 0.03
SWAPPED_SHARE = 0.4
NUM_SUBSTITUTES = 24
TOKEN_WEIGHT = 5.0
NUM_COUNTED = 50_000
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
    without_field: dict[str, Any] = {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 32}
    return DebertaV2Config(
        **without_field,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden_size,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_position_embeddings=128,
        position_biased_input=False,
        type_vocab_size=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
        pad_token_id=PAD,
    )


class Corruptor:
    """Makes sentences wrong: a word gives way to one from the same surroundings, or two words trade places."""

    def __init__(self, encoded: list[list[int]], shares_V: Tensor, rng: Random):
        vocab_size = len(shares_V)
        neighbours_VN = torch.zeros(vocab_size, 2 * vocab_size)
        for ids in encoded:
            padded = torch.tensor([CLS, *ids, SEP])
            for side, offset in ((padded[:-2], 0), (padded[2:], vocab_size)):
                neighbours_VN.index_put_((padded[1:-1], side + offset), torch.ones(len(ids)), accumulate=True)
        directions_VN = torch.nn.functional.normalize(neighbours_VN.sqrt())
        similarity_VV = (directions_VN @ directions_VN.T).fill_diagonal_(0)
        self.is_rare = (shares_V == MASKED_SHARE).tolist()
        self.substitutes = similarity_VV.topk(NUM_SUBSTITUTES).indices.tolist()
        self.rng = rng

    def __call__(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """The words, some of them wrong, and flags that say which."""
        rng, words = self.rng, list(ids)
        anywhere = rng.random() < 0.25
        places = [i for i, token in enumerate(words) if self.is_rare[token] or anywhere]
        rng.shuffle(places)
        if len(places) > 1 and rng.random() < SWAPPED_SHARE:
            first = places[0]
            alike = [i for i in places[1:] if words[i] != words[first] and words[i] in self.substitutes[words[first]]]
            if alike:
                words[first], words[alike[0]] = words[alike[0]], words[first]
        if words == ids:
            for place in places[: rng.randint(1, 2)]:
                words[place] = rng.choice(self.substitutes[words[place]])
        return words, [int(old != new) for old, new in zip(ids, words)]


def batches(encoded: list[list[int]], corrupt: Corruptor, batch_size: int, rng: Random) -> list[Tensor]:
    """One sentence an input, of similar length within a batch: the tokens, and flags of the wrong ones."""
    rows = []
    for sentence in encoded:
        words, wrong = corrupt(sentence) if rng.random() < CORRUPTED_SHARE else (sentence, [0] * len(sentence))
        kept = [i for i, word in enumerate(words) if not corrupt.is_rare[word] or rng.random() >= DROPPED_SHARE]
        rows.append(([CLS, *(words[i] for i in kept), SEP], [0, *(wrong[i] for i in kept), 0]))
    found = []
    for start in range(0, len(rows), batch_size * BATCHES_PER_SORT):
        chunk = sorted(rows[start : start + batch_size * BATCHES_PER_SORT], key=lambda row: len(row[0]))
        groups = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            found.append(torch.tensor([[part + [PAD] * (width - len(part)) for part in row] for row in group]))
    return found


def cooccurrence_embeddings(encoded: list[list[int]], vocab_size: int, hidden_size: int) -> Tensor:
    """Directions from the SVD of positive pointwise mutual information within sentences (Levy and Goldberg, 2014).

    From random embeddings the model first learns word classes, which makes all nouns alike, and is then slow to tell
    them apart again. The noise keeps words apart that occur in the same company.
    """
    counts_VV = torch.zeros(vocab_size, vocab_size)
    for ids in encoded:
        unique = torch.tensor(sorted(set(ids)))
        counts_VV[unique[:, None], unique[None, :]] += 1
    counts_VV.fill_diagonal_(0)
    totals_V = counts_VV.sum(1).clamp(min=1)
    pmi_VV = (counts_VV * counts_VV.sum() / torch.outer(totals_V, totals_V)).clamp(min=1).log()
    left_VV, values_V, _ = torch.linalg.svd(pmi_VV)
    vectors_VH = torch.nn.functional.normalize(left_VV[:, :hidden_size] * values_V[:hidden_size].sqrt())
    vectors_VH += 0.7 * torch.randn(vocab_size, hidden_size) / hidden_size**0.5
    vectors_VH[PAD] = 0
    return vectors_VH


def mask_shares(encoded: list[list[int]], vocab_size: int) -> Tensor:
    """How often each word is masked: words in more than a fiftieth of the sentences less."""
    counts = torch.bincount(torch.tensor([token for ids in encoded for token in set(ids)]), minlength=vocab_size)
    shares = torch.where(counts > len(encoded) / 50, FREQUENT_MASKED_SHARE, MASKED_SHARE)
    shares[: len(SPECIAL_TOKENS)] = 0
    return shares


class Objective(torch.nn.Module):
    """Masked words are restored, and wrong words are recognised as in ELECTRA (arXiv:2003.10555)."""

    def __init__(self, model: DebertaV2ForMaskedLM, shares_V: Tensor, generator: torch.Generator):
        super().__init__()
        self.model, self.shares_V, self.generator = model, shares_V, generator
        self.detector = torch.nn.Linear(model.config.hidden_size, 2)

    def forward(self, ids_BT: Tensor, flags_BT: Tensor) -> tuple[Tensor, Tensor]:
        # B inputs, T tokens, H hidden
        masked_BT = torch.rand(ids_BT.shape, generator=self.generator) < self.shares_V[ids_BT]
        masked_BT &= flags_BT == 0
        inputs_BT = torch.where(masked_BT, MASK, ids_BT)
        attention_BT = (ids_BT != PAD).long()
        hidden_BTH = self.model.deberta(input_ids=inputs_BT, attention_mask=attention_BT).last_hidden_state
        words = torch.nn.functional.cross_entropy(self.model.cls(hidden_BTH[masked_BT]), ids_BT[masked_BT])
        scores_BT2 = self.detector(hidden_BTH)
        seen_BT = (inputs_BT > MASK).float()
        binary = torch.nn.functional.binary_cross_entropy_with_logits
        wrong = binary(scores_BT2[..., 0], flags_BT.float(), weight=seen_BT, reduction="sum") / seen_BT.sum()
        sentence = binary(scores_BT2[:, 0, 1], flags_BT.amax(1).float())
        return words, TOKEN_WEIGHT * wrong + sentence


def pretrain(model: DebertaV2ForMaskedLM, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    generator, rng = torch.Generator().manual_seed(options.seed), Random(options.seed)
    texts = list(raw_sentences(options.steps * options.batch_size, options.seed))
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    sample = encoded[:NUM_COUNTED]
    shares_V = mask_shares(sample, model.config.vocab_size)
    with torch.no_grad():
        embeddings = cooccurrence_embeddings(sample, model.config.vocab_size, model.config.hidden_size)
        model.deberta.embeddings.word_embeddings.weight.copy_(embeddings)
    objective = Objective(model, shares_V, generator)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=options.lr, weight_decay=0.01, betas=(0.9, 0.98))
    scheduler = get_linear_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    started_s, means = time.perf_counter(), torch.zeros(2)
    objective.train()
    for step, batch in enumerate(batches(encoded, Corruptor(sample, shares_V, rng), options.batch_size, rng), 1):
        losses = torch.stack(objective(batch[:, 0], batch[:, 1]))
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        means += (losses.detach() - means) / min(step, 100)
        if step % 200 == 0:
            words, wrong = means.tolist()
            elapsed_s = time.perf_counter() - started_s
            print(f"step {step} words {words:.3f} wrong {wrong:.3f} {elapsed_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PATHS["deberta_tiny"])
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
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
    model.deberta.save_pretrained(options.out)
    save_tokenizer(tokenizer, options.out)


if __name__ == "__main__":
    main()
