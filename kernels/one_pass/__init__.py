"""Routing's means and linear attention in one pass over the keys and values, and one over the queries."""

from .api import pool_and_read, pool_and_summarise

__all__ = ["pool_and_read", "pool_and_summarise"]
