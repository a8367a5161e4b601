"""Linears of bitsandbytes in the blocks of a model, as diffusers' quantiser puts them there when it loads one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

# what 8 and 4 bits lose of a tiny model's output, several times over
DENSE_LOSS = {"8bit": 0.04, "4bit": 0.3}


def bits_and_bytes(model: Any, kind: str, dtype: torch.dtype) -> Any:
    """Replace the Linears of its blocks; what they compute in is `dtype`. Skips the test without bitsandbytes."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes: `make test-composition` installs it")
    linears = [(name, each) for name, each in model.blocks.named_modules() if isinstance(each, torch.nn.Linear)]
    for name, linear in linears:
        sizes, device, weight = (linear.in_features, linear.out_features), linear.weight.device, linear.weight.data
        if kind == "8bit":
            there = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
            there.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            there = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
            there.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
        there.bias = linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.blocks.get_submodule(parent), leaf, there.to(device))  # where they are quantised
    return model
