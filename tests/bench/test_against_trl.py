"""The comparison with SFTTrainer: what both are scored by, and what both have the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.against_trl import encoded_rows, held_out, parse, run_of
from bench.hf_trainer import load_model
from fastpeft.data.batches import IGNORE


@pytest.fixture(scope="module")
def run():
    return run_of(parse(["--run", "lora_alpaca", "--steps", "5", "training.batch_size=2"]), seed=3)


def test_the_loss_is_transformers_own_over_the_answers_tokens(run):
    task, _, rows = encoded_rows(run)
    model = load_model(task, run).double().eval()
    expected, counts = [], []
    for row in range(4):
        tokens = torch.from_numpy(rows.tokens[rows.offsets[row] : rows.offsets[row + 1]].astype(np.int64))
        labels = torch.full_like(tokens, IGNORE)
        labels[rows.places(row)] = tokens[rows.places(row)]
        with torch.no_grad():
            expected.append(model(input_ids=tokens[None], labels=labels[None]).loss.item())
        counts.append(int((labels != IGNORE).sum()))
    assert all(counts)
    assert held_out(model, rows, 4) == pytest.approx(np.average(expected, weights=counts), rel=1e-6)


def test_a_run_has_the_settings_of_the_comparison_and_the_users(run):
    assert (run.budget, run.training.seed, run.training.batch_size) == ("5steps", 3, 2)
    assert (run.training.precision, run.schedule.name, run.evaluation.every) == ("fp32", "linear", "end")
