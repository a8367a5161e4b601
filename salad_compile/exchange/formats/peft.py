"""The format "peft": LoRA as an adapter of PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from salad_compile.exchange.export_format import ExportFormat, ExportOptions, Written

if TYPE_CHECKING:
    import torch.nn as nn

    from salad_compile.exchange.component import Component


class Peft(ExportFormat):
    """`adapter_config.json`, and `base_model.model.<module>.lora_A.weight` and `lora_B`.

    PEFT adapts the module that it is given, so that projections which diffusers fused keep their one pair.
    """

    name = "peft"
    summary = "LoRA alone, for `peft.PeftModel.from_pretrained`"
    place = "lora/peft"

    def require(self, model: nn.Module) -> None:
        from salad_compile.exchange.lora_files import require_lora

        require_lora(model)

    def write(self, component: Component, path: Path, options: ExportOptions) -> Written:
        from salad_compile.exchange.lora_files import lora_config, pairs, write_tensors

        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": options.base_model,
            "task_type": None,
            "inference_mode": True,
            "bias": "none",
            "lora_dropout": 0.0,
            **lora_config(component.updates),
        }
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        return write_tensors(pairs(component.updates, "base_model.model."), path / "adapter_model.safetensors", {})

    def loading(self, component: str, cls: str, folder: str) -> str:
        return f'model = peft.PeftModel.from_pretrained(base_model, "{folder}/lora/peft")  # LoRA alone, into the base'
