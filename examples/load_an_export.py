"""Export a run in two forms, and load them without fastpeft: an adapter with PEFT, a merged model with transformers.

python examples/load_an_export.py --run from-python

mlx-lm reads a third form, on a machine that has MLX: `fastpeft export RUN --for mlx`, then
`mlx_lm.generate --model BASE --adapter-path FOLDER`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from fastpeft.export.plan import make_plan
from fastpeft.export.write import export
from fastpeft.runs.store import RunFolder

PAIR = ("A man is asleep .", "Somebody sleeps .")


def logits(model: PreTrainedModel | PeftModel, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return model.eval()(**tokenizer(*PAIR, return_tensors="pt")).logits[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run", default="from-python", help="a run of a classifier, such as train_from_python.py leaves"
    )
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    folder = RunFolder.at(arguments.results_dir, arguments.run)
    result = folder.read_result()
    assert result is not None, f"there is no run {folder.path}"

    adapter = export(make_plan(arguments.run, results_dir=arguments.results_dir)).target
    to = folder.path / "export-merged"
    merged = export(make_plan(arguments.run, results_dir=arguments.results_dir, merge=True, to=to)).target

    name = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(result.labels))
    by_peft = logits(PeftModel.from_pretrained(base, adapter), adapter)
    by_transformers = logits(AutoModelForSequenceClassification.from_pretrained(merged), merged)

    print(f"adapter with PEFT          {by_peft.tolist()}")
    print(f"merged with transformers   {by_transformers.tolist()}")
    print(f"largest difference         {(by_peft - by_transformers).abs().max():.1e}")


if __name__ == "__main__":
    main()
