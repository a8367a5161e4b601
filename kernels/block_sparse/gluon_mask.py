"""A key mask as bits: one word for every key block, which the Gluon forward reads where it would read 64 bytes."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "words"])
def pack_mask_kernel(mask_ptr, words_ptr, tokens, words, WORDS: tl.constexpr):
    """words (B, W) int64 from mask (B, S) bytes: bit i of word w is key 64 w + i, and 0 beyond the end."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 64)
    key = word[:, None] * 64 + bit[None, :]
    row = mask_ptr + tl.program_id(1).to(tl.int64) * tokens
    kept = tl.load(row + key, mask=key < tokens, other=0) != 0
    packed = tl.sum(kept.to(tl.int64) << bit[None, :], 1)
    tl.store(words_ptr + tl.program_id(1).to(tl.int64) * words + word, packed, mask=word < words)
