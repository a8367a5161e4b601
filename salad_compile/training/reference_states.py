"""A converted model as its base model, or as a fresh conversion, for a while: what a trained one is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn as nn

from salad_compile.definition import branch_tensors
from salad_compile.sites.branch import SaladBranch, branches
from salad_compile.sites.site import hold_dense
from salad_compile.training.flow_matching import Noised


@contextlib.contextmanager
def as_base(sites: Iterable[SaladBranch]) -> Iterator[None]:
    """The sites as in the base model: dense, without their low-rank updates."""
    sites = list(sites)
    scales = [site.low_rank_scale.clone() for site in sites]
    try:
        for site in sites:
            site.low_rank_scale.zero_()
        with hold_dense(sites, True):
            yield
    finally:
        for site, scale in zip(sites, scales, strict=True):
            site.low_rank_scale.copy_(scale)


@contextlib.contextmanager
@torch.no_grad()
def as_untrained(model: nn.Module) -> Iterator[None]:
    """All sites as a fresh conversion has them, at the sparsity of the conversion; afterwards as they were."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for site in branches(model).values():
            for row in branch_tensors.rows(site.decoded_spec()):
                tensor = getattr(site, row.name)
                kept.append((tensor, tensor.detach().clone()))
                row.initialise(tensor, site.branch_site())
            kept.append((site.low_rank_scale, site.low_rank_scale.clone()))
            site.low_rank_scale.zero_()  # as the update itself is, before the first step
        yield
    finally:
        for tensor, value in kept:
            tensor.copy_(value)


@torch.no_grad()
def target_of(
    batch: Noised, share: float, sites: Iterable[SaladBranch], predict: Callable[[Noised], torch.Tensor]
) -> torch.Tensor:
    """What a model is to predict: the flow, and in `share` of it what its base model predicts; fp32 (B, C, T, H, W).

    Args:
        sites: of the model that `predict` runs.
    """
    if not share:
        return batch.target
    with as_base(sites):
        prediction = predict(batch)
    return torch.lerp(batch.target, prediction.float(), share)
