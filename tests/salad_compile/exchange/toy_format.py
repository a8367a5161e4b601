"""A format that the package does not have: all of it is in this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from salad_compile.errors import ExportError
from salad_compile.exchange import ExportFormat, register_format
from salad_compile.exchange.export_format import ExportOptions, Written

if TYPE_CHECKING:
    import torch.nn as nn

    from salad_compile.exchange.component import Component


@register_format
class Shapes(ExportFormat):
    """The shape of every tensor of the branches, as JSON; of models with a `blocks` list only."""

    name = "shapes"
    summary = "shapes of the branches, for nobody"
    place = "shapes/branches.json"

    def require(self, model: nn.Module) -> None:
        if not hasattr(model, "blocks"):
            raise ExportError(f"a {type(model).__name__} has no blocks.")

    def write(self, component: Component, path: Path, options: ExportOptions) -> Written:
        path.parent.mkdir()
        shapes = {name: list(tensor.shape) for name, tensor in component.branch_state.items()}
        path.write_text(json.dumps({"base": options.base_model, "shapes": shapes}))
        return Written(len(shapes))

    def loading(self, component: str, cls: str, folder: str) -> str:
        return f'json.load(open("{folder}/{self.place}"))'
