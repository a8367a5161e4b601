"""A small call of every kernel, forward and backward: `python -m tests.kernels.gpu.small_calls NAME`.

`tools/sanitize.py` runs each under compute-sanitizer in a process of its own. Inputs are drawn on the CPU, so that the
device runs little else.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch

from salad_compile.kernels import (
    attend_with_tail,
    block_sparse_attention,
    linear_output,
    linear_state,
    pool_blocks,
    prepare_operand,
    select_blocks,
    select_by_mass,
    tail_means,
    tail_tokens,
    take_rows_with_means,
    use_engine,
)
from tests.kernels.helpers import make_qkv, make_selection
from tests.kernels.prepare.cases import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, HEADS, POOL, SCALE = 331, 2, 64, 0.125  # ragged blocks, no multiple of 16


def _qkv(device: str, dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, ...]:
    drawn = make_qkv(TOKENS, "fused", dtype, batch=1, heads=HEADS, head_dim=head_dim)
    return tuple(x.to(device).requires_grad_() for x in drawn)


def _lists(qkv: tuple[torch.Tensor, ...], query_block: int) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, _ = (x.detach().cpu() for x in qkv)
    lut, count = make_selection(query, key, query_block, 64, 400)
    return lut.to(qkv[0].device), count.to(qkv[0].device)


def _mask(device: str, masked: bool) -> torch.Tensor | None:
    return (torch.arange(TOKENS) % 5 != 2).expand(1, -1).contiguous().to(device) if masked else None


def _differentiate(outputs: tuple[torch.Tensor, ...], inputs: list[torch.Tensor]) -> None:
    draw = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=draw).to(x.dtype).to(x.device) for x in outputs]
    torch.autograd.grad(outputs, inputs, grads)


def sparse(engine: str, dtype: torch.dtype, head_dim: int, query_block: int, masked: bool, device: str) -> None:
    """Block-sparse attention, the lists turned round, both gradient kernels."""
    qkv, mask = _qkv(device, dtype, head_dim), _mask(device, masked)
    lists = _lists(qkv, query_block)
    with use_engine(engine):
        out, _ = block_sparse_attention(*qkv, *lists, query_block, 64, SCALE, mask)
        _differentiate((out,), list(qkv))


def tail(engine: str, dtype: torch.dtype, head_dim: int, query_block: int, masked: bool, device: str) -> None:
    """The same with pools: counting, means (without a mask of values that are moved), attention and all gradients."""
    qkv, mask = _qkv(device, dtype, head_dim), _mask(device, masked)
    (query, key, value), lists = qkv, _lists(qkv, query_block)
    weight = torch.linspace(-0.5, 0.5, HEADS, device=device).requires_grad_()
    with use_engine("triton"):
        counted = tail_tokens(*lists, TOKENS, 64, POOL, 0, TOKENS, mask)
        means = [tail_means(key, POOL, 0, TOKENS, mask, pool_blocks(key.detach(), 64, mask), 64)]
        if mask is None:
            order = torch.arange(TOKENS, dtype=torch.int32, device=device).flip(0)
            value, pooled = take_rows_with_means(value, order, order, POOL, 0, TOKENS)
            means.append(pooled)
        else:
            means.append(tail_means(value, POOL, 0, TOKENS, mask))
    with use_engine(engine):
        out, _ = attend_with_tail(query, key, value, *means, counted, weight, *lists, query_block, 64, SCALE, mask)
        _differentiate((out,), [*qkv, weight])


def routing(dtype: torch.dtype, head_dim: int, masked: bool, device: str) -> None:
    """Means of blocks and the choice among them."""
    query, key, _ = (x.detach() for x in _qkv(device, dtype, head_dim))
    mask = _mask(device, masked)
    with use_engine("triton"):
        pooled = pool_blocks(query, 128), pool_blocks(key, 64, mask)
        select_blocks(*pooled, 128, 64, 400, 0, 64, mask)


def mass(dtype: torch.dtype, head_dim: int, cell: int, masked: bool, device: str) -> None:
    """Rows of cells, their softmax, what means of blocks get wrong, and the choice among them."""
    query, key, value = (x.detach() for x in _qkv(device, dtype, head_dim))
    mask = _mask(device, masked)
    with use_engine("triton"):
        select_by_mass(query, key, value, cell, SCALE, 128, 64, 400, 0, 64, mask)
        select_by_mass(query, key, None, cell, SCALE, 16, 16, 400, 0, 0, mask)


def linear(dtype: torch.dtype, head_dim: int, feature_map: str, masked: bool, device: str) -> None:
    """State and output of the linear branch, with the rotation after the features, and their gradients."""
    query, key, value = _qkv(device, dtype, head_dim)
    rotated = [(x.detach() * 0.5 + 1).requires_grad_() for x in (query, key)]
    with use_engine("triton"):
        state, key_sum = linear_state(key, value, feature_map, _mask(device, masked), rotated[1])
        out = linear_output(query, state, key_sum, feature_map, 1e-6, rotated[0])
        _differentiate((out,), [query, key, value, *rotated])


def prepare(case: Case, dtype: torch.dtype, device: str) -> None:
    """Norm, position, features, order and block means of an operand."""
    with use_engine("triton"):
        prepare_operand(*case.arguments(dtype, device))


WAN = Case(heads=3, head_dim=128, turned=64, tokens=TOKENS, block=128)
LTX = Case(heads=4, head_dim=64, turned=32, tables=4, table_heads=True, tokens=TOKENS, block=64, fused=True)
CALLS: dict[str, Callable[[str], None]] = {
    **{
        f"gluon attention d{head_dim} {block}x64{' mask' * masked}": functools.partial(
            sparse, "gluon", BF16, head_dim, block, masked
        )
        for head_dim, block, masked in ((128, 128, False), (128, 64, True), (64, 128, False), (64, 64, False))
    },
    **{
        f"gluon tail d{head_dim} {block}x64": functools.partial(tail, "gluon", BF16, head_dim, block, False)
        for head_dim, block in ((128, 128), (64, 64))
    },
    "triton attention bf16 d128 128x64": functools.partial(sparse, "triton", BF16, 128, 128, False),
    "triton attention fp16 d64 64x64 mask": functools.partial(sparse, "triton", FP16, 64, 64, True),
    "triton attention fp32 d64 64x64": functools.partial(sparse, "triton", FP32, 64, 64, False),
    "triton tail bf16 d128 128x64 mask": functools.partial(tail, "triton", BF16, 128, 128, True),
    "triton routing bf16 d128": functools.partial(routing, BF16, 128, False),
    "triton routing fp32 d80 mask": functools.partial(routing, FP32, 80, True),
    "triton mass bf16 d128 cells of 16": functools.partial(mass, BF16, 128, 16, False),
    "triton mass fp32 d80 cells of 8 mask": functools.partial(mass, FP32, 80, 8, True),
    "triton linear bf16 d128 relu": functools.partial(linear, BF16, 128, "relu", False),
    "triton linear fp16 d64 softmax mask": functools.partial(linear, FP16, 64, "softmax", True),
    "triton prepare bf16 Wan": functools.partial(prepare, WAN, BF16),
    "triton prepare fp16 LTX": functools.partial(prepare, LTX, FP16),
}


def main() -> None:
    """Run one call and wait for the device, which says what went wrong."""
    CALLS[sys.argv[1]]("cuda")
    torch.cuda.synchronize()
    print("ran", sys.argv[1])


if __name__ == "__main__":
    main()
