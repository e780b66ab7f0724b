"""A step's work is counted by what it computes and moves, and continued to depth in a straight line."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.roofline import language_step
from bench.step_work import Ceilings, Work, count
from bench.throughput_presets import QWEN3_384

T, I, O, R = 256, 200, 224, 8  # noqa: E741


def test_products_are_told_apart_by_their_thinnest_side():
    x, weight, thin, out = torch.ones(T, I), torch.ones(I, O), torch.ones(I, R), torch.ones(T, O)
    narrow, rank_32 = torch.ones(I, 128), torch.ones(I, 32)

    def step():
        _ = x @ weight
        _ = x @ thin
        _ = x @ narrow
        _ = x @ rank_32
        out.addmm_(x, weight)

    work = count(step)
    assert work.product_flops == 2 * 2 * T * I * O
    assert work.tiny_flops == 2 * T * I * R
    assert work.thin_flops == 2 * T * I * 32
    assert work.narrow_flops == 2 * T * I * 128
    assert work.calls == 5
    assert work.bytes == 0
    one_by_one = sum(T * I + I * width + T * width for width in (O, R, 128, 32, O))
    assert work.product_bytes == 4 * one_by_one


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
    flops = work.product_flops + work.tiny_flops + work.thin_flops + work.narrow_flops + work.batched_flops
    assert flops == pytest.approx(products, rel=0.25)  # LoRA's own come on top
    assert flops > products


def test_the_rest_is_counted_by_elements_or_bytes():
    x, query = torch.ones(T, I), torch.ones(2, 3, 16, 8)
    norm, soft = torch.nn.functional.layer_norm, torch.softmax
    work = count(lambda: (x.exp(), x + 1.0, x.view(I, T), x.t().contiguous(), torch.bmm(x[None], x.t()[None])))
    rows = count(lambda: (norm(x, (I,)), soft(x, 1)))
    assert (rows.slow_elements, rows.norm_bytes) == (T * I, 4 * (2 * T * I + 2 * T))  # a mean and a deviation a row
    assert work.function_elements == T * I
    assert work.bytes == 2 * 4 * T * I
    assert work.copied_bytes == 2 * 4 * T * I
    assert work.batched_flops == 2 * T * T * I
    assert work.calls >= 8  # views among them
    assert count(lambda: scaled_dot_product_attention(query, query, query)).attention_flops == 4 * 2 * 3 * 16 * 16 * 8


def test_least_times_are_the_longer_of_arithmetic_and_traffic():
    ceilings = Ceilings(
        product_flops_s=100.0, tiny_flops_s=5.0, thin_flops_s=10.0, narrow_flops_s=20.0, batched_flops_s=25.0,
        attention_flops_s=50.0, function_elements_s=5.0, slow_elements_s=2.0, bytes_s=20.0, copied_bytes_s=4.0,
        norm_bytes_s=8.0, call_s=0.5,
    )  # fmt: skip
    work = Work(
        product_flops=200.0, tiny_flops=5.0, thin_flops=10.0, narrow_flops=20.0, batched_flops=25.0,
        attention_flops=100.0, function_elements=10.0, slow_elements=4.0, bytes=40.0, copied_bytes=8.0, norm_bytes=16.0,
        product_bytes=20.0, calls=4.0,
    )  # fmt: skip
    assert ceilings.parts(work) == {"products": 6.0, "attention": 2.0, "functions": 4.0, "traffic": 6.0, "calls": 2.0}
    work.product_bytes = 200.0
    assert ceilings.parts(work)["products"] == 10.0


def test_depth_is_a_straight_line():
    shallow, deep = Work(*range(len(fields(Work)))), Work(*(3 * i for i in range(len(fields(Work)))))
    found = shallow.continued(deep, 2.0)
    assert [getattr(found, one.name) for one in fields(Work)] == pytest.approx(
        [5 * i for i in range(len(fields(Work)))]
    )
