"""Pools of what the lists leave out, as the Gluon kernels take them: further keys and values, and a bias for each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launch
from ..pools import Pools
from .gluon_settings import POOLS_WIDTH

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["query_blocks", "heads", "pools", "width"])
def pool_bias_kernel(tokens_ptr, weight_ptr, bias_ptr, query_blocks, heads, pools, width, factor, CHUNK: tl.constexpr):
    """bias (B, H, Mq, W) = factor (log2 tokens + weight in base 2); -inf for pools of no tokens, and beyond the P."""
    row = tl.program_id(0).to(tl.int64)
    weight = 0.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row // query_blocks % heads).to(tl.float32) * _LOG2E
    for begin in range(0, width, CHUNK):
        pool = begin + tl.arange(0, CHUNK)
        tokens = tl.load(tokens_ptr + row * pools + pool, mask=pool < pools, other=0.0)
        bias = (tl.log2(tl.where(tokens > 0, tokens, 1.0)) + weight) * factor
        tl.store(bias_ptr + row * width + pool, tl.where(tokens > 0, bias, float("-inf")))


def bias_of(pools: Pools, factor: float) -> torch.Tensor:
    """fp32 (B, H, Mq, W), `factor` times what is added to the scores of pools in base 2; W a multiple of the step."""
    batch, heads, query_blocks, count = pools.tokens.shape
    width = -(-count // POOLS_WIDTH) * POOLS_WIDTH
    bias = pools.tokens.new_empty((batch, heads, query_blocks, width))
    weight = None if pools.log_weight is None else pools.log_weight.to(torch.float32).contiguous()
    launch(
        pool_bias_kernel,
        (batch * heads * query_blocks,),
        bias.device,
        *(pools.tokens.contiguous(), weight, bias, query_blocks, heads, count, width, factor),
        CHUNK=POOLS_WIDTH,
        num_warps=1,
    )
    return bias
