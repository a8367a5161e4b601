"""Key blocks by the share of the softmax that the means of small cells give them, or by what a mean of them hides."""

from .api import select_by_mass

__all__ = ["select_by_mass"]
