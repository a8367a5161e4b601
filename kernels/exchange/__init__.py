"""Operators by which processes that share a sequence exchange it."""

from .api import (
    backend_of,
    first_head,
    gather_heads,
    gather_tokens,
    group_name,
    members,
    own_blocks,
    splits_heads,
    sum_of_processes,
)
from .in_flight import finish_heads, finish_tokens, start_heads, start_tokens

__all__ = [
    "backend_of",
    "finish_heads",
    "finish_tokens",
    "first_head",
    "gather_heads",
    "gather_tokens",
    "group_name",
    "members",
    "own_blocks",
    "splits_heads",
    "start_heads",
    "start_tokens",
    "sum_of_processes",
]
