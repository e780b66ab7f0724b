"""||dL/dW||_F of a frozen weight, from its layer's input X and output gradient G: dL/dW = G^T X.

Shape suffixes: T tokens, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastpeft.kernels.dispatch import Config, choose, interpreting, runs_triton
from fastpeft.kernels.launch import launch

Tensors = torch.Tensor | Sequence[torch.Tensor]
Uses = list[tuple[torch.Tensor, torch.Tensor]]

CPU_TILE, GPU_TILE = 2**18, 2**22
"""PyTorch path: elements of the O x I product that exist at one time, at least 256 rows of it."""
DIRECT = (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 4))
DIRECT_FP32 = (Config(64, 64, 32, 4, 3), Config(32, 32, 32, 4, 3))
"""Large and small tiles over O, I and T."""
INTERPRETED = Config(32, 32, 32, 4, 3)


@torch.no_grad()
def gradient_norm(x: Tensors, g: Tensors) -> torch.Tensor:
    """|| sum_u G_u^T X_u ||_F over the uses u of one weight, without storing the O x I product.

    Of two forms the one with fewer multiplications is computed:
        direct: tiles of G^T X, squared and summed tile by tile: T I O multiplications;
        Gram: sum((X X^T) o (G G^T)) over all pairs of tokens: T^2 (I + O), fewer for T < I O / (I + O)
            (arXiv:2009.03106 uses it per example). The Triton kernel computes the lower triangle only.
    For the Triton kernels the multiplications of the busiest multiprocessor count: `gram_cost`, `direct_cost`.
    Terms of the Gram form may cancel. Its products of half precision input are therefore summed in fp32. The
    relative error of the squared norm is about 1e-6 ||X X^T||_F ||G G^T||_F / ||G^T X||_F^2. That quotient is of
    order 1 for unrelated tokens and 1e2 where gradients nearly cancel. Deterministic to the bit.

    Args:
        x: (..., I), the layer's input; or a sequence with one tensor per use of the weight: micro-batches, or
            DeBERTa, which projects tokens and relative positions with one weight. Uses are summed before the norm.
        g: (..., O), the gradient of the loss at the layer's output, in x's dtype; or a sequence of the same length.

    Returns:
        A scalar in fp32 (fp64 for fp64), in units of loss per unit of weight. It carries no gradient.

    Raises:
        ValueError: numbers of rows, widths, dtypes or devices that do not fit.
    """
    uses = _checked(x, g)
    first, num_tokens = uses[0][0], sum(len(x_TI) for x_TI, _ in uses)
    num_in, num_out = first.shape[1], uses[0][1].shape[1]
    if num_tokens * num_in * num_out == 0:
        return torch.zeros((), dtype=_wide(first.dtype), device=first.device)
    if runs_triton(first):
        choice = choose("gradient_norm", first, num_in, num_out, 0, num_tokens)
        if choice.form == "fused":
            return _fused(uses, choice.config)
    return _split(uses)


@torch.no_grad()
def weight_gradient(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """G^T X: (O, I), in fp32 at least, from x (..., I) and g (..., O)."""
    return _product(_as_matrix(g).t(), _as_matrix(x))


def sketch_norm(db_norm: torch.Tensor, scale: float, variance: float, rank: int) -> torch.Tensor:
    """Estimate ||dL/dW||_F from ||dL/dB||_F, which every LoRA backward pass has.

    dL/dB = s G^T (X A^T), and for A with i.i.d. zero-mean entries of variance v,
    E_A ||dL/dB||_F^2 = s^2 v R ||G^T X||_F^2 (IW-LoRA, section 1).

    Args:
        db_norm: any shape, floating: ||dL/dB||_F where B = 0.
        scale: s, lora_alpha / R.
        variance: v, of the entries of A; PEFT's default is 1 / (3 I).
        rank: R.

    Returns:
        The estimates, in db_norm's shape and dtype and in units of loss per unit of weight.

    Raises:
        ValueError: a scale, variance or rank that is not positive.
    """
    if not (scale > 0 and variance > 0 and rank > 0):
        raise ValueError(f"sketch_norm: scale {scale}, variance {variance} and rank {rank}; expected positive numbers")
    return db_norm / (scale * math.sqrt(variance * rank))


def _checked(x: Tensors, g: Tensors) -> Uses:
    xs = [x] if isinstance(x, torch.Tensor) else list(x)
    gs = [g] if isinstance(g, torch.Tensor) else list(g)
    if not xs or len(xs) != len(gs):
        raise ValueError(f"gradient_norm: {len(xs)} tensors x but {len(gs)} tensors g; expected one of each for a use")
    for use, (one_x, one_g) in enumerate(zip(xs, gs)):
        where = f"gradient_norm: use {use}: " if len(xs) > 1 else "gradient_norm: "
        if one_x.ndim == 0 or one_g.ndim == 0 or one_x.shape[:-1].numel() != one_g.shape[:-1].numel():
            raise ValueError(
                f"{where}x {tuple(one_x.shape)} and g {tuple(one_g.shape)} do not fit; "
                "expected x (..., I) and g (..., O) with as many rows"
            )
        if (one_x.shape[-1], one_g.shape[-1]) != (xs[0].shape[-1], gs[0].shape[-1]):
            raise ValueError(
                f"{where}x {tuple(one_x.shape)} and g {tuple(one_g.shape)} are not of the same weight as use 0, "
                f"whose in and out are {xs[0].shape[-1]} and {gs[0].shape[-1]}"
            )
        for name, tensor in (("x", one_x), ("g", one_g)):
            if not tensor.is_floating_point() or tensor.dtype != xs[0].dtype or tensor.device != xs[0].device:
                raise ValueError(
                    f"{where}{name} is {tensor.dtype} on {tensor.device} but x is {xs[0].dtype} on {xs[0].device}; "
                    "expected one floating dtype and one device for all"
                )
    return [(_as_matrix(one_x), _as_matrix(one_g)) for one_x, one_g in zip(xs, gs)]


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


# ---- PyTorch ---------------------------------------------------------------------------------


def _split(uses: Uses) -> torch.Tensor:
    num_tokens, num_in, num_out = sum(len(x) for x, _ in uses), uses[0][0].shape[1], uses[0][1].shape[1]
    if num_tokens * (num_in + num_out) < num_in * num_out:
        return _gram(uses)
    if num_in > num_out:  # ||X^T G|| is the same norm, with tiles nearer to squares
        uses = [(g, x) for x, g in uses]
    return _direct(uses)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in fp32 at least: fp16 would overflow, and bf16 has too few digits for the Gram form."""
    if left.dtype.itemsize >= 4:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _direct(uses: Uses) -> torch.Tensor:
    num_in, num_out = uses[0][0].shape[1], uses[0][1].shape[1]
    dtype, device = uses[0][0].dtype, uses[0][0].device
    rows = max(256, (GPU_TILE if device.type == "cuda" else CPU_TILE) // num_in)
    rows = math.ceil(num_out / math.ceil(num_out / rows))  # tiles of one size
    plain = dtype.itemsize >= 4
    buffer_OI = torch.empty((rows if plain else 0, num_in), dtype=dtype, device=device)
    norms = []
    for start in range(0, num_out, rows):
        tile_OI = buffer_OI[: min(rows, num_out - start)]
        for use, (x_TI, g_TO) in enumerate(uses):
            g_OT = g_TO[:, start : start + rows].t()
            if not plain:
                part_OI = _narrow_product(g_OT, x_TI)
                tile_OI = tile_OI.add_(part_OI) if use else part_OI
            elif use:
                tile_OI.addmm_(g_OT, x_TI)
            else:
                torch.mm(g_OT, x_TI, out=tile_OI)
        norms.append(_norm(tile_OI))
    return _norm(torch.stack(norms))


def _narrow_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """As _product, but bf16 on a CPU stays bf16: it has the range of fp32, and rounding barely changes a norm."""
    return (left @ right).float() if left.dtype == torch.bfloat16 and not left.is_cuda else _product(left, right)


def _norm(tile: torch.Tensor) -> torch.Tensor:
    if tile.is_cuda:
        return torch.linalg.vector_norm(tile)
    flat = tile.reshape(-1)  # on a CPU vector_norm sums sequentially: an error of 5e-6 at 768 x 768
    return torch.dot(flat, flat).sqrt()


def _gram(uses: Uses) -> torch.Tensor:
    total = torch.zeros((), dtype=_wide(uses[0][0].dtype), device=uses[0][0].device)
    for use, (x_TI, g_TO) in enumerate(uses):
        for other, (x2_TI, g2_TO) in enumerate(uses[: use + 1]):
            x_TT, g_TT = _product(x_TI, x2_TI.t()), _product(g_TO, g2_TO.t())
            total.add_(torch.dot(x_TT.view(-1), g_TT.view(-1)), alpha=1 if other == use else 2)
    return total.clamp_min_(0).sqrt_()


# ---- Triton ----------------------------------------------------------------------------------


def _fused(uses: Uses, config: Config | None) -> torch.Tensor:
    if len(uses) > 2:  # the kernels take at most two uses
        half = len(uses) // 2
        uses = [(torch.cat([x for x, _ in p]), torch.cat([g for _, g in p])) for p in (uses[:half], uses[half:])]
    uses = [(x_TI.contiguous(), g_TO.contiguous()) for x_TI, g_TO in uses]
    x_TI, g_TO = uses[0]
    shapes = (len(x_TI), len(uses[1][0]) if len(uses) > 1 else 0, x_TI.shape[1], g_TO.shape[1])
    num_multiprocessors = _num_multiprocessors(x_TI)
    gram = gram_config(x_TI.dtype, shapes)
    direct = config or direct_config(x_TI.dtype, shapes, num_multiprocessors)
    tensors = (*uses[0], *uses[-1])
    if gram_cost(gram, shapes, num_multiprocessors) < direct_cost(direct, shapes, num_multiprocessors):
        return _launch_gram(tensors, shapes, gram)
    return _launch_direct(tensors, shapes, direct)


def _num_multiprocessors(x: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


Shapes = tuple[int, int, int, int]
"""T of both uses, I, O."""


def direct_config(dtype: torch.dtype, shapes: Shapes, num_multiprocessors: int) -> Config:
    """Large tiles if there are enough to keep every multiprocessor busy, else small ones."""
    if interpreting():
        return INTERPRETED
    large, small = DIRECT_FP32 if dtype == torch.float32 else DIRECT
    enough = _cdiv(shapes[3], large.block_m) * _cdiv(shapes[2], large.block_n) >= num_multiprocessors
    return large if enough else small


def gram_config(dtype: torch.dtype, shapes: Shapes) -> Config:
    """Widths that are no multiple of a tile need masked loads, whose addresses take more threads or a smaller tile."""
    if interpreting():
        return INTERPRETED
    fp32 = dtype == torch.float32
    block_k = 32 if fp32 else 64
    if shapes[2] % block_k == 0 and shapes[3] % block_k == 0:
        return Config(64, 64, block_k, 4, 3)
    return Config(64, 64, 16, 4, 3) if fp32 else Config(64, 64, 64, 8, 3)


def direct_cost(config: Config, shapes: Shapes, num_multiprocessors: int) -> int:
    """Multiplications on the busiest multiprocessor."""
    rows, rows2, num_in, num_out = shapes
    num_tiles = _cdiv(num_out, config.block_m) * _cdiv(num_in, config.block_n)
    depth = (_cdiv(rows, config.block_k) + _cdiv(rows2, config.block_k)) * config.block_k
    return _cdiv(num_tiles, num_multiprocessors) * config.block_m * config.block_n * depth


def gram_cost(config: Config, shapes: Shapes, num_multiprocessors: int) -> int:
    """Multiplications on the busiest multiprocessor. The Gram form has few, deep tiles, so that it can be slower with
    fewer multiplications in total."""
    rows, rows2, num_in, num_out = shapes
    blocks = _cdiv(rows, config.block_m) + _cdiv(rows2, config.block_m)
    depth = (_cdiv(num_in, config.block_k) + _cdiv(num_out, config.block_k)) * config.block_k
    return _cdiv(blocks * (blocks + 1) // 2, num_multiprocessors) * config.block_m**2 * depth


def _cdiv(n: int, d: int) -> int:
    return -(-n // d)


def _precision(x: torch.Tensor) -> str:
    if x.dtype == torch.float32:
        return "tf32x3"
    return "ieee" if interpreting() else "tf32"


def _launch_direct(tensors: tuple[torch.Tensor, ...], shapes: Shapes, config: Config) -> torch.Tensor:
    from fastpeft.kernels.ops.sensitivity.kernel import gradient_norm_direct

    num_in, num_out = shapes[2:]
    num_tiles = _cdiv(num_out, config.block_m) * _cdiv(num_in, config.block_n)
    partial = torch.empty(num_tiles, dtype=torch.float32, device=tensors[0].device)
    launch(
        gradient_norm_direct, (num_tiles,), *tensors, partial, *shapes,
        EVEN=num_out % config.block_m == 0 and num_in % config.block_n == 0,
        BLOCK_O=config.block_m, BLOCK_I=config.block_n, BLOCK_T=config.block_k, PRECISION=_precision(tensors[0]),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return torch.linalg.vector_norm(partial)


def _launch_gram(tensors: tuple[torch.Tensor, ...], shapes: Shapes, config: Config) -> torch.Tensor:
    from fastpeft.kernels.ops.sensitivity.kernel import gradient_norm_gram

    blocks = _cdiv(shapes[0], config.block_m) + _cdiv(shapes[1], config.block_m)
    num_tiles = blocks * (blocks + 1) // 2
    partial = torch.empty(num_tiles, dtype=torch.float32, device=tensors[0].device)
    launch(
        gradient_norm_gram, (num_tiles,), *tensors, partial, *shapes,
        EVEN=shapes[2] % config.block_k == 0 and shapes[3] % config.block_k == 0,
        BLOCK=config.block_m, BLOCK_K=config.block_k, PRECISION=_precision(tensors[0]),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partial.sum().clamp_min_(0).sqrt_()
