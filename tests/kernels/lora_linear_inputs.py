"""Inputs of lora_linear for its tests, and both ways to run them."""

from __future__ import annotations

import torch

GRADIENTS = ("dx", "da", "db")


def make_inputs(generator, lead, num_in, num_out, rank, bias=True):
    """x, weight, bias, A, B and dy in float64, scaled so that every result is about 1."""

    def draw(*shape, std=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

    return (
        draw(*lead, num_in),
        draw(num_out, num_in, std=num_in**-0.5),
        draw(num_out) if bias else None,
        draw(rank, num_in, std=num_in**-0.5),
        draw(num_out, rank, std=rank**-0.5),
        draw(*lead, num_out),
    )


def run(function, x, weight, bias, a, b, dy, scale, **options):
    """(y, dx, dA, dB) for these very tensors' values."""
    leaves = [tensor.detach().requires_grad_(True) for tensor in (x, a, b)]
    y = function(leaves[0], weight, bias, leaves[1], leaves[2], scale, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def relative(got, want):
    """NaN, which no bound passes, where anything is NaN."""
    return float((got.double().cpu() - want.cpu()).norm() / want.norm().cpu().clamp_min(1e-300))
