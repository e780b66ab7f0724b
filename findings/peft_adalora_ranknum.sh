#!/usr/bin/env bash
# AdaLoRA on a base in 16 bits: the rank, which scales every update, becomes trainable and drifts.
#
# Versions: torch 2.13.0, transformers 5.24.0, peft 0.21.2; Python 3.11; CPU.
# PEFT keeps each layer's rank in a frozen parameter, ranknum, by which lora_alpha is divided. For a bf16 base,
# get_peft_model casts the adapter's parameters to fp32, after which ranknum has requires_grad=True. The usual optimizer
# over all parameters that require a gradient then trains and decays it, so that the scale of every update changes during
# training. With an fp32 base it stays frozen.
# Seen after 20 steps of AdamW (learning rate 1e-2, weight decay 0.1), from 4.0:
#   torch.float32 False 4.0
#   torch.bfloat16 True 3.87
# Guard: after get_peft_model, freeze every parameter whose name contains "ranknum".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 peft==0.21.2
cat > "$folder/try.py" <<'PYTHON'
import peft
import torch
import transformers

shape = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
seen = {}
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**shape)).to(dtype)
    settings = peft.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, target_r=2, total_step=100, target_modules=["query", "value"]
    )
    model = peft.get_peft_model(base, settings)
    rank = next(p for name, p in model.named_parameters() if "ranknum" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    ids = torch.randint(0, 40, (4, 8))
    for _ in range(20):
        model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seen[dtype] = (rank.requires_grad, rank.item())
    print(dtype, rank.requires_grad, round(rank.item(), 2))
assert seen[torch.float32] == (False, 4.0)
assert seen[torch.bfloat16][0] is True
assert seen[torch.bfloat16][1] < 3.99
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/try.py"
echo "as described"
