"""SALAD in ComfyUI. Link this folder into ComfyUI's `custom_nodes`; README.md says how, and what else to know."""

from __future__ import annotations

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
