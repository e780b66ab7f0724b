"""Baselines of the stand-in for sentence pairs: LoRA, the frozen encoder with a trained head, and bags of words.

    python bench/stand_in.py [--steps 1875] [--head-rates 1e-3,3e-3,1e-2]

All on the embedded task, with the same batches. `head` trains pooler and classifier on the frozen encoder, at each of
--head-rates. `hypothesis words` is logistic regression on the hypothesis's bag of words, `pair words` on the words
of both sentences and on those that they share.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import fastpeft
from fastpeft.data.batches import micro_batches
from fastpeft.standins.sentence_pairs import train_pairs, validation_pairs
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.resolve import resolve
from fastpeft.trainer.step import forward_backward


def train(job: Job, num_steps: int, head_only: bool) -> float:
    """Validation accuracy after `num_steps` of the trainer's step, with the adapter's gradient zeroed or not."""
    adapter = job.adapter
    for step in range(num_steps):
        rows = job.batches.rows(step)
        limit = job.limits.training
        parts = (job.task.collate(part, job.device) for part in micro_batches(job.batches.encoded, rows, limit))
        signals = forward_backward(adapter, job.task.loss, parts, job.task.num_items(rows))
        if head_only:
            adapter.flat.adapter_grad.zero_()  # B stays zero, so that the encoder is unchanged
        job.optimizer.clip_guard_and_update(signals, job.schedule.rates(None, step / num_steps))
    score = job.task.evaluate(adapter.model, job.limits, lambda: False, None)
    assert score is not None
    return score.value


def word_baseline(texts: list[str], held_out: list[str]) -> float:
    labels = [label for *_, label in train_pairs()]
    model = make_pipeline(CountVectorizer(ngram_range=(1, 2), binary=True), LogisticRegression(max_iter=500))
    return model.fit(texts, labels).score(held_out, [label for *_, label in validation_pairs()])


def pair_words(premise: str, hypothesis: str) -> str:
    shared = set(premise.split()) & set(hypothesis.split())
    marked = [f"p_{w}" for w in premise.split()] + [f"h_{w}" for w in hypothesis.split()]
    return " ".join([*marked, *(f"both_{w}" for w in shared), f"share_{len(shared)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1875)
    parser.add_argument("--head-rates", default="1e-3,3e-3,1e-2")
    args = parser.parse_args()

    def job(**settings: object) -> Job:
        run = fastpeft.load_run("lora_mnli", **settings)
        return build_job(resolve(run).run)

    began = time.perf_counter()
    print(f"lora              {train(job(), args.steps, head_only=False):.4f}  {time.perf_counter() - began:.0f} s")
    for rate in args.head_rates.split(","):
        value = train(job(**{"training.learning_rate": rate}), args.steps, head_only=True)
        print(f"head, rate {rate:5}  {value:.4f}", flush=True)
    hypotheses = [[h for _, h, _ in pairs] for pairs in (train_pairs(), validation_pairs())]
    both = [[pair_words(p, h) for p, h, _ in pairs] for pairs in (train_pairs(), validation_pairs())]
    print(f"hypothesis words  {word_baseline(*hypotheses):.4f}")
    print(f"pair words        {word_baseline(*both):.4f}")


if __name__ == "__main__":
    main()
