"""Helpers of the LoRA formats. alpha / rank is multiplied into B, so that every reader's scale is 1.

A file holds no gate: one gate tensor makes `pipe.load_lora_weights` refuse all of it. Readers assume alpha = rank by
default; the files state it where the format has a place for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

from salad_compile.calls.multihead import in_projection_owner
from salad_compile.common.projections import is_convolution
from salad_compile.errors import ExportError
from salad_compile.exchange.export_format import Written
from salad_compile.exchange.low_rank import LowRank
from salad_compile.sites.branch import branches

NOTE = (
    "The low-rank part of a SALAD model (salad_compile). Without SALAD attention and its gates this loads, but it is "
    "not the fine-tuned model."
)


def require_lora(model: nn.Module) -> None:
    """Check that the model has updates that a LoRA file can hold.

    Raises:
        ExportError: there is no LoRA, or it is inside an nn.MultiheadAttention or a convolution.
    """
    known = branches(model).values()
    if not any(branch.lora_roles for branch in known):
        raise ExportError("there is no LoRA (lora_rank=0, or merged), and gates have no place in a LoRA file.")
    for branch in known:
        for name in branch.record.projections().values():
            if in_projection_owner(model, name) is not None:
                raise ExportError(
                    f"{name!r} is inside an nn.MultiheadAttention, whose own forward would not apply the update."
                )
            if is_convolution(model.get_submodule(name)):
                raise ExportError(f"{name!r} is a convolution, for which readers expect factors of another shape.")


def pairs(updates: Sequence[LowRank], prefix: str) -> dict[str, Tensor]:
    """`<prefix><module>.lora_A.weight` (rank, in_features) and `lora_B` (out_features, rank)."""
    tensors: dict[str, Tensor] = {}
    for update in updates:
        down, up = update.pair()
        tensors |= {f"{prefix}{update.name}.lora_A.weight": down, f"{prefix}{update.name}.lora_B.weight": up}
    return tensors


def lora_config(updates: Sequence[LowRank]) -> dict[str, Any]:
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


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> Written:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), file, metadata={"format": "pt", **metadata})
    return Written(len(tensors))
