#!/usr/bin/env bash
# Trainer.predict does not keep the dataset's order of rows if training groups rows by length.
#
# Versions: torch 2.13.0, transformers 5.24.0, accelerate 1.15.0; Python 3.11; CPU.
# TrainingArguments(train_sampling_strategy="group_by_length") names training, but evaluation and prediction use it too:
# predictions and label_ids are in the sampler's order. Metrics computed from both are right. Metrics computed against
# labels in the dataset's order compare shuffled rows, without a warning: on a named-entity task F1 fell from 0.52 to
# 0.04.
# Seen, labels of ten rows whose lengths rise (the second order is drawn):
#   random          [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
#   group_by_length [9, 2, 8, 1, 5, 4, 6, 0, 7, 3]
# Guard: set trainer.args.train_sampling_strategy = "sequential" before predict, or compare with label_ids only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0
cat > "$folder/try.py" <<'PYTHON'
import tempfile

import torch
import transformers

shape = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, num_labels=10))
rows = [{"input_ids": [5] * (3 + i), "attention_mask": [1] * (3 + i), "labels": i} for i in range(10)]


def pad(batch):
    width = max(len(row["input_ids"]) for row in batch)
    padded = {
        key: torch.tensor([row[key] + [0] * (width - len(row[key])) for row in batch])
        for key in ("input_ids", "attention_mask")
    }
    return padded | {"labels": torch.tensor([row["labels"] for row in batch])}


seen = {}
for strategy in ("random", "group_by_length"):
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, train_sampling_strategy=strategy, per_device_eval_batch_size=2, report_to="none",
            use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(model=model, args=arguments, data_collator=pad)
        seen[strategy] = trainer.predict(rows).label_ids.tolist()
    print(f"{strategy:15}", seen[strategy])
assert seen["random"] == list(range(10))
assert seen["group_by_length"] != list(range(10))
assert sorted(seen["group_by_length"]) == list(range(10))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/try.py"
echo "as described"
