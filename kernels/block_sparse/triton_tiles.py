"""Pieces that the forward and the backward kernels share: reading a list of blocks, and loading rows of tokens.

Ids of blocks that come from memory are clamped to their range, or read through the bulk copy engine, which
has bounds of its own: a wrong list reads the wrong block and never foreign memory. `deferred.py` reports such lists.
"""

import triton
import triton.language as tl


@triton.jit
def listed_blocks(count_ptr, slots, key_blocks):
    """How many key blocks a query block attends to, and whether they are all of them, unlisted (a negative count)."""
    count = tl.load(count_ptr)
    everything = count < 0
    return tl.where(everything, key_blocks, tl.minimum(count, slots)), everything


@triton.jit
def block_id(list_ptr, entry, everything, blocks, UNCHECKED: tl.constexpr):
    """The entry-th block of a list; the entry itself where everything is attended to.

    UNCHECKED: where only the bulk copy engine uses the id, which reads 0 where no block is. Otherwise it stays below
    `blocks`.
    """
    block = tl.where(everything, entry, tl.load(list_ptr + tl.where(everything, 0, entry)))
    return block if UNCHECKED else tl.minimum(tl.maximum(block, 0), blocks - 1)


@triton.jit
def load_rows(ptr, rows, in_range, stride, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """A (rows, TILE) tile; rows that are not in_range, unless that is None, and channels beyond WIDTH are 0."""
    channels = tl.arange(0, TILE)
    pointers = ptr + rows[:, None] * stride + channels[None, :]
    if in_range is None:
        tile = tl.load(pointers) if WIDTH == TILE else tl.load(pointers, (channels < WIDTH)[None, :], 0.0)
    elif WIDTH == TILE:
        tile = tl.load(pointers, in_range[:, None], 0.0)
    else:
        tile = tl.load(pointers, in_range[:, None] & (channels < WIDTH)[None, :], 0.0)
    return tile


@triton.jit
def load_described(descriptor, start, ROWS: tl.constexpr, TILE: tl.constexpr):
    """A (ROWS, TILE) tile of this program's batch and head from a descriptor of (B, H, S, D); outside it is 0."""
    tile = descriptor.load([tl.program_id(2), tl.program_id(1), start, 0])
    return tile.reshape([ROWS, TILE])


@triton.jit
def load_tile(
    source, start, rows, in_range, stride, WIDTH: tl.constexpr, TILE: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """A (rows, TILE) tile of the tokens `rows`, which are those from `start` on.

    source: a descriptor if DESCRIPTORS, else a pointer to this program's batch and head. in_range: see `load_rows`.
    """
    if DESCRIPTORS:
        tile = load_described(source, start, rows.shape[0], TILE)
    else:
        tile = load_rows(source, rows, in_range, stride, WIDTH, TILE)
    return tile
