"""What a conversion would add to each site, and what it would compute there: for `plan`, on branches without memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn

from salad_compile.config import SaladConfig
from salad_compile.conversion.branch_building import new_branch
from salad_compile.conversion.cost import site_cost
from salad_compile.discovery.attention_site import AttentionSite
from salad_compile.discovery.plan import SiteForecast


def forecast(
    model: nn.Module, component: str, sites: Sequence[AttentionSite], config: SaladConfig
) -> list[SiteForecast]:
    """One entry for each eligible site; the model is not touched."""
    return [_of_site(model, component, site, config) for site in sites if site.eligible]


def _of_site(model: nn.Module, component: str, site: AttentionSite, config: SaladConfig) -> SiteForecast:
    branch = new_branch(model, site.record(), config, device=torch.device("meta"))
    cost = site_cost(branch)
    own, lora = branch.counts()
    return SiteForecast(
        component=component,
        name=site.name,
        tokens=site.query_tokens,
        branch_parameters=own,
        lora_parameters=lora,
        dense_flops=cost.dense,
        salad_flops=cost.salad,
        sparsity=config.of_site(site.name).sparsity,
        reachable=1 - cost.attended,
        follows_sparsity=branch.pattern.follows_sparsity(branch.decoded_spec()),
    )
