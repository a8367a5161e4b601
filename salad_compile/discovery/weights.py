"""The weights of a model while it is probed: in one place where hooks would bring them, and afterwards as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn
from torch import Tensor


@contextlib.contextmanager
def keep_values(model: nn.Module) -> Iterator[None]:
    """Afterwards every parameter and buffer holds the data that it held before, and buffers their values.

    Code that a forward runs may give a tensor other data (`tensor.data = ...`), as hooks do that offload weights: under
    fake tensors that would be the end of the weights. Enter it before the fake mode.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if type(t.data) is Tensor}
    before = [(tensor, tensor.data) for tensor in tensors.values()]
    # `_version` is private: how often a tensor was written into. Seen in torch 2.11 and 2.13;
    # tests/trainers/test_offloading.py fails when it moves.
    buffers = [b for b in model.buffers() if b.device.type != "meta" and not b.is_inference()]
    values = [(buffer, buffer._version, buffer.detach().clone()) for buffer in buffers]
    try:
        yield
    finally:
        for tensor, data in before:
            if tensor.device != data.device or tensor.dtype != data.dtype or tensor.data_ptr() != data.data_ptr():
                tensor.data = data
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)


def gather_weights(model: nn.Module, device: torch.device) -> None:
    """Put fake tensors on `device` in the place of weights that lie elsewhere; the caller puts the attributes back."""
    twins: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.device.type == device.type:
                    continue
                if id(tensor) not in twins:
                    twin = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
                held[name] = twins[id(tensor)]  # type: ignore[assignment]
