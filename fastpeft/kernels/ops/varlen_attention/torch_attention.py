"""torch's own attention for packed rows, and the reasons why it does not support a call.

torch.nn.attention.varlen is FlashAttention: half precision, no dropout. FlexAttention (arXiv:2412.05496) is compiled by
torch per kind of call. It also supports fp32, and head sizes that are no multiple of 8, but no dropout. Both are used
only if the installed version of torch has the arguments needed. Shapes as in op.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from fastpeft.kernels.dispatch import has_triton
from fastpeft.kernels.ops.varlen_attention.masked import by_mask, for_each_head
from fastpeft.kernels.ops.varlen_attention.seen import BLOCK, Seen, seen_by
from fastpeft.kernels.sequences import Sequences

WIDEST, FLASH_CAPABILITY = 256, (8, 0)
"""Largest head size of FlashAttention, in features and a multiple of 8, and its lowest compute capability."""
FLEX_NARROWEST, FLEX_WIDEST = 16, 256
"""Smallest and largest head size for which FlexAttention is tried."""
TRIED_LENGTHS = 70, 1, 130
TOLERANCE = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative error of a trial, in the L2 norm. For fp32 it admits products in TF32."""


# ---- torch.nn.attention.varlen -----------------------------------------------------------------


def varlen_fault(query: torch.Tensor, dropout: float) -> str | None:
    """The reason why torch.nn.attention.varlen does not support this call; None if it does."""
    width = query.shape[-1]
    if not query.is_cuda:
        return "it is for a GPU"
    if varlen_arguments() is None:
        return f"torch {torch.__version__} has none with a scale and a window"
    if dropout:
        return "it has no dropout"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it is for half precision, and this is {_name(query.dtype)}"
    if width > WIDEST or width % 8:
        return f"it takes heads of up to {WIDEST} features in multiples of 8, and these have {width}"
    if torch.cuda.get_device_capability(query.device) < FLASH_CAPABILITY:
        return f"it needs a GPU of compute capability {'.'.join(map(str, FLASH_CAPABILITY))}"
    return None


@cache
def varlen_arguments() -> frozenset[str] | None:
    """The parameters of the installed varlen_attn; None if there is none with a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = frozenset(inspect.signature(varlen_attn).parameters)
    return known if known >= {"scale", "window_size"} else None


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    scale: float,
    *,
    causal: bool,
    window: int | None,
    first_only: bool,
) -> torch.Tensor:
    """op.varlen_attention by torch.nn.attention.varlen."""
    from torch.nn.attention.varlen import varlen_attn

    known = varlen_arguments()
    more: dict[str, Any] = {}
    assert known is not None, "varlen_fault has looked"
    if causal:
        more["window_size"] = (-1 if window is None else window - 1, 0)
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            more["enable_gqa"] = True
        else:
            key, value = (for_each_head(x, query.shape[1]) for x in (key, value))
    queries = sequences.firsts if first_only else sequences
    places = queries.cu_seqlens, sequences.cu_seqlens, queries.longest, sequences.longest
    call: Any = varlen_attn
    found = call(query.contiguous(), key.contiguous(), value.contiguous(), *places, scale=scale, **more)
    assert isinstance(found, torch.Tensor), "a pair only where more is asked for"
    return found


# ---- FlexAttention -----------------------------------------------------------------------------


def flex_fault(query: torch.Tensor, num_key_heads: int, dropout: float) -> str | None:
    """The reason why FlexAttention does not support this call; None if it does. The first call of a kind is a trial."""
    width = query.shape[-1]
    if not query.is_cuda:
        return "it is compiled for a GPU"
    if not has_triton():
        return "it is compiled by Triton, which is not installed"
    if not _flex_is_known():
        return f"torch {torch.__version__} has none that takes blocks, grouped heads and a scale"
    if dropout:
        return "it has no dropout"
    if query.dtype not in TOLERANCE:
        return f"it is not for {_name(query.dtype)}"
    if not FLEX_NARROWEST <= width <= FLEX_WIDEST:
        return f"it takes heads of {FLEX_NARROWEST} to {FLEX_WIDEST} features, and these have {width}"
    return try_flex(query.shape[1], num_key_heads, width, query.dtype, query.device)


@cache
def _flex_is_known() -> bool:
    try:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention
    except ImportError:
        return False
    blocks = set(inspect.signature(BlockMask.from_kv_blocks).parameters)
    call = set(inspect.signature(inspect.unwrap(flex_attention)).parameters)
    return {"mask_mod", "BLOCK_SIZE", "seq_lengths"} <= blocks and {"block_mask", "scale", "enable_gqa"} <= call


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    scale: float,
    *,
    causal: bool,
    window: int | None,
    first_only: bool,
) -> torch.Tensor:
    """op.varlen_attention by FlexAttention."""
    asked = {"causal": causal, "window": window, "first_only": first_only}
    seen = seen_by(sequences, **asked)
    mask = sequences.keep(("blocks", *asked.values()), lambda: block_mask(seen, sequences.num_tokens))
    q_1HQD, k_1GTD, v_1GTD = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    y = _compiled()(q_1HQD, k_1GTD, v_1GTD, block_mask=mask, scale=scale, enable_gqa=grouped)
    return y[0].transpose(0, 1).contiguous()


def block_mask(seen: Seen, num_tokens: int) -> Any:
    """torch's BlockMask, made on the device without a Q x T matrix and without a wait of the host."""
    from torch.nn.attention.flex_attention import BlockMask

    num_blocks, blocks = seen.blocks(num_tokens)
    first_Q, last_Q = seen

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= first_Q[query]) & (key <= last_Q[query])

    lengths = len(first_Q), num_tokens
    return BlockMask.from_kv_blocks(
        num_blocks[None, None], blocks[None, None], BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=lengths
    )


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


@cache
def try_flex(num_heads: int, num_key_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Compile FlexAttention for these heads, run forward and backward, and compare with attention under a mask.

    Returns the reason why it cannot be used, or None.
    """
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.of(TRIED_LENGTHS, device)
    asked: dict[str, Any] = {"causal": True, "window": 50, "first_only": False}

    def drawn(heads: int) -> torch.Tensor:
        x = torch.randn(sequences.num_tokens, heads, width, generator=generator)
        return x.to(device, dtype).requires_grad_(True)

    inputs = drawn(num_heads), drawn(num_key_heads), drawn(num_key_heads)
    dy = torch.randn(inputs[0].shape, generator=generator).to(device, dtype)
    try:
        with torch.enable_grad():
            y = flex(*inputs, sequences, width**-0.5, **asked)
            found = y.detach(), *torch.autograd.grad(y, inputs, dy)
    except Exception as error:  # torch's compiler raises many types
        return f"compiling it failed: {type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
    with torch.enable_grad():
        y = by_mask(*inputs, sequences, width**-0.5, **asked)
        expected = y.detach(), *torch.autograd.grad(y, inputs, dy)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected))
    if not error <= TOLERANCE[dtype]:
        return f"it is wrong by {error:.1e} of the norm on this machine"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
