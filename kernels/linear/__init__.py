"""Linear attention: a global summary of all tokens, read by every query."""

from .api import linear_output, linear_state

__all__ = ["linear_output", "linear_state"]
