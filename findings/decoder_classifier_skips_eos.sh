#!/usr/bin/env bash
# A decoder with a sequence classifier never reads the end-of-sequence token if that is also the padding token.
#
# Versions: torch 2.13.0, transformers 5.24.0; Python 3.11; CPU.
# Llama's and Qwen3's tokenizers have no padding token, and the usual remedy is pad_token = eos_token. The classifier
# reads the rightmost token that is not the padding token, by its id and not by the attention mask. In a text that ends
# in EOS this is the token before EOS, in a batch and alone, even with a mask of ones. So a tokenizer that adds EOS
# changes nothing, and an EOS that ends a conversation counts as padding.
# Seen, largest difference between the logits of a text with EOS and those of the same text without:
#   pad_token_id = eos_token_id   0.0
#   pad_token_id = another        0.84 (Llama), 0.54 (Qwen3)
# Guard: another implementation of the same model (rows without padding, an export) has to choose the token by its id
# too, and not take the last token of each row.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cat > "$folder/try.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

EOS, OTHER = 2, 0
shape = dict(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=32, initializer_range=0.2, eos_token_id=EOS,
)
text = torch.tensor([[11, 12, 13, 14]])
ended = torch.cat([text, torch.tensor([[EOS]])], dim=1)
for config, kind in ((LlamaConfig, LlamaForSequenceClassification), (Qwen3Config, Qwen3ForSequenceClassification)):
    apart = {}
    for pad in (EOS, OTHER):
        torch.manual_seed(0)
        model = kind(config(**shape, pad_token_id=pad)).eval()
        with torch.no_grad():
            logits = [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in (text, ended)]
        apart[pad] = float((logits[0] - logits[1]).abs().max())
        print(f"{kind.__name__:32} pad_token_id {pad}: {apart[pad]:.2g}")
    assert apart[EOS] < 1e-6
    assert apart[OTHER] > 1e-2
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/try.py"
echo "as described"
