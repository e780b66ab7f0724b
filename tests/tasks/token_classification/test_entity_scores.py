"""Strict entity scores against sets of spans, which are compared here by their definition."""

import random

import pytest

from fastpeft.tasks.token_classification.schemes import label_names
from fastpeft.tasks.token_classification.score import score_entities
from tests.support.tagged_sentences import spans

LABELS = label_names(("X", "Y", "Y-Z", "-"))


def reference(gold: list[list[str]], predicted: list[list[str]], name: str | None = None) -> tuple[float, float, float]:
    """Precision, recall and F1 of one type, or of all."""
    true, said = (
        {(i, *span) for i, tags in enumerate(split) for span in spans(tags) if name in (None, span[2])}
        for split in (gold, predicted)
    )
    hits = len(true & said)
    precision, recall = (hits / len(found) if found else 0.0 for found in (said, true))
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def test_random_sequences_score_as_their_sets_of_spans_do(seed):
    rng = random.Random(seed)
    for _ in range(200):
        lengths = [rng.randint(1, 8) for _ in range(rng.randint(1, 6))]
        gold = [[rng.choice(LABELS) for _ in range(length)] for length in lengths]
        share = rng.random()
        predicted = [[tag if rng.random() < share else rng.choice(LABELS) for tag in tags] for tags in gold]
        score = score_entities(gold, predicted, LABELS)
        assert (score.precision, score.recall, score.f1) == pytest.approx(reference(gold, predicted))
        for name, own in score.per_type.items():
            assert (own.precision, own.recall, own.f1) == pytest.approx(reference(gold, predicted, name))
            assert own.support == sum(span[2] == name for tags in gold for span in spans(tags))
        assert list(score.per_type) == ["-", "X", "Y", "Y-Z"]
        assert score.support == sum(own.support for own in score.per_type.values())
        equal = [one == other for tags, others in zip(gold, predicted) for one, other in zip(tags, others)]
        assert score.token_accuracy == pytest.approx(sum(equal) / len(equal))


@pytest.mark.parametrize("predicted", ["O I-X I-X", "I-X I-X O", "B-Y I-X I-X"])
def test_an_entity_without_its_beginning_counts_for_nothing(predicted):
    """seqeval gives 1.0 for the first if either `mode` or `scheme` is left out."""
    gold = [["B-X", "I-X", "O"] if predicted.startswith("I") else ["O", "B-X", "I-X"]]
    assert score_entities(gold, [predicted.split()], LABELS).f1 == 0.0


@pytest.mark.parametrize("left_out", ["mode", "scheme"])
def test_seqeval_is_lenient_without_either_argument(left_out):
    from seqeval.metrics import f1_score
    from seqeval.scheme import IOB2

    arguments = {"mode": "strict", "scheme": IOB2}
    gold, predicted = [["O", "B-X", "I-X"]], [["O", "I-X", "I-X"]]
    assert f1_score(gold, predicted, **arguments) == 0.0
    del arguments[left_out]
    assert f1_score(gold, predicted, **arguments) == 1.0


@pytest.mark.filterwarnings("error")
def test_without_any_entity_every_score_is_0_and_nothing_warns():
    score = score_entities([["O", "O"]], [["O", "I-X"]], LABELS)
    assert (score.precision, score.recall, score.f1, score.support) == (0.0, 0.0, 0.0, 0)
    assert score.token_accuracy == 0.5
    assert score.per_type["X"].support == 0


def test_a_sentence_that_lacks_words_is_no_score():
    with pytest.raises(ValueError, match="inconsistent"):
        score_entities([["O", "B-X"]], [["O"]], LABELS)
