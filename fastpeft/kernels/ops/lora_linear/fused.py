"""lora_linear's Triton kernels, as functions of tensors.

Shape suffixes: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from fastpeft.kernels import dispatch
from fastpeft.kernels.dispatch import Config
from fastpeft.kernels.launch import launch
from fastpeft.kernels.ops.lora_linear import configs
from fastpeft.kernels.ops.lora_linear.kernel import (
    factors_kernel,
    keep_mask_kernel,
    lora_matmul_kernel,
    reduce_factors_kernel,
    skinny_kernel,
)
from fastpeft.kernels.ops.lora_linear.reference import drop_below
from fastpeft.kernels.ops.lora_linear.split import skinny_buffer

MOST_SPLITS, BLOCK_REDUCED = 64, 128


@dataclass(frozen=True)
class Dropout:
    probability: float
    seed: torch.Tensor

    @property
    def factor(self) -> float:
        return 1 / (1 - self.probability)


def precision(dtype: torch.dtype) -> str:
    """Triton's input precision of tensor-core products. Plain tf32 exceeds the error bound for fp32; the interpreter
    needs `ieee`."""
    if dispatch.interpreting():
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def fused_keep_mask(
    num_rows: int, num_columns: int, dropout: float, seed: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """reference.philox_keep, as ones and zeros of `dtype`."""
    stored = torch.int8 if dtype == torch.bool else dtype
    keep = torch.empty(num_rows, num_columns, dtype=stored, device=seed.device)
    if keep.numel():
        grid = (-(-num_rows // 32), -(-num_columns // 128))
        launch(keep_mask_kernel, grid, keep, seed, num_rows, num_columns, drop_below(dropout), BLOCK_M=32, BLOCK_N=128)
    return keep.view(dtype)


def skinny_tiles(num_rows: int, dtype: torch.dtype) -> Config:
    """Tile sizes of skinny_kernel. With few rows the tiles are small, so that every multiprocessor has work."""
    return Config(64 if num_rows > 4096 else 16, 0, 32 if dtype == torch.float32 else 64, 4, 4)


def skinny(
    x_TI: torch.Tensor,
    factor: torch.Tensor,
    scale: float,
    *,
    forward: bool,
    dropout: Dropout | None = None,
    out_TR: torch.Tensor | None = None,
) -> torch.Tensor:
    """(T, R): scale * D(x) A^T with `factor` A (R, I) in forward, else scale * x B with `factor` B (O, R)."""
    x_TI, factor = _rows(x_TI), factor.contiguous()
    num_rows, num_columns = x_TI.shape
    rank = factor.shape[0] if forward else factor.shape[1]
    if out_TR is None:
        out_TR = skinny_buffer(x_TI, rank)
    if not num_rows:
        return out_TR
    block_r = min(configs.padded_rank(rank), 64)
    tiles = skinny_tiles(num_rows, x_TI.dtype)
    launch(
        skinny_kernel, (-(-num_rows // tiles.block_m), -(-rank // block_r)),
        x_TI, factor, out_TR, dropout.seed if dropout else x_TI,
        num_rows, num_columns, x_TI.stride(0), out_TR.stride(0),
        scale * (dropout.factor if dropout else 1.0), drop_below(dropout.probability) if dropout else 0,
        R=rank, BLOCK_M=tiles.block_m, BLOCK_K=tiles.block_k, BLOCK_R=block_r, FORWARD=forward,
        DROPOUT=dropout is not None, EVEN_K=num_columns % tiles.block_k == 0, PRECISION=precision(x_TI.dtype),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out_TR


def matmul(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    s_TR: torch.Tensor | None,
    scale: float,
    config: Config | None,
    *,
    forward: bool,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward: y and s. Backward, with x = dY: dx and dS.

    If `s_TR` is None, the same launch computes it. `dropout` is applied to the update of dx.
    """
    x, a_RI, b_OR = _rows(x), a_RI.contiguous(), b_OR.contiguous()
    if 1 not in weight_OI.stride():
        weight_OI = weight_OI.contiguous()
    num_rows, (rank, num_in), num_out = x.shape[0], a_RI.shape, b_OR.shape[0]
    inline = s_TR is None
    s_TR = skinny_buffer(x, rank) if s_TR is None else s_TR
    sum_size, result_size = (num_in, num_out) if forward else (num_out, num_in)
    out = x.new_empty(num_rows, result_size)
    if not num_rows:
        return out, s_TR
    block_r = configs.padded_rank(rank) if inline else configs.rank_step(rank, x.dtype)
    form = "fused" if inline else "fused_two"
    config = config or configs.default_config(form, dispatch.interpreting())
    config = configs.fitting_matmul(
        config, x.dtype, block_r, _capability(x.device), inline=inline, dropout=dropout is not None
    )
    tiles = -(-num_rows // config.block_m) * -(-result_size // config.block_n)
    i_inner = weight_OI.stride(1) == 1
    launch(
        lora_matmul_kernel, (tiles,),
        x, weight_OI, x if bias_O is None else bias_O.contiguous(), *((a_RI, b_OR) if forward else (b_OR, a_RI)),
        s_TR, out, dropout.seed if dropout else x,
        num_rows, sum_size, result_size, x.stride(0), weight_OI.stride(0 if i_inner else 1), s_TR.stride(0),
        scale, drop_below(dropout.probability) if dropout else 0, dropout.factor if dropout else 1.0,
        R=rank, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r,
        GROUP_M=8, FORWARD=forward, W_K_INNER=i_inner == forward, INLINE=inline,
        HAS_BIAS=bias_O is not None, DROPOUT=dropout is not None,
        EVEN_K=sum_size % config.block_k == 0, EVEN_N=result_size % config.block_n == 0,
        PRECISION=precision(x.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, s_TR


def factors(
    x_TI: torch.Tensor,
    ds_TR: torch.Tensor,
    dy_TO: torch.Tensor,
    s_TR: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    needed: Sequence[bool],
    config: Config | None,
    *,
    dropout: Dropout | None = None,
    row_mask_T: torch.Tensor | None = None,
    measured: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dA and dB, None if not needed; and if `measured` ||dB||^2, with a mask followed by that of the masked part."""
    (num_rows, rank), num_in, num_out = s_TR.shape, x_TI.shape[1], dy_TO.shape[1]
    device = x_TI.device
    x_TI, dy_TO = _rows(x_TI), _rows(dy_TO)
    masked = row_mask_T is not None
    config = config or configs.default_config("fused_factors", dispatch.interpreting())
    block_r = configs.rank_step(rank, x_TI.dtype)
    config = configs.fitting_factors(config, x_TI.dtype, block_r)
    feature_blocks = [-(-size // config.block_m) if need else 0 for size, need in zip((num_in, num_out), needed)]
    splits, rows_a_split = _splits(num_rows, sum(feature_blocks), config, device)
    part = torch.empty(splits, num_in + num_out, rank, dtype=torch.float32, device=device)
    part_masked = torch.empty(splits, num_out, rank, dtype=torch.float32, device=device) if masked else part
    launch(
        factors_kernel, (sum(feature_blocks), splits, -(-rank // block_r)),
        x_TI, ds_TR, dy_TO, s_TR, row_mask_T.contiguous().view(torch.int8) if masked else x_TI,
        dropout.seed if dropout else x_TI, part, part_masked,
        num_rows, num_in, num_out, feature_blocks[0], rows_a_split,
        x_TI.stride(0), ds_TR.stride(0), dy_TO.stride(0), s_TR.stride(0),
        drop_below(dropout.probability) if dropout else 0,
        R=rank, BLOCK_F=config.block_m, BLOCK_T=config.block_k, BLOCK_R=block_r, DROPOUT=dropout is not None,
        HAS_MASK=masked, PRECISION=precision(x_TI.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    da = torch.empty(rank, num_in, dtype=dtypes[0], device=device) if needed[0] else None
    db = torch.empty(num_out, rank, dtype=dtypes[1], device=device) if needed[1] else None
    blocks = [-(-size * rank // BLOCK_REDUCED) if need else 0 for size, need in zip((num_in, num_out), needed)]
    squares = torch.empty(1 + masked, blocks[1], dtype=torch.float32, device=device) if measured else part
    launch(
        reduce_factors_kernel, (sum(blocks),),
        part, part_masked, part if da is None else da, part if db is None else db, squares,
        num_in, num_out, splits, *blocks, dropout.factor if dropout else 1.0,
        R=rank, SPLITS=16 if splits <= 16 else MOST_SPLITS, BLOCK=BLOCK_REDUCED, MEASURE=measured,
        HAS_MASK=masked, num_warps=4,
    )  # fmt: skip
    return da, db, squares.sum(dim=1) if measured else None


def _splits(num_rows: int, blocks: int, config: Config, device: torch.device) -> tuple[int, int]:
    """(number of splits of the tokens, rows per split). A split is a whole number of steps, and the number of programs
    is close to what the config asks for."""
    wanted = -(-_multiprocessors(device) * config.block_n // max(1, blocks))
    steps = max(1, -(-num_rows // config.block_k))
    steps_a_split = -(-steps // min(MOST_SPLITS, wanted, steps))
    return -(-steps // steps_a_split), steps_a_split * config.block_k


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x if its rows are contiguous and do not overlap, else a contiguous copy."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
