"""One model of an export: its header and its tensors, gathered from all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch.nn as nn
from torch import Tensor

from salad_compile.common.sharding import is_first_rank, whole
from salad_compile.common.wrappers import plain_key
from salad_compile.exchange.low_rank import LowRank, low_rank_updates
from salad_compile.salad_files.contents import describe, gathered_state
from salad_compile.salad_files.header import Header
from salad_compile.sites.branch import BRANCH_NAME


@dataclass
class Component:
    """One converted model and what the formats write of it. The tensors are on the CPU, on the rank that writes.

    name: of a pipeline's component, "" for a model. branch_state, base_state: plain name -> tensor.
    """

    name: str
    model: nn.Module
    header: Header
    branch_state: Mapping[str, Tensor] = field(default_factory=dict)
    base_state: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, model: nn.Module) -> Component:
        """Nothing is gathered yet. Raises NotConvertedError."""
        return cls(name, model, describe(model))

    def gather(self, *, base: bool) -> None:
        """Bring the tensors together, those of the base model if asked; every rank must call it."""
        state = gathered_state(self.model)
        self.branch_state = state if is_first_rank() else {}
        if base:
            self.base_state = _gather_base(self.model, keep=is_first_rank())

    @cached_property
    def updates(self) -> Sequence[LowRank]:
        """The low-rank updates of all sites; empty without LoRA."""
        return low_rank_updates(self.model, self.branch_state)


def _gather_base(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Every tensor of the base model by plain name; sharded ones whole and on the CPU, others as they are.

    Every rank must call it; without `keep` (on those that write nothing) the result is empty.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if BRANCH_NAME in name.split("."):
            continue
        gathered = whole(tensor) if hasattr(tensor, "full_tensor") else tensor.detach()
        if keep:
            state[plain_key(name)] = gathered
    return state
