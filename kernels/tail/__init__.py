"""The tail: what block-sparse attention leaves out, as means of pools of tokens in the same softmax."""

from .api import attend_with_tail, tail_tokens
from .means import tail_means
from .moved import take_rows_with_means

__all__ = ["attend_with_tail", "tail_means", "tail_tokens", "take_rows_with_means"]
