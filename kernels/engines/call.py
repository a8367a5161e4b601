"""What an engine is asked about: everything of a call that decides whether a kernel exists for it, and no length."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..capability import arch_of

# Names of engines that were asked for, the last one counts. A plain global and not a context variable: autograd runs
# backward operators on threads of its own.
requests: list[str] = []


@dataclass(frozen=True)
class Call:
    """One kind of call of one operator.

    Attributes:
        operator: its name without "salad::".
        device, dtype: of the tensors.
        head_dim, value_dim: of query and key, and of value; None if the operator works with any.
        query_block, key_block: tokens per block; None if the operator has none. `pool_blocks` has a key_block.
        cell: tokens of which `select_by_mass` takes the mean; None elsewhere.
        masked: whether a key mask is given.
        feature_map: of the linear branch, "" elsewhere.
        rotated: whether the linear branch gets features that were rotated.
        needs_gradient: whether an argument requires a gradient. Compiled graphs have their backward outside, so in them
            this is False in training too.
        wants_lse: of `block_sparse_attention`, whether anybody reads its lse: if not, an engine may return None for it.
        requested: the name of the engine that `use_engine` asks for, "" for none.
        arch: compute capability of the device, (major, minor); see `capability.arch_of`.
    """

    operator: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int | None = None
    value_dim: int | None = None
    query_block: int | None = None
    key_block: int | None = None
    cell: int | None = None
    masked: bool = False
    feature_map: str = ""
    rotated: bool = False
    needs_gradient: bool = False
    wants_lse: bool = True
    requested: str = field(default_factory=lambda: requests[-1] if requests else "")
    arch: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch", arch_of(self.device))
