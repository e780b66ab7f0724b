#!/usr/bin/env bash
# In a config.json with the keys of transformers 4 and 5, rope_scaling replaces rope_parameters, theta included.
#
# Versions: transformers 5.24.0; Python 3.11.
# transformers 5 saves rotary settings only as rope_parameters, which transformers 4 and other readers do not know, so one
# adds the older keys beside it. If rope_scaling is among them, transformers 5 reads it *in place of* rope_parameters and
# does not merge the two: settings that only rope_parameters has are silently lost. With the scaling alone, Llama's theta
# falls back to 10,000 and its partial rotary factor is dropped. GPT-NeoX uses its default theta even if rope_theta is
# added, because it reads rotary_emb_base. rope_theta alone changes nothing.
# Seen, where rope_parameters says theta 500,000, half of each head, linear scaling by 4:
#   llama + rope_scaling              theta  10000.0 share None
#   llama + rope_scaling, rope_theta  theta 500000.0 share None
#   llama + rope_theta=7              theta 500000.0 share 0.5
#   gpt_neox + rope_scaling, rope_theta  theta  10000.0 share 0.25
# Guard: write rope_theta and partial_rotary_factor (GPT-NeoX: rotary_emb_base, rotary_pct) whenever rope_scaling is written,
# and load the folder again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cat > "$folder/try.py" <<'PYTHON'
import copy

import transformers

said = {"rope_theta": 500000.0, "partial_rotary_factor": 0.5, "rope_type": "linear", "factor": 4.0}
scaling = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
cases = {
    ("llama", "rope_scaling"): scaling,
    ("llama", "rope_scaling, rope_theta"): scaling | {"rope_theta": 500000.0},
    ("llama", "rope_theta=7"): {"rope_theta": 7.0},
    ("gpt_neox", "rope_scaling, rope_theta"): scaling | {"rope_theta": 500000.0},
}
found = {}
for (kind, name), added in cases.items():
    config = transformers.AutoConfig.for_model(kind, rope_parameters=dict(said))
    stored = config.to_dict()
    assert stored["rope_parameters"] == said
    read = type(config).from_dict(copy.deepcopy(stored | added)).rope_parameters
    assert (read["rope_type"], read["factor"]) == ("linear", 4.0)
    found[kind, name] = read["rope_theta"], read.get("partial_rotary_factor")
    print(f"{kind} + {name:<25} theta {read['rope_theta']:>8} share {found[kind, name][1]}")
assert list(found.values()) == [(10000.0, None), (500000.0, None), (500000.0, 0.5), (10000.0, 0.25)], found
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/try.py"
echo "as described"
