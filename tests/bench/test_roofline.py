"""A step's work is counted by what it computes and moves, and continued to depth in a straight line."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.roofline import Ceilings, Work, count, language_step
from bench.throughput_presets import QWEN3_384

T, I, O, R = 256, 200, 224, 8  # noqa: E741


def test_products_are_told_apart_by_their_thinnest_side():
    x, weight, thin, out = torch.ones(T, I), torch.ones(I, O), torch.ones(I, R), torch.ones(T, O)
    narrow = torch.ones(I, 128)

    def step():
        _ = x @ weight
        _ = x @ thin
        _ = x @ narrow
        out.addmm_(x, weight)

    work = count(step)
    assert work.product_flops == 2 * 2 * T * I * O
    assert work.thin_flops == 2 * T * I * R
    assert work.narrow_flops == 2 * T * I * 128
    assert work.calls == 4
    assert work.bytes == 0
    assert work.product_bytes == 4 * (2 * (T * I + I * O + T * O) + T * I + I * R + T * R + T * I + I * 128 + T * 128)


def test_a_step_of_a_language_model():
    """By hand: the frozen products forwards and for the inputs' gradients, of the layers and of the head."""
    layers, width, inner, kv, vocab = 1, 64, 128, 32, 256
    shape = {
        **QWEN3_384, "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": inner,
    }  # fmt: skip
    rows, length = 2, 99
    work = count(language_step(shape, torch.float32, rows, length, rank=4))
    tokens, answers = rows * length, rows * (length - length // 3)
    layer = 2 * width * width + 2 * width * kv + 3 * width * inner
    products = 2 * 2 * (tokens * layers * layer + answers * width * vocab)
    flops = work.product_flops + work.thin_flops + work.narrow_flops + work.batched_flops
    assert flops == pytest.approx(products, rel=0.25)  # LoRA's own come on top
    assert flops > products


def test_the_rest_is_counted_by_elements_or_bytes():
    x, query = torch.ones(T, I), torch.ones(2, 3, 16, 8)
    work = count(lambda: (x.exp(), x + 1.0, x.view(I, T), x.t().contiguous(), torch.bmm(x[None], x.t()[None])))
    assert work.function_elements == T * I
    assert work.bytes == 2 * 4 * T * I
    assert work.copied_bytes == 2 * 4 * T * I
    assert work.batched_flops == 2 * T * T * I
    assert work.calls >= 8  # views among them
    assert count(lambda: scaled_dot_product_attention(query, query, query)).attention_flops == 4 * 2 * 3 * 16 * 16 * 8


def test_least_times_are_the_longer_of_arithmetic_and_traffic():
    ceilings = Ceilings(100.0, 10.0, 20.0, 25.0, 50.0, 5.0, 20.0, 4.0, 0.5)
    work = Work(200.0, 10.0, 20.0, 25.0, 100.0, 10.0, 40.0, 8.0, 20.0, 4.0)
    assert ceilings.parts(work) == {"products": 5.0, "attention": 2.0, "functions": 2.0, "traffic": 4.0, "calls": 2.0}
    work.product_bytes = 200.0
    assert ceilings.parts(work)["products"] == 10.0


def test_depth_is_a_straight_line():
    shallow, deep = Work(*range(len(fields(Work)))), Work(*(3 * i for i in range(len(fields(Work)))))
    found = shallow.continued(deep, 2.0)
    assert [getattr(found, one.name) for one in fields(Work)] == pytest.approx(
        [5 * i for i in range(len(fields(Work)))]
    )
