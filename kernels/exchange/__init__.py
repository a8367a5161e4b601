"""Operators by which processes that share a sequence exchange it."""

from .api import gather_heads, gather_tokens, members, named, sum_of_processes

__all__ = ["gather_heads", "gather_tokens", "members", "named", "sum_of_processes"]
