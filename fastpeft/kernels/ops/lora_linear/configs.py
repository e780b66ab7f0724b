"""Forms and tile sizes of lora_linear's Triton kernels. Importing it does not need Triton.

Forms of `lora_forward` and `lora_backward` (dx); the skinny product is x A^T, or dY B in backward:
    split      cuBLAS: the frozen product, the skinny product, addmm_
    fused      one launch; the main loop also computes the skinny product, from the tiles of x that it loads anyway.
               With dropout, or with a rank above LARGEST_INLINE_RANK, it is computed as fused_two
    fused_two  a launch of the skinny product, then the main launch, which adds the update as further columns of the sum
Forms of `lora_factors` (dA, dB): split, and fused_factors (any name other than split selects it).

In a Config of fused or fused_two, block_m x block_n is the tile of the result and block_k the step along the summed
axis. In a Config of fused_factors, block_m is the number of features, block_k the tokens per step, and block_n the
programs per multiprocessor, which set the number of splits.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastpeft.kernels.dispatch import Config

LARGEST_INLINE_RANK = {torch.float32: 16}
"""Largest rank for which `fused` computes the skinny product in the main loop, 64 for other dtypes. Above it the extra
registers cost more than they save."""

_MATMUL = (
    Config(128, 256, 64, 8, 3),
    Config(128, 128, 64, 8, 4),
    Config(128, 128, 64, 8, 3),
    Config(128, 64, 64, 4, 4),
    Config(64, 256, 64, 4, 3),
    Config(64, 128, 64, 4, 4),
    Config(64, 64, 64, 4, 4),
    Config(64, 32, 64, 4, 4),
)

CONFIGS: dict[str, tuple[Config, ...]] = {
    "fused": _MATMUL,
    "fused_two": _MATMUL,
    "fused_factors": (
        Config(64, 1, 64, 4, 4),
        Config(64, 2, 64, 4, 4),
        Config(64, 4, 64, 4, 3),
        Config(128, 1, 64, 4, 4),
        Config(128, 2, 64, 4, 3),
        Config(128, 2, 128, 8, 3),
    ),
}

FORMS: dict[str, tuple[str, ...]] = {
    "lora_forward": ("split", "fused", "fused_two"),
    "lora_backward": ("split", "fused", "fused_two"),
    "lora_factors": ("split", "fused_factors"),
}

_DEFAULTS = {"fused": Config(128, 128, 64, 8, 3), "fused_two": Config(128, 128, 64, 8, 3)}
_DEFAULTS |= {"fused_factors": Config(64, 2, 64, 4, 4)}
_INTERPRETED = {"fused": Config(64, 64, 64, 4, 1), "fused_two": Config(32, 64, 64, 4, 1)}
_INTERPRETED |= {"fused_factors": Config(64, 2, 64, 4, 1)}

SHARED_BYTES = 160 * 1024
"""Shared memory that a block may use, from the limit of the smallest supported GPU, sm_80."""


def default_config(form: str, interpreted: bool) -> Config:
    return (_INTERPRETED if interpreted else _DEFAULTS)[form]


def padded_rank(rank: int) -> int:
    """The next power of two, at least 16, the smallest side for tensor cores."""
    return max(16, 1 << (rank - 1).bit_length())


def inline(form: str, rank: int, dropout: float, dtype: torch.dtype) -> bool:
    """Whether the skinny product is computed in the main loop."""
    return form == "fused" and not dropout and rank <= LARGEST_INLINE_RANK.get(dtype, 64)


def rank_step(rank: int, dtype: torch.dtype) -> int:
    """Columns of s per step of a program, if the skinny product is not computed in the main loop."""
    return min(padded_rank(rank), 32 if dtype == torch.float32 else 64)


def fitting_matmul(
    config: Config, dtype: torch.dtype, block_r: int, capability: int, *, inline: bool, dropout: bool
) -> Config:
    """`config`, reduced if it would spill registers or exceed the shared memory.

    Args:
        block_r: padded rank, or the step along it.
        capability: major compute capability of the GPU. Below 9 the operands of tensor cores take registers too.
    """
    if dtype == torch.float32:
        config = replace(
            config,
            block_m=min(config.block_m, 64),
            block_n=min(config.block_n, 64),
            block_k=min(config.block_k, 32),
            num_warps=8 if capability < 9 else 4,
        )
    if dropout or capability < 9:
        config = replace(config, block_n=min(config.block_n, 128))
    most = 136 if capability >= 9 else 48 if dropout else 80
    while config.block_m * (config.block_n + inline * block_r) > most * 32 * config.num_warps:
        if config.num_warps < 8:
            config = replace(config, num_warps=8)
        elif config.block_n >= config.block_m:
            config = replace(config, block_n=config.block_n // 2)
        else:
            config = replace(config, block_m=config.block_m // 2)
    a_stage = (config.block_m * config.block_k + config.block_k * (config.block_n + block_r)) * dtype.itemsize
    return replace(config, num_stages=max(1, min(config.num_stages, SHARED_BYTES // a_stage)))


def fitting_factors(config: Config, dtype: torch.dtype, block_r: int) -> Config:
    """As fitting_matmul, for fused_factors."""
    if dtype == torch.float32:
        config = replace(config, block_m=min(config.block_m, 64), block_k=min(config.block_k, 32), num_warps=8)
    if config.block_m * block_r > 32 * 32 * config.num_warps:
        config = replace(config, block_m=64)
    a_stage = config.block_k * (config.block_m + 2 * block_r) * dtype.itemsize
    return replace(config, num_stages=max(1, min(config.num_stages, SHARED_BYTES // a_stage)))
