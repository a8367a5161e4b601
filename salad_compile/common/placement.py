"""Device and dtype of a model's inputs."""

from __future__ import annotations

import torch
import torch.nn as nn

from salad_compile.common.foreign_hooks import execution_device


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for the inputs of a model: those of its parameters, float32 on the CPU if it has none."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    if not parameters:
        return torch.device("cpu"), torch.float32
    # the dtype of most parameters stands for the model: some keep norms and embeddings in fp32
    counts: dict[torch.dtype, int] = {}
    for parameter in parameters:
        if parameter.dtype.itemsize > 1:  # not 8-bit storage formats
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    # hooks may keep weights elsewhere while the model does not run
    offloaded = next((place for m in model.modules() if (place := execution_device(m)) is not None), None)
    return offloaded or parameters[0].device, max(counts, key=counts.__getitem__, default=torch.float32)
