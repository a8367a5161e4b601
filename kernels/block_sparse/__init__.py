"""Block-sparse attention: exact softmax over the key blocks that routing selected."""

from .api import block_sparse_attention

__all__ = ["block_sparse_attention"]
