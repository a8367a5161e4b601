"""What the backward kernels need to know of every query beside its rows: one pass over outputs and their gradients."""

import triton
import triton.language as tl

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["heads", "tokens", "blocks"])
def stats_kernel(
    out_ptr,
    grad_ptr,
    lse_ptr,
    stats_ptr,
    out_strides,
    grad_strides,
    heads,
    tokens,
    blocks,
    HEAD_DIM: tl.constexpr,
):
    """stats (B, H, blocks, 2, 64) from out and grad (B, H, S, D) and lse (B, H, S): lse in base 2, then delta.

    delta = sum(grad * out) over the channels. lse is +inf in rows without keys and beyond the end: then the weights,
    which are computed again from it, are exp2(-inf) = 0.
    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = batch * heads + head
    line = tl.arange(0, 64)
    row = (block * 64 + line).to(tl.int64)
    exists = row < tokens
    channel = tl.arange(0, HEAD_DIM)
    out_ptr += batch * out_strides[0] + head.to(tl.int64) * out_strides[1]
    grad_ptr += batch * grad_strides[0] + head.to(tl.int64) * grad_strides[1]
    out = tl.load(out_ptr + row[:, None] * out_strides[2] + channel[None, :], mask=exists[:, None], other=0.0)
    grad = tl.load(grad_ptr + row[:, None] * grad_strides[2] + channel[None, :], mask=exists[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    lse = tl.load(lse_ptr + group * tokens + row, mask=exists, other=float("inf")) * _LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    stats_ptr += (group * blocks + block) * 128
    tl.store(stats_ptr + line, lse)
    tl.store(stats_ptr + 64 + line, delta)
