"""Operators by which processes that share a sequence exchange it."""

from .api import gather_heads, gather_tokens, group_name, members, sum_of_processes

__all__ = ["gather_heads", "gather_tokens", "group_name", "members", "sum_of_processes"]
