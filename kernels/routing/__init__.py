"""Routing: from queries and keys to the list of key blocks each query block attends to."""

from .api import pool_blocks, select_blocks
from .density import kept_blocks

__all__ = ["kept_blocks", "pool_blocks", "select_blocks"]
