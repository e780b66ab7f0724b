#!/usr/bin/env bash
# transformers' pipeline returns entities that a strict scorer does not count, and splits words.
#
# Versions: torch 2.13.0, transformers 5.24.0, seqeval 1.2.2; Python 3.11; CPU.
# A model that is trained with a label on the first piece of each word, as is usual, and scored by seqeval with
# mode="strict" and scheme=IOB2, gives other entities in pipeline("token-classification"):
# 1. For the scorer, a lone I-LOC after O is no entity. Every aggregation strategy makes it an entity, so that the
#    reported F1 is not the F1 of the pipeline's output.
# 2. aggregation_strategy="simple" reads every piece. If a later piece of a word, which was never trained, is tagged O,
#    the word is split ("wash", "##ton"). "first" returns the whole word.
# The model below has no layers: each piece's tag is set by hand.
# Seen:
#   simple [('PER', 'wash'), ('PER', '##ton'), ('LOC', 'paris')]
#   first [('PER', 'washington'), ('LOC', 'paris')]
#   strict entities of the same tags: {'PER'}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 seqeval==1.2.2
cat > "$folder/try.py" <<'PYTHON'
import torch
import transformers
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

tags = {"[CLS]": "O", "[SEP]": "O", "wash": "B-PER", "##ing": "O", "##ton": "I-PER", "was": "O", "in": "O", "paris": "I-LOC"}
pieces = ["[PAD]", "[UNK]", "[MASK]", *tags]
labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
inner = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
inner.normalizer = normalizers.Lowercase()
inner.pre_tokenizer = pre_tokenizers.Whitespace()
inner.decoder = decoders.WordPiece(prefix="##")
ends = [(name, pieces.index(name)) for name in ("[SEP]", "[CLS]")]
inner.post_processor = processors.BertProcessing(*ends)
special = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)

size = 16
config = transformers.BertConfig(
    vocab_size=len(pieces), hidden_size=size, num_hidden_layers=0, num_attention_heads=1, intermediate_size=size,
    id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
)
model = transformers.BertForTokenClassification(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    embedding = model.bert.embeddings.word_embeddings.weight
    for i, piece in enumerate(pieces):
        embedding[i, i] = 1.0
        model.classifier.weight[labels.index(tags.get(piece, "O")), i] = 1.0

text = "washington was in paris"
found = {}
for strategy in ("simple", "first"):
    ask = transformers.pipeline("token-classification", model, tokenizer=tokenizer, aggregation_strategy=strategy)
    found[strategy] = [(entity["entity_group"], entity["word"]) for entity in ask(text)]
    print(strategy, found[strategy])
words = [[tags["wash"], "O", "O", tags["paris"]]]  # of each word its first piece's tag
gold = [["B-PER", "O", "O", "B-LOC"]]
report = classification_report(gold, words, mode="strict", scheme=IOB2, zero_division=0, output_dict=True)
strict = {name for name in ("PER", "LOC") if report[name]["recall"] > 0}
print("strict entities of the same tags:", strict)
assert found["simple"] == [("PER", "wash"), ("PER", "##ton"), ("LOC", "paris")], found
assert found["first"] == [("PER", "washington"), ("LOC", "paris")], found
assert strict == {"PER"}
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/try.py"
echo "as described"
