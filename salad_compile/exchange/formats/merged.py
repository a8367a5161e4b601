"""The format "merged": a checkpoint of the base model with the updates in its weights, and a SALAD file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from salad_compile.exchange.export_format import ExportFormat, ExportOptions, Written

if TYPE_CHECKING:
    import torch.nn as nn

    from salad_compile.exchange.component import Component


class Merged(ExportFormat):
    """W + alpha / rank B A, summed in fp32 and cast once, in shards; gates and projections in the SALAD file."""

    name = "merged"
    summary = "the base with the LoRA merged, and a SALAD file without it; for `from_pretrained` and `load`"
    place = "transformer"
    needs_base = True
    holds_base = True

    def require(self, model: nn.Module) -> None:
        from salad_compile.exchange.merged_checkpoint import require_mergeable

        require_mergeable(model)

    def write(self, component: Component, path: Path, options: ExportOptions) -> Written:
        from salad_compile.exchange.merged_checkpoint import merge_updates, write_checkpoint

        weights, merged = merge_updates(component.model, component.base_state, component.updates)
        write_checkpoint(component, weights, path, options.max_shard_size)
        return Written(len(weights), tuple(merged))

    def loading(self, component: str, cls: str, folder: str) -> str:
        there = f'"{folder}/{self.place}"'
        return f"model = salad_compile.load({cls}.from_pretrained({there}), {there})  # the same"
