"""A converted model as its base model, or as a fresh conversion, for a while: what a trained one is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn as nn

from salad_compile.definition import branch_tensors
from salad_compile.sites.branch import SaladBranch, branches
from salad_compile.sites.site import hold_dense


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
