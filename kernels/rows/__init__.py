"""Moving rows: the tokens of query, key and value into the token order, and the result back."""

from .api import decompositions, take_rows

__all__ = ["decompositions", "take_rows"]
