"""Inputs of lora_linear for its tests, and both ways to run them."""

from __future__ import annotations

import torch

GRADIENTS = ("dx", "da", "db")


def make_inputs(generator, lead, num_in, num_out, rank, bias=True):
    """x, weight, bias, A, B and dy in float64, scaled so that every result is about 1.

    A and B lean towards the first rows of x and dy, so that x A^T and dy B do not vanish by chance where they are one
    number, whose relative error nothing bounds then.
    """

    def draw(*shape, std=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

    x, dy = draw(*lead, num_in), draw(*lead, num_out)
    a, b = draw(rank, num_in, std=num_in**-0.5), draw(num_out, rank, std=rank**-0.5)
    if x.numel():
        first, last = x.reshape(-1, num_in)[0], dy.reshape(-1, num_out)[0]
        a[0] += 3 * first / first.norm()
        b[:, 0] += 3 * last / last.norm()
    return x, draw(num_out, num_in, std=num_in**-0.5), draw(num_out) if bias else None, a, b, dy


def run(function, x, weight, bias, a, b, dy, scale, **options):
    """(y, dx, dA, dB) for these very tensors' values."""
    leaves = [tensor.detach().requires_grad_(True) for tensor in (x, a, b)]
    y = function(leaves[0], weight, bias, leaves[1], leaves[2], scale, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def relative(got, want):
    """NaN, which no bound passes, where anything is NaN."""
    return float((got.double().cpu() - want.cpu()).norm() / want.norm().cpu().clamp_min(1e-300))
