"""Means over blocks of tokens, and which blocks have a valid token: one program per block."""

import triton
import triton.language as tl


@triton.jit
def _tokens(order_ptr, positions, tokens, HAS_ORDER: tl.constexpr):
    """Native indices of the tokens at `positions` of the order; an entry outside it is clamped, never followed."""
    if HAS_ORDER:
        native = tl.load(order_ptr + positions, mask=positions < tokens, other=0)
        native = tl.minimum(tl.maximum(native, 0), tokens - 1)
    else:
        native = positions
    return native


@triton.jit(do_not_specialize=["heads", "tokens", "blocks"])
def pool_kernel(
    x_ptr,
    order_ptr,
    mask_ptr,
    pooled_ptr,
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    heads,
    tokens,
    blocks,
    HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """x (B, H, S, D), any strides -> pooled fp32 (B, H, M, D), contiguous. ROWS divides BLOCK."""
    # heads first: in the usual layout their rows lie side by side in memory
    program = tl.program_id(0)
    head = program % heads
    block = program // heads % blocks
    batch = (program // heads // blocks).to(tl.int64)
    channels = tl.arange(0, TILE_D)
    x_ptr += batch * stride_b + head.to(tl.int64) * stride_h

    total = tl.zeros((ROWS, TILE_D), tl.float32)
    seen = tl.zeros((ROWS,), tl.int32)
    for start in tl.static_range(0, BLOCK, ROWS):
        positions = block * BLOCK + start + tl.arange(0, ROWS)
        valid = positions < tokens
        native = _tokens(order_ptr, positions, tokens, HAS_ORDER).to(tl.int64)
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + batch * tokens + native, mask=valid, other=0) != 0)
        pointers = x_ptr + native[:, None] * stride_s + channels[None, :] * stride_d
        total += tl.load(pointers, mask=valid[:, None] & (channels < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
        seen += valid.to(tl.int32)

    mean = tl.sum(total, 0) / tl.maximum(tl.sum(seen, 0), 1).to(tl.float32)
    pooled_ptr += ((batch * heads + head) * blocks + block) * HEAD_DIM
    tl.store(pooled_ptr + channels, mean, mask=channels < HEAD_DIM)


@triton.jit(do_not_specialize=["tokens", "width", "block_size"])
def valid_blocks_kernel(
    mask_ptr, order_ptr, valid_ptr, tokens, width, block_size, CHUNK: tl.constexpr, HAS_ORDER: tl.constexpr
):
    """mask uint8 (B, S) in native order -> valid uint8 (B, width): 1 where a block of the order has a valid token."""
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offsets = tl.arange(0, CHUNK)
    seen = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, block_size, CHUNK):
        positions = block * block_size + start + offsets
        in_range = (start + offsets < block_size) & (positions < tokens)
        native = _tokens(order_ptr, positions, tokens, HAS_ORDER).to(tl.int64)
        seen |= tl.load(mask_ptr + batch * tokens + native, mask=in_range, other=0).to(tl.int32)
    tl.store(valid_ptr + batch * width + block, (tl.max(seen, 0) != 0).to(tl.uint8))
