"""The plain-torch engine: the definition itself, on any device."""

from __future__ import annotations

from .reference import prepare_operand

__all__ = ["prepare_operand"]
