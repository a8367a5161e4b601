"""The format "salad": the file of `salad_compile.save`, the only one that holds the fine-tuned model exactly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from salad_compile.exchange.export_format import ExportFormat, ExportOptions, Written
from salad_compile.salad_files.location import FILE_NAME

if TYPE_CHECKING:
    import torch.nn as nn

    from salad_compile.exchange.component import Component


class Salad(ExportFormat):
    """Gates, projections and LoRA, as `load` reads them."""

    name = "salad"
    summary = "gates, projections and LoRA, exactly; for `salad_compile.load`"
    place = FILE_NAME

    def require(self, model: nn.Module) -> None:
        """Every converted model fits."""

    def write(self, component: Component, path: Path, options: ExportOptions) -> Written:
        from salad_compile.salad_files.salad_file import write

        write(component.branch_state, component.header, path)
        return Written(len(component.branch_state))

    def loading(self, component: str, cls: str, folder: str) -> str:
        line = f'model = salad_compile.load(base_model, "{folder}")'
        return f"{line}  # gates, projections and LoRA: the fine-tuned model"
