"""Sliding windows: the key blocks near each query block in the order of the tokens, no scores needed."""

from .api import window_blocks
from .reach import reach_in_tokens

__all__ = ["reach_in_tokens", "window_blocks"]
