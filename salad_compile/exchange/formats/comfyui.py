"""The format "comfyui": LoRA under the names of Wan's original release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from salad_compile.errors import ExportError
from salad_compile.exchange.export_format import ExportFormat, ExportOptions, Written
from salad_compile.salad_files.naming import WAN_CLASSES, original_name

if TYPE_CHECKING:
    import torch.nn as nn
    from torch import Tensor

    from salad_compile.exchange.component import Component


class ComfyUI(ExportFormat):
    """`diffusion_model.<original module>.lora_A.weight`, `.lora_B.weight`, and `.alpha` () = rank in fp32."""

    name = "comfyui"
    summary = "LoRA alone, for ComfyUI: the original names of Wan"
    place = "lora/comfyui_lora.safetensors"

    def require(self, model: nn.Module) -> None:
        from salad_compile.exchange.lora_files import require_lora
        from salad_compile.salad_files.contents import base_class

        require_lora(model)
        cls = base_class(model)
        if cls not in WAN_CLASSES:
            raise ExportError(f"ComfyUI's names are known for {' and '.join(WAN_CLASSES)}, not for {cls}.")

    def write(self, component: Component, path: Path, options: ExportOptions) -> Written:
        import torch

        from salad_compile.exchange.lora_files import NOTE, write_tensors
        from salad_compile.exchange.low_rank import split_fused

        tensors: dict[str, Tensor] = {}
        for update in split_fused(component.model, component.updates):
            module = f"diffusion_model.{original_name(update.name)}"
            down, up = update.pair()
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            tensors[f"{module}.alpha"] = torch.tensor(float(update.rank))
        return write_tensors(tensors, path, {"note": NOTE})
