#!/usr/bin/env bash
# For Llama 4's text model, get_decoder() returns the language model with its head.
#
# Versions: transformers 5.24.0, torch 2.13.0; Python 3.11.
# get_decoder() looks for attributes with the usual names, then for base_model. Llama4ForCausalLM keeps its layers in
# `model`, but its base_model_prefix is "language_model", an attribute that it lacks. So it is its own base model and its
# own decoder. Code that takes hidden states from the decoder, to compute logits of some positions only, gets the logits
# of all positions and an output without last_hidden_state. LlamaForCausalLM returns its LlamaModel.
# Seen:
#   LlamaForCausalLM  decoder LlamaModel          last_hidden_state True
#   Llama4ForCausalLM decoder Llama4ForCausalLM   last_hidden_state False
# Guard: if get_decoder() returns the model itself, use its `model`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cat > "$folder/try.py" <<'PYTHON'
import torch
import transformers

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=2, head_dim=8)
llama4 = sizes | dict(intermediate_size_mlp=16, num_local_experts=2, pad_token_id=0)
found = {}
for kind, config in (
    (transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes)),
    (transformers.Llama4ForCausalLM, transformers.Llama4TextConfig(**llama4)),
):
    model = kind(config).eval()
    decoder = model.get_decoder()
    with torch.no_grad():
        output = decoder(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    found[kind.__name__] = decoder is model, "last_hidden_state" in output
    print(f"{kind.__name__:<17} decoder {type(decoder).__name__:<19} last_hidden_state {found[kind.__name__][1]}")
assert found == {"LlamaForCausalLM": (False, True), "Llama4ForCausalLM": (True, False)}, found
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/try.py"
echo "as described"
