"""SALAD files of an earlier state of the code, with the outputs that the models had then: `files/`.

Written at commit d389b51 (format version 4), before the package was arranged in rooms, by

    python tests/salad_compile/salad_files/saved_files.py write      # never again for an existing case
    python tests/salad_compile/salad_files/saved_files.py compare    # bit for bit, on a machine of the same kind

`<case>.safetensors` is what `salad_compile.save` wrote; `<case>.output.safetensors` has the output of the model in fp32
and, for a merged base, its merged weights. Weights and inputs come from integer arithmetic, equal on every machine.
Only the public names of the package are used, so that the script runs with every state of the code.
"""

from __future__ import annotations

import dataclasses
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch import Tensor

import salad_compile
from tests.models.registry import ALL_CASES

FILES = Path(__file__).with_name("files")
TINY = salad_compile.SaladConfig(
    compensation="none", sparsity=0.7, query_block=32, key_block=16, lora_rank=3, lora_alpha=6.0, min_tokens=90
)


@dataclass(frozen=True)
class Saved:
    """A model of the zoo, what its conversion changes in :data:`TINY`, and what happened to it before it was saved."""

    model: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    drop_fraction: float = 0.0
    merged: bool = False


SAVED = {
    "grid": Saved("Wan"),
    "joint-text": Saved("HunyuanVideo"),
    "windows": Saved("Wan", {"pattern": "stswa", "window": 40, "scaling": "v2"}),
    "head-gate": Saved("handwritten_rearrange", {"gate": "head", "feature_map": "elu", "token_order": "flat"}),
    "sites-differ": Saved(
        "handwritten_fused",
        {
            "compensation": "none",
            "overrides": {"blocks.0.*": {"sparsity": 0.5}},
            "lowest_sparsity": 0.3,
            "rope_placement": "rotate-then-map",
            "lora_targets": ("query", "out"),
        },
    ),
    "dropped": Saved("handwritten_inline", {"feature_map": "softmax"}, drop_fraction=0.5),
    "multihead": Saved("handwritten_multihead"),
    "merged": Saved("handwritten_fused", {"gate": "none"}, merged=True),
}


def uniform(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    """Values in [-1, 1) of fp32, the same on every machine: a hash of 32 bits (two rounds of xor and multiply)."""
    size = 1
    for length in shape:
        size *= length
    low = 0xFFFFFFFF
    x = (torch.arange(size, dtype=torch.int64) + seed * 7919) & low
    for shift, factor in ((16, 0x7FEB352D), (15, 0x45D9F3B)):
        x = ((x ^ (x >> shift)) * factor) & low
    x = x ^ (x >> 16)
    return ((x >> 8).float() / 2**23 - 1).reshape(shape)


def fill(model: nn.Module, *, branches: bool) -> None:
    """Draw the parameters of the SALAD branches, or all others: matrices by fan-in, weights of norms around 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (".salad." in f".{name}") != branches or not parameter.is_floating_point():
                continue
            values = uniform(parameter.shape, zlib.crc32(name.encode()))
            if branches:
                values = 0.7 * values / (parameter.shape[-1] if parameter.ndim > 1 else 1) ** 0.5
            elif parameter.ndim > 1:
                values = (3 / parameter[0].numel()) ** 0.5 * values
            else:
                values = 1 + 0.2 * values if name.endswith("weight") else 0.3 * values
            parameter.copy_(values)


def base(saved: Saved) -> nn.Module:
    """The base model in fp32, before conversion and before any merging."""
    model = ALL_CASES[saved.model].build()
    fill(model, branches=False)
    return model


def inputs(saved: Saved) -> dict[str, Any]:
    """The inputs of the zoo's case at its first resolution, random ones replaced."""
    given: dict[str, Any] = ALL_CASES[saved.model].inputs(0)
    return {
        name: uniform(value.shape, zlib.crc32(name.encode()))
        if isinstance(value, Tensor) and value.is_floating_point() and value.unique().numel() > 4
        else value
        for name, value in given.items()
    }


def output(saved: Saved, model: nn.Module) -> Tensor:
    """What the model returns, uncompiled."""
    with torch.no_grad():
        return ALL_CASES[saved.model].output(model(**inputs(saved))).contiguous()


def load(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The loaded model, its output, and the output that was stored with the file."""
    saved, stored = SAVED[name], load_file(FILES / f"{name}.output.safetensors")
    expected = stored.pop("output")
    model = base(saved)
    model.load_state_dict(stored, strict=False)  # merged weights
    salad_compile.load(model, FILES / f"{name}.safetensors")
    return model, output(saved, model), expected


def write(name: str) -> None:
    """Convert, fill the branches, and save the file with the output."""
    saved, model = SAVED[name], base(SAVED[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    salad_compile.convert(model, dataclasses.replace(TINY, **saved.changes), example_inputs=inputs(saved))
    fill(model, branches=True)
    if saved.drop_fraction:
        salad_compile.drop_branches(model, [inputs(saved)], fraction=saved.drop_fraction)
    if saved.merged:
        salad_compile.merge_lora(model)
    FILES.mkdir(exist_ok=True)
    salad_compile.save(model, FILES / f"{name}.safetensors")
    merged = {key: value for key, value in model.state_dict().items() if key in before and (value != before[key]).any()}
    save_file({"output": output(saved, model), **merged}, FILES / f"{name}.output.safetensors")


def main(action: str) -> int:
    """`write` the cases that are missing, or `compare` all bit for bit; 1 if one differs."""
    different = 0
    for name in SAVED:
        if action == "write":
            if not (FILES / f"{name}.safetensors").exists():
                write(name)
            continue
        _, actual, expected = load(name)
        equal = torch.equal(actual, expected)
        different += not equal
        print(f"{name:14} {'equal bit for bit' if equal else f'differs by {(actual - expected).abs().max():.1e}'}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
