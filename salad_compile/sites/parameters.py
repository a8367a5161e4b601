"""The parameters of one converted site: their names, shapes and initialisation, and its low-rank updates."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from salad_compile.config import SaladConfig
from salad_compile.definition import branch_tensors, patterns
from salad_compile.definition.pattern import Pattern
from salad_compile.definition.spec import AttentionSpec, density_permille
from salad_compile.definition.tensors import BranchSite, BranchTensors, TensorRow
from salad_compile.kernels.direct import is_direct
from salad_compile.sites.record import SiteRecord


@dataclass(frozen=True)
class Projections:
    """What a site's parameters depend on beside record and configuration: its owner's projections as they are.

    Attributes:
        gate_width: C, the width of the input of the query projection.
        widths: role -> (in_features, out_features of this role) of the projections that get a low-rank update.
        slots: first role of each projection -> role and channels of each part of its output; "" is no role's.
        dtype, device: of the parameters.
    """

    gate_width: int
    widths: Mapping[str, tuple[int, int]]
    slots: Mapping[str, Sequence[tuple[str, int]]]
    dtype: torch.dtype
    device: torch.device


class BranchParameters(nn.Module):
    """Gate, projection, static scales and low-rank updates of one site; knows no hooks and no forward.

    Everything is a bare `nn.Parameter`: peft's `target_modules="all-linear"` would wrap an `nn.Linear` in here and
    rename its keys, and its suffix matching would hit child modules called `q`.

    The projection starts at zero, so a freshly converted model computes pure block-sparse attention; the gate starts at
    sigmoid(0) = 0.5, because two factors that both start at zero would never train (specification 3).

    Args:
        record: the site. config: the configuration; both are kept, shared between the sites of a model.
        projections: of its owner.
    """

    low_rank_scale: Tensor
    permille: Tensor

    def __init__(self, record: SiteRecord, config: SaladConfig, projections: Projections) -> None:
        super().__init__()
        self.record = record
        self.config = config
        self.group = ""  # of the processes that share the tokens
        self.roles = record.shared_roles()
        self.slots = {first: tuple(parts) for first, parts in projections.slots.items()}
        self.lora_merged = False  # then these parameters fit only the base that holds their update
        self.gate_width = projections.gate_width
        self.lora_widths = dict(projections.widths)
        self.lora_roles = tuple(projections.widths) if config.lora_rank else ()
        dtype, device = projections.dtype, projections.device
        self._take_spec(self.spec_of_site())
        for row in self.rows():
            tensor = torch.empty(
                row.shape(self.branch_site(), self.decoded_spec()), dtype=row.dtype or dtype, device=device
            )
            if row.dtype is None:
                self.register_parameter(row.name, nn.Parameter(tensor))
            else:
                self.register_buffer(row.name, tensor)
        # a tensor, because a Python number in a graph recompiles when it changes; fp32 whatever the parameters are
        self.register_buffer("low_rank_scale", torch.empty((), dtype=torch.float32, device=device))
        self.reset_parameters()

    # Private. Seen in torch 2.11 and 2.13; tests/trainers/test_former_names.py fails when it moves.
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """State dicts of before format version 5 have other names for the low-rank updates."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[branch_tensors.current_name(name)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _take_spec(self, spec: AttentionSpec) -> None:
        self.spec = spec.encode()
        self.order_name = self.pattern.order.__name__
        self.maps_before_position = spec.maps_before_position
        self.branch_names = branch_tensors.names(spec)

    def rows(self) -> tuple[TensorRow, ...]:
        """The rows of all these tensors but `low_rank_scale`."""
        rank = self.config.lora_rank
        pairs = (branch_tensors.low_rank_rows(role, *self.lora_widths[role], rank) for role in self.lora_roles)
        return (*branch_tensors.rows(self.decoded_spec()), *itertools.chain.from_iterable(pairs))

    def branch_site(self) -> BranchSite:
        """What their shapes and initial values depend on."""
        permille = density_permille(self.config.of_site(self.record.owner).sparsity)
        return BranchSite(self.gate_width, self.record.heads, self.record.width, permille)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Write the initial values (specification 6)."""
        for row in self.rows():
            row.initialise(getattr(self, row.name), self.branch_site())
        self.low_rank_scale.fill_(self.config.lora_scale)

    # --- what the site computes ---------------------------------------------------------------------------------------

    def spec_of_site(self) -> AttentionSpec:
        """What this site computes, by its record, the configuration and the processes that share its tokens."""
        record, own = self.record, self.config.of_site(self.record.owner)
        return dataclasses.replace(
            self.config.spec,
            pattern=own.pattern,
            linear_branch=own.linear_branch and not record.dropped,
            rope_placement="rotate-then-map" if record.rotated_first else self.config.spec.rope_placement,
            text=record.text,
            single=record.text in ("before", "after") and record.text_query is None,
            heads_per_key=record.groups,
            square_mask=record.square_mask,
            process_group=self.group,
            gate_axes=record.gate_axes,
        )

    def decoded_spec(self) -> AttentionSpec:
        """What this site computes: `spec`, decoded."""
        return AttentionSpec.decode(self.spec)

    @property
    def pattern(self) -> Pattern:
        """Its sparse pattern."""
        return patterns.find(self.decoded_spec().pattern)

    @property
    def target_sparsity(self) -> float:
        """The sparsity asked for: what was set last, or the configuration's for this site."""
        if "permille" in self.branch_names and self.permille.device.type != "meta":
            return 1 - int(self.permille) / 1000
        return self.config.of_site(self.record.owner).sparsity

    def counts(self) -> tuple[int, int]:
        """How many parameters belong to gate, scales and projection, and how many to low-rank updates."""
        sizes = {name: parameter.numel() for name, parameter in self.named_parameters()}
        lora = sum(size for name, size in sizes.items() if name.startswith("low_rank_"))
        return sum(sizes.values()) - lora, lora

    def tensors(self) -> BranchTensors:
        """What the definition takes of these parameters."""
        # quicker than attributes of modules, and parametrised tensors are no parameters
        held: dict[str, Any] = self._parameters
        return {name: held[name] if name in held else getattr(self, name) for name in self.branch_names}

    @property
    def mark(self) -> Tensor:
        """A tensor that every site has, of its own: by it the markers in a graph know each other."""
        return self.low_rank_scale

    def drop_linear(self) -> None:
        """Give up gate, projection and static scales, in place (specification 7); sparse attention and LoRA stay.

        Compiled code finds other settings here, and is compiled again once for all sites that are alike.
        """
        for name in self.linear_parameters():
            delattr(self, name)
        self.record = dataclasses.replace(self.record, dropped=True)
        self._take_spec(self.spec_of_site())

    def share_tokens(self, group: str) -> None:
        """The tokens are split over these processes from now on (conversion/context_parallel.py)."""
        self.group = group
        self.spec = self.spec_of_site().encode()

    def linear_parameters(self) -> dict[str, nn.Parameter]:
        """What only the linear branch needs, by name; nothing where there is none."""
        without = branch_tensors.names(dataclasses.replace(self.decoded_spec(), linear_branch=False))
        return {name: getattr(self, name) for name in self.branch_names if name not in without}

    # --- low-rank updates ---------------------------------------------------------------------------------------------

    def add_updates(self, first: str, x: Tensor, out: Tensor) -> Tensor:
        """The output of a projection with the low-rank update of each role that the projection serves.

        Added to the output and not to the weight, so that quantised and wrapped projections work.

        Args:
            first: the first role of the projection. x: its input, (..., in_features).
            out: its output, (..., out_features), of any dtype, which the result has too.
        """
        roles = self.roles[first]
        for role in roles:  # a loop takes half the time of any(...)
            if role in self.lora_roles:
                break
        else:
            return out
        slots = self.slots[first]
        if len(slots) == 1:
            down, up = self._pair(roles[0])
            scale = self.low_rank_scale
            if x.dtype == out.dtype == scale.dtype == down.dtype and is_direct((x, out, scale)):
                return torch.add(out, F.linear(F.linear(x, down), up), alpha=float(scale))
            return out + _cast(self._low_rank(roles[0], x), out.dtype)
        parts = torch.split(out, [width for _, width in slots], dim=-1)
        updated = [
            part + _cast(self._low_rank(role, x), out.dtype) if role in self.lora_roles else part
            for (role, _), part in zip(slots, parts, strict=True)
        ]
        return torch.cat(updated, dim=-1)

    def _low_rank(self, role: str, x: Tensor) -> Tensor:
        down, up = (_cast(tensor, x.dtype) for tensor in self._pair(role))
        # a copy: a cast without effect returns its operand, which in torch.export's graphs stands for the mark itself,
        # and which may change before the backward pass (distillation sets it to 0 for the dense teacher)
        scale = self.low_rank_scale.to(x.dtype, copy=True)
        return F.linear(F.linear(x, down), up) * scale

    def _pair(self, role: str) -> tuple[Tensor, Tensor]:
        down, up = _pair_names(role)
        held: dict[str, Any] = self._parameters  # see `tensors`
        if down in held and up in held:
            return held[down], held[up]
        return getattr(self, down), getattr(self, up)

    def extra_repr(self) -> str:
        """One line for `print(model)`: torchao's users complain that a printed model tells nothing."""
        config = self.config
        lora = f"lora_rank={config.lora_rank} on {'/'.join(self.lora_roles)}" if self.lora_roles else "no lora"
        dropped = ", linear branch dropped" if self.record.dropped else ""
        blocks = f"{config.query_block}x{config.key_block} blocks"
        return f"{config.pattern}, sparsity={config.sparsity}, {blocks}, {lora}{dropped}"


def _pair_names(role: str) -> tuple[str, str]:
    # not cached: Dynamo warns of every cache that it traces through
    return f"low_rank_{role}_down", f"low_rank_{role}_up"


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """With this dtype. A cast without effect takes time uncompiled, and is left in graphs, where it takes none."""
    return tensor if tensor.dtype == dtype and not torch.compiler.is_compiling() else tensor.to(dtype)
