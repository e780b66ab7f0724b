"""What schedules' measurements add to a step, counted on the meta device."""

from __future__ import annotations

import pytest

from bench.schedule_counts import Shape, count
from fastpeft.config import load_run
from fastpeft.signals import Need

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
ROWS, WIDTH, PROMPT = 4, 32, 20


@pytest.fixture(scope="module")
def shape() -> Shape:
    return Shape(load_run("fot_gsm8k", ["adapter.rank=8"]), SIZES, ROWS, WIDTH, PROMPT)


def test_a_step_is_the_sum_of_its_matrix_products(shape: Shape) -> None:
    tokens, labelled = ROWS * WIDTH, ROWS * (WIDTH - PROMPT)
    matrices = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    frozen = sum(i * o for i, o in matrices)
    factors = 8 * sum(i + o for i, o in matrices)
    attention = 4 * ROWS * 2 * WIDTH**2 * 16  # scores and values, forward; twice as much backward
    layers = 2 * tokens * (2 * frozen + 3 * factors) + 3 * attention
    head = 2 * 2 * labelled * 512 * 32
    first_inputs = 2 * tokens * sum(o * 32 + 8 * 32 for o in (32, 16, 16))  # of embeddings, which learn nothing
    assert shape.flops(set()) == 2 * layers + head - first_inputs


def test_measurements_are_counted(shape: Shape) -> None:
    base = shape.flops(set())
    assert shape.flops({Need.TOKENS}) == base
    labelled = ROWS * (WIDTH - PROMPT)
    assert shape.flops({Need.LENS}) - base == 2 * labelled * 512 * 32
    assert shape.flops({Need.PROMPT}) - base == 2 * ROWS * WIDTH * 512 * 32
    outputs = 32 + 16 + 16 + 32 + 48 + 48 + 32
    assert shape.flops({Need.ANSWER_GRADIENT}) - base == 2 * 2 * ROWS * WIDTH * 8 * outputs


def test_the_whole_count() -> None:
    found = count(SIZES, ROWS, WIDTH, PROMPT)
    assert set(found["share"]) == {"fot", "graff"}
    for name, parts in found["parts"].items():
        assert found["share"][name] == pytest.approx(sum(part["share"] for part in parts.values()))
        assert found["host_ms"][name] > 0
    assert found["parts"]["graff"]["secants"]["share"] > 0
