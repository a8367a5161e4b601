"""What happens to a projected query or key before attention: norm, features, rotation, token order and block means."""

from .api import prepare_operand

__all__ = ["prepare_operand"]
