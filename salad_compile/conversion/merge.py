"""merge_lora(model): fold the low-rank updates into the base projections."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.projections import laid_out
from salad_compile.common.undo import unchanged_on_failure
from salad_compile.common.wrappers import single_model
from salad_compile.conversion.mergeable import Mergeable, dequantised, is_subclass, mergeable, require_untied
from salad_compile.errors import MergeError, require_conversion
from salad_compile.sites.branch import SaladBranch, branches


@dataclass(frozen=True)
class MergedProjection:
    """One merged projection. cast_error: norm of what rounding to the weight's dtype lost, over the update's norm."""

    name: str
    roles: tuple[str, ...]
    cast_error: float


def merge_lora(model: nn.Module, *, dequantise: bool = False) -> list[MergedProjection]:
    """Fold W + (alpha / rank) B A into the base projections and drop the LoRA parameters, in place.

    The sum is taken in fp32 and cast once. In 16-bit weights small updates are partly lost to rounding; the result says
    how much. Gates and projections stay: the merged model still needs SALAD attention. Until it ends, the host keeps
    what the projections were.

    Raises:
        NotConvertedError: the model has no branch.
        MergeError: a projection is quantised or wrapped by another adapter, or there is no LoRA.
        Whatever is raised, also on the way, the model is unchanged.
    """
    bare = single_model(model, "merge_lora")
    known = list(branches(bare).values())
    require_conversion(bool(known), type(bare).__name__)
    if not any(branch.lora_roles for branch in known):
        raise MergeError("this model has no LoRA: converted with lora_rank=0, or merged before.")
    work = [item for branch in known for item in mergeable(bare, branch, dequantise=dequantise)]
    require_untied(bare, [item.key for item in work])
    with unchanged_on_failure(bare) as undo, torch.no_grad():
        merged = [MergedProjection(item.name, item.roles, _merge(item, undo)) for item in work]
        for branch in known:
            undo.callback(branch.low_rank_scale.copy_, branch.low_rank_scale.clone())
            _drop_lora(branch)
    return merged


def _merge(item: Mergeable, undo: contextlib.ExitStack) -> float:
    """Add the update of each role to its share of the weight's rows; returns the relative cast error.

    Args:
        undo: is told what takes the values back.
    """
    weight = item.weight
    parts = [_update(item, role, rows) for role, rows in item.branch.slots[item.roles[0]]]
    update = laid_out(torch.cat(parts), weight, outputs_first=item.outputs_first)
    if is_subclass(weight):
        merged, cast_error = merged_weight(dequantised(weight), update)
        setattr(item.module, item.weight_name, nn.Parameter(merged, weight.requires_grad))
        return cast_error
    merged, cast_error = merged_weight(weight, update)
    undo.callback(weight.copy_, weight.detach().to("cpu", copy=True))
    weight.copy_(merged)
    return cast_error


def merged_weight(weight: Tensor, update: Tensor) -> tuple[Tensor, float]:
    """weight + update, summed in fp32 and cast once to the weight's dtype, and the relative cast error."""
    exact = weight.float() + update
    merged = exact.to(weight.dtype)
    norm = update.norm()
    return merged, float((merged.float() - exact).norm() / norm) if norm else 0.0


def _update(item: Mergeable, role: str, rows: int) -> Tensor:
    branch = item.branch
    if role not in branch.lora_roles:
        return torch.zeros(rows, item.columns, device=item.weight.device)
    down, up = (getattr(branch, f"low_rank_{role}_{part}").float() for part in ("down", "up"))
    update: Tensor = (up @ down) * branch.low_rank_scale
    return update


def _drop_lora(branch: SaladBranch) -> None:
    for role in branch.lora_roles:
        delattr(branch, f"low_rank_{role}_down")
        delattr(branch, f"low_rank_{role}_up")
    branch.lora_roles = ()
    branch.lora_merged = True
    branch.config = dataclasses.replace(branch.config, lora_rank=0)
    branch.low_rank_scale.zero_()
