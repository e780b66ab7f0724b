"""The specification of lora_linear: plain PyTorch, differentiated by autograd.

The dropout mask on a GPU is specified here too. It uses counter-based random numbers, so that any element can be
regenerated alone.
"""

from __future__ import annotations

import torch


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + bias + scale (D(x) A^T) B^T, shapes as in op.lora_linear (arXiv:2106.09685, eq. 3).

    D(x) = x * keep / (1 - dropout), `keep` bool in the shape of x; D(x) = x where `keep` is None.
    """
    dropped = x if keep is None else x * keep / (1 - dropout)
    update = torch.nn.functional.linear(torch.nn.functional.linear(dropped, lora_a), lora_b)
    return torch.nn.functional.linear(x, weight, bias) + scale * update


_ROUNDS = 7
_WORD = 0xFFFFFFFF


def philox_keep(num_rows: int, num_columns: int, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    """(rows, columns) bool on the seed's device, True where dropout keeps an element.

    Philox 4x32 with 7 rounds (Salmon et al., SC 2011, section 2). The key is `seed`, an int64 of one element, and the
    counter is (row, column // 8, 0, 0). The four words are eight 16-bit numbers, low half first, one per column. An
    element is kept if its number is at least round(65536 * dropout).
    """
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    groups = -(-num_columns // 8)
    c0 = torch.arange(num_rows, device=seed.device)[:, None].expand(num_rows, groups)
    c1 = torch.arange(groups, device=seed.device)[None, :].expand(num_rows, groups)
    c2, c3 = zero, zero
    k0, k1 = seed.reshape(()) & _WORD, (seed.reshape(()) >> 32) & _WORD
    for _ in range(_ROUNDS):
        low_a, high_a = _product(0xD2511F53, c0)
        low_b, high_b = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    words = torch.stack([c0, c1, c2, c3], dim=-1)
    numbers = torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(num_rows, groups * 8)
    return numbers[:, :num_columns] >= drop_below(dropout)


def _product(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high word of an unsigned 64-bit product. int64 wraps around, and the masks remove the sign."""
    product = word * constant
    return product & _WORD, (product >> 32) & _WORD


def drop_below(dropout: float) -> int:
    """Elements whose 16-bit number is below this are dropped."""
    return round(65536 * dropout)
