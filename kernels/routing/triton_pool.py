"""Means over blocks of tokens, and which blocks have a valid token: one program per block."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "tokens", "blocks"])
def pool_kernel(
    x_ptr,
    mask_ptr,
    pooled_ptr,
    strides,
    heads,
    tokens,
    blocks,
    HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """x (B, H, S, D), adjacent channels -> pooled fp32 (B, H, M, D), contiguous. ROWS divides BLOCK."""
    # heads first: in the usual layout their rows lie side by side in memory
    program = tl.program_id(0)
    head = program % heads
    block = program // heads % blocks
    batch = (program // heads // blocks).to(tl.int64)
    channels = tl.arange(0, TILE_D)
    x_ptr += batch * strides[0] + head.to(tl.int64) * strides[1]

    total = tl.zeros((ROWS, TILE_D), tl.float32)
    seen = tl.zeros((ROWS,), tl.int32)
    for start in tl.static_range(0, BLOCK, ROWS):
        positions = block * BLOCK + start + tl.arange(0, ROWS)
        valid = positions < tokens
        rows = positions.to(tl.int64)
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + batch * tokens + rows, mask=valid, other=0) != 0)
        pointers = x_ptr + rows[:, None] * strides[2] + channels[None, :]
        total += tl.load(pointers, mask=valid[:, None] & (channels < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
        seen += valid.to(tl.int32)

    mean = tl.sum(total, 0) / tl.maximum(tl.sum(seen, 0), 1).to(tl.float32)
    pooled_ptr += ((batch * heads + head) * blocks + block) * HEAD_DIM
    tl.store(pooled_ptr + channels, mean, mask=channels < HEAD_DIM)


@triton.jit(do_not_specialize=["tokens", "width", "block_size"])
def valid_blocks_kernel(mask_ptr, valid_ptr, tokens, width, block_size, CHUNK: tl.constexpr):
    """mask uint8 (B, S) -> valid uint8 (B, width): 1 where a block has a valid token."""
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offsets = tl.arange(0, CHUNK)
    seen = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, block_size, CHUNK):
        positions = block * block_size + start + offsets
        in_range = (start + offsets < block_size) & (positions < tokens)
        seen |= tl.load(mask_ptr + batch * tokens + positions, mask=in_range, other=0).to(tl.int32)
    tl.store(valid_ptr + batch * width + block, (tl.max(seen, 0) != 0).to(tl.uint8))
