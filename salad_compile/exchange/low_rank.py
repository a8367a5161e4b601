"""The low-rank updates of a converted model, as what other libraries call LoRA: one pair A, B for each projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.wrappers import plain_key
from salad_compile.sites.branch import BRANCH_NAME, SaladBranch, branches

# The fused projections that diffusers' `fuse_qkv_projections` adds, and the projections whose rows they hold.
FUSED_BY_DIFFUSERS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@dataclass(frozen=True)
class Part:
    """The update of one role ("": of none): scale * up @ down, for `rows` rows of a projection's weight.

    down: (rank, in_features), up: (rows, rank), or None both where this role has no update.
    """

    role: str
    rows: int
    down: Tensor | None
    up: Tensor | None
    scale: float

    def update(self, columns: int) -> Tensor:
        """(rows, columns) in fp32, as merge_lora computes it; zero without factors."""
        if self.down is None or self.up is None:
            return torch.zeros(self.rows, columns)
        return (self.up.float() @ self.down.float()) * self.scale

    def scaled_up(self) -> Tensor:
        """up with the scale in it, in fp32; of rank 0 without factors."""
        return torch.zeros(self.rows, 0) if self.up is None else self.up.float() * self.scale


@dataclass(frozen=True)
class LowRank:
    """The update of one projection of one site: that of its roles, one below the other."""

    name: str
    owner: str
    parts: tuple[Part, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """Those with an update."""
        return tuple(part.role for part in self.parts if part.down is not None)

    @property
    def rank(self) -> int:
        """Of the pair: the sum of the ranks of the roles."""
        return sum(map(len, self._downs()))

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (rank, in_features) and B (out_features, rank) with B A the whole update, in the dtype of the factors.

        alpha / rank is multiplied into B in fp32, cast once. Of a fused projection A is stacked and B block-diagonal.
        """
        downs = self._downs()
        up: Tensor = torch.block_diag(*(part.scaled_up() for part in self.parts))  # type: ignore[no-untyped-call]
        return torch.cat(downs), up.to(downs[0].dtype)

    def update(self) -> Tensor:
        """scale * up @ down of all roles in fp32, (out_features, in_features); rows without an update are zero."""
        columns = self._downs()[0].shape[1]
        return torch.cat([part.update(columns) for part in self.parts])

    def _downs(self) -> list[Tensor]:
        return [part.down for part in self.parts if part.down is not None]


def low_rank_updates(model: nn.Module, state: Mapping[str, Tensor]) -> list[LowRank]:
    """The updates of all sites; empty without LoRA.

    Args:
        model: a converted model.
        state: its branch state, whole and on the CPU, by plain names.
    """
    return [
        LowRank(
            branch.record.projections()[first],
            branch.record.owner,
            tuple(_part(branch, role, rows, state) for role, rows in branch.slots[first]),
        )
        for branch in branches(model).values()
        for first, roles in branch.record.shared_roles().items()
        if any(role in branch.lora_roles for role in roles)
    ]


def _part(branch: SaladBranch, role: str, rows: int, state: Mapping[str, Tensor]) -> Part:
    if role not in branch.lora_roles:
        return Part(role, rows, None, None, 0.0)
    prefix = ".".join(part for part in (plain_key(branch.record.owner), BRANCH_NAME) if part)
    down, up = (state[f"{prefix}.low_rank_{role}_{part}"] for part in ("down", "up"))
    return Part(role, rows, down, up, float(state[f"{prefix}.low_rank_scale"]))


def is_fused_by_diffusers(model: nn.Module, name: str) -> bool:
    """Whether `name` is a projection that `fuse_qkv_projections` made, so that a freshly loaded model lacks it."""
    parent, _, leaf = name.rpartition(".")
    return leaf in FUSED_BY_DIFFUSERS and bool(getattr(model.get_submodule(parent), "fused_projections", False))


def split_fused(model: nn.Module, updates: Sequence[LowRank]) -> list[LowRank]:
    """The updates by the names of a freshly loaded model: those of projections that diffusers fused, one for each."""
    apart: list[LowRank] = []
    for update in updates:
        if not is_fused_by_diffusers(model, update.name):
            apart.append(update)
            continue
        parent, _, leaf = update.name.rpartition(".")
        for part, own in zip(update.parts, FUSED_BY_DIFFUSERS[leaf], strict=True):
            if part.down is not None:
                apart.append(LowRank(f"{parent}.{own}", update.owner, (part,)))
    return apart
