"""set_trainable(model): let the branches of a converted model be trained, or not."""

from __future__ import annotations

from typing import Any

from salad_compile.common.wrappers import bare_components
from salad_compile.sites import frozen_warning
from salad_compile.sites.branch import branches_in


def set_trainable(model: Any, on: bool = True) -> int:
    """Let gates, projections and low-rank updates of every site be trained, or freeze them; nothing else is touched.

    Adapter verbs of diffusers and peft (`load_lora_weights`, `add_adapter`) freeze every parameter of a model, ours
    too, and unloading the adapter does not set it back: call this afterwards, and before the optimizer is made.

    Args:
        model: a converted model (wrapped or not) or pipeline. on: False freezes, and nobody is warned of it.

    Returns:
        How many parameters (numbers, not tensors) the branches have on this process.

    Raises:
        NotConvertedError: nothing is converted.
    """
    known = [branch for _, branch in branches_in(bare_components(model))]
    for branch in known:
        branch.requires_grad_(on)
        frozen_warning.settle(branch, settled=not on)
    return sum(parameter.numel() for branch in known for parameter in branch.parameters())
