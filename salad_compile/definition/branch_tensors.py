"""The table of a branch's tensors: what a site has is what the rows of this table say.

A row stands beside the formula that reads it: the gate's in gate.py, those of projection and scales in
linear_branch.py, a pattern's in its file. The low-rank updates belong to projections and not to the attention call, so
their rows are made for each projection (:func:`low_rank_rows`) and do not travel through graphs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.definition import patterns
from salad_compile.definition.compensation import TAIL_WEIGHT
from salad_compile.definition.gate import GATE
from salad_compile.definition.linear_branch import PROJECTION, SCALES
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.tensors import BranchSite, BranchTensors, TensorRow


def _start_permille(tensor: Tensor, site: BranchSite) -> None:
    tensor.fill_(site.permille)


PERMILLE = TensorRow(
    "permille",
    shape=lambda site, spec: (),
    when=lambda spec: spec.adjustable,
    initialise=_start_permille,
    dtype=torch.int32,
)
"""Key blocks kept per thousand, where that may change from call to call."""


def rows(spec: AttentionSpec) -> tuple[TensorRow, ...]:
    """The tensors of a site with these settings, in the order of :func:`flat`."""
    table = (*GATE, *PROJECTION, *SCALES, TAIL_WEIGHT, PERMILLE, *patterns.find(spec.pattern).tensors)
    return tuple(row for row in table if row.when(spec))


def names(spec: AttentionSpec) -> tuple[str, ...]:
    """The names of :func:`rows`."""
    return tuple(row.name for row in rows(spec))


def flat(tensors: BranchTensors, spec: AttentionSpec) -> list[Tensor]:
    """Those of :func:`rows`, as a traced graph lists them."""
    return [tensors[name] for name in names(spec)]


def from_flat(tensors: Sequence[Any], spec: AttentionSpec) -> BranchTensors:
    """Inverse of :func:`flat`; of proxies as well."""
    return dict(zip(names(spec), tensors, strict=True))


def low_rank_rows(role: str, in_features: int, out_features: int, rank: int) -> tuple[TensorRow, TensorRow]:
    """The pair of a projection's low-rank update: `down` (rank, in) at random, `up` (out, rank) at zero.

    No name may contain the prefix of an adapter of peft ("lora_"): its hot-swap zeroes each tensor whose name has the
    prefix and the adapter's name in it, wherever they stand.
    """
    return (
        TensorRow(f"low_rank_{role}_down", lambda site, spec: (rank, in_features), initialise=_kaiming, cost="lora"),
        TensorRow(f"low_rank_{role}_up", lambda site, spec: (out_features, rank), cost="lora"),
    )


_FORMER_NAME = re.compile(r"((?:.*[./])?)lora_(scale|[a-z_]+_(?:down|up))")


def current_name(name: str) -> str:
    """The name of a tensor of a branch, with anything in front, from the one that it may have had before.

    Until format version 4 low-rank updates were called `lora_query_down`, `lora_scale`.
    """
    former = _FORMER_NAME.fullmatch(name)
    return f"{former[1]}low_rank_{former[2]}" if former else name


def _kaiming(tensor: Tensor, site: BranchSite) -> None:
    nn.init.kaiming_uniform_(tensor, a=5**0.5)
