"""Pure LoRA files as diffusers, ComfyUI and PEFT read them; alpha / rank is in B, so that every reader's scale is 1.

A file holds no gate: one gate tensor makes `pipe.load_lora_weights` refuse all of it. Readers assume alpha = rank where
they are not told; the files say so where the format has a place for it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salad_compile.exchange.low_rank import LowRank
from salad_compile.exchange.naming import original_name

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # where diffusers looks in a directory
COMFYUI_FILE = "comfyui_lora.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")

NOTE = (
    "The low-rank part of a SALAD model (salad_compile). Without SALAD attention and its gates this loads, but it is "
    "not the fine-tuned model."
)


def diffusers_tensors(updates: Sequence[LowRank]) -> dict[str, Tensor]:
    """`transformer.<module>.lora_A.weight` (rank, in_features) and `lora_B` (out_features, rank)."""
    return _pairs(updates, "transformer.")


def diffusers_metadata(updates: Sequence[LowRank]) -> dict[str, str]:
    """The file's metadata: the arguments of peft's LoraConfig, with the prefix that diffusers strips from names."""
    prefixed = {f"transformer.{key}": value for key, value in _lora_config(updates).items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(prefixed, indent=2, sort_keys=True), "note": NOTE}


def comfyui_tensors(updates: Sequence[LowRank]) -> dict[str, Tensor]:
    """`diffusion_model.<original module>.lora_A.weight`, `.lora_B.weight`, and `.alpha` () = rank in fp32.

    Raises:
        ConfigError: a projection that Wan does not have.
    """
    tensors: dict[str, Tensor] = {}
    for update in updates:
        module = f"diffusion_model.{original_name(update.name)}"
        down, up = update.pair()
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(float(update.rank))
    return tensors


def comfyui_metadata() -> dict[str, str]:
    """The file's metadata."""
    return {"format": "pt", "note": NOTE}


def peft_tensors(updates: Sequence[LowRank]) -> dict[str, Tensor]:
    """`base_model.model.<module>.lora_A.weight` and `lora_B`."""
    return _pairs(updates, "base_model.model.")


def peft_config(updates: Sequence[LowRank], base_model: str | None) -> dict[str, Any]:
    """The contents of `adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        **_lora_config(updates),
    }


def write_lora(updates: Sequence[LowRank], file: Path, kind: str, base_model: str | None = None) -> dict[str, Tensor]:
    """Write the LoRA of `kind` "diffusers" or "comfyui" to `file`, or of "peft" into the directory `file`.

    Returns:
        The tensors that were written.
    """
    from safetensors.torch import save_file

    metadata: Mapping[str, str]
    if kind == "diffusers":
        tensors, metadata = diffusers_tensors(updates), diffusers_metadata(updates)
    elif kind == "comfyui":
        tensors, metadata = comfyui_tensors(updates), comfyui_metadata()
    else:
        tensors, metadata = peft_tensors(updates), {"format": "pt"}
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "peft":
        file.mkdir()
        (file / PEFT_FILES[0]).write_text(json.dumps(peft_config(updates, base_model), indent=2) + "\n")
        file = file / PEFT_FILES[1]
    save_file(tensors, file, metadata=dict(metadata))
    return tensors


def _pairs(updates: Sequence[LowRank], prefix: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for update in updates:
        down, up = update.pair()
        tensors |= {f"{prefix}{update.name}.lora_A.weight": down, f"{prefix}{update.name}.lora_B.weight": up}
    return tensors


def _lora_config(updates: Sequence[LowRank]) -> dict[str, Any]:
    """Arguments of peft's LoraConfig; `^` because peft also takes a pattern for the end of a longer name."""
    rank = Counter(update.rank for update in updates).most_common(1)[0][0]
    others = {f"^{update.name}": update.rank for update in updates if update.rank != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(update.name for update in updates),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
