"""fastpeft's LoRA layers under Hugging Face's Trainer: one `with` round `trainer.train()`.

python examples/accelerate_hf_trainer.py --steps 50
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fastpeft

NUM_TOKENS, LENGTH = 64, 12


def rows(count: int) -> list[dict[str, list[int] | int]]:
    """Label 1 where the first token is the larger half of the vocabulary."""
    tokens = torch.randint(NUM_TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row.tolist(), "labels": int(row[0] >= NUM_TOKENS // 2)} for row in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=NUM_TOKENS, num_labels=2, **small))
    model = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "key", "value", "dense"])
    )

    settings = TrainingArguments(
        output_dir=str(arguments.results_dir / "hf-trainer"),
        max_steps=arguments.steps,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model, settings, train_dataset=rows(512))
    with fastpeft.accelerate(model) as accelerated:
        print(accelerated)
        trainer.train()
    model.save_pretrained(str(arguments.results_dir / "hf-trainer" / "adapter"))
    print(f"the adapter is PEFT's: {arguments.results_dir / 'hf-trainer' / 'adapter'}")


if __name__ == "__main__":
    main()
