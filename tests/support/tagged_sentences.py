"""For tests of token classification: sentences from text, entities as spans, small tokenizers of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpeft.tasks.token_classification.sentences import Sentences
from tests.support.real_data import DATA

WNUT17 = DATA / "wnut17"

TOKENIZERS = ("word pieces", "sentence pieces", "bytes with a space", "bytes")
_TEXT = "Anna Berg lives in Oslo near the old harbour of Bergen , says Olaf Lundqvist from Trondheim University ."


def sentences(*lines: str) -> Sentences:
    """Of lines such as "Anna/B-PER Berg/I-PER sleeps/O"."""
    pairs = [[token.rsplit("/", 1) for token in line.split(" ")] for line in lines]
    words, tags = ([[pair[i] for pair in sentence] for sentence in pairs] for i in range(2))
    return Sentences(words, tags, [f"here:{i}" for i in range(1, len(lines) + 1)], "here")


def tagged(*tags: str) -> Sentences:
    """Of lines such as "B-PER I-PER O"; the words are w1, w2, ..."""
    return sentences(*(" ".join(f"w{i}/{tag}" for i, tag in enumerate(line.split(), 1)) for line in tags))


def spans(tags: list[str]) -> set[tuple[int, int, str]]:
    """(start, end, type) of each legal entity of IOB2, by the definition: a B, and the I of its type that follow."""
    found = set()
    for start, tag in enumerate(tags):
        if tag.startswith("B-"):
            end = start + 1
            while end < len(tags) and tags[end] == f"I-{tag[2:]}":
                end += 1
            found.add((start, end, tag[2:]))
    return found


def iob1_file(path: Path, num_sentences: int) -> Path:
    """Four columns in IOB1, document marks, blank lines that hold a tab, a word that is a variation selector."""
    lines = ["-DOCSTART- -X- -X- O", ""]
    for i in range(num_sentences):
        lines += ["today NN I-NP O", "Anna NNP I-NP I-PER", "Berg NNP I-NP I-PER"]
        lines += ["Olaf NNP I-NP B-PER"] * (i % 5 == 0)
        lines += ["in IN I-PP O", "Oslo NNP I-NP I-LOC"] + ["\ufe0f NN I-NP O"] * (i % 7 == 0)
        lines.append("\t" if i % 2 else "")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tokenizer(kind: str) -> Any:
    """A tokenizer of one of TOKENIZERS, fitted to a sentence; word pieces clean the text as BERT's do."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    common: dict[str, Any] = {"vocab_size": 320, "special_tokens": special, "show_progress": False}
    if kind == "word pieces":
        raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
        raw.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=True)
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(**common | {"vocab_size": 60})
    elif kind == "sentence pieces":
        raw = Tokenizer(models.Unigram())
        raw.normalizer = normalizers.Strip()
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **common)
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes with a space")
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
    raw.train_from_iterator([" " + _TEXT] * 4, trainer)
    start, end = raw.token_to_id("<s>"), raw.token_to_id("</s>")
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
