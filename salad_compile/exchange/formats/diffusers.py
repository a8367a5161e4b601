"""The format "diffusers": LoRA for `pipe.load_lora_weights`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from salad_compile.errors import ExportError
from salad_compile.exchange.export_format import ExportFormat, ExportOptions, Written

if TYPE_CHECKING:
    import torch.nn as nn

    from salad_compile.exchange.component import Component


class Diffusers(ExportFormat):
    """`transformer.<module>.lora_A.weight` (rank, in_features) and `lora_B` (out_features, rank).

    The file has the name that diffusers looks for in a directory. Its metadata holds the arguments of PEFT's
    LoraConfig, with the prefix that diffusers strips from names.
    """

    name = "diffusers"
    summary = "LoRA alone, for `pipe.load_lora_weights`"
    place = "lora/pytorch_lora_weights.safetensors"
    library = "diffusers"

    def require(self, model: nn.Module) -> None:
        from salad_compile.exchange.lora_files import require_lora
        from salad_compile.salad_files.contents import base_class

        require_lora(model)
        if not hasattr(model, "load_lora_adapter"):
            raise ExportError(f"diffusers does not load LoRA into a {base_class(model)}.")

    def write(self, component: Component, path: Path, options: ExportOptions) -> Written:
        from salad_compile.exchange.lora_files import NOTE, lora_config, pairs, write_tensors
        from salad_compile.exchange.low_rank import split_fused

        updates = split_fused(component.model, component.updates)
        config = {f"transformer.{key}": value for key, value in lora_config(updates).items()}
        metadata = {"lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True), "note": NOTE}
        return write_tensors(pairs(updates, "transformer."), path, metadata)

    def loading(self, component: str, cls: str, folder: str) -> str:
        second = ", load_into_transformer_2=True" if component == "transformer_2" else ""
        return f'pipe.load_lora_weights("{folder}/lora"{second})  # LoRA alone, into the base'
