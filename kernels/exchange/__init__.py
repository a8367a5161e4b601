"""Operators by which processes that share a sequence exchange it."""

from .api import (
    first_head,
    gather_heads,
    gather_tokens,
    group_name,
    members,
    own_blocks,
    splits_heads,
    sum_of_processes,
)

__all__ = [
    "first_head",
    "gather_heads",
    "gather_tokens",
    "group_name",
    "members",
    "own_blocks",
    "splits_heads",
    "sum_of_processes",
]
