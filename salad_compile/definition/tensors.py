"""How a tensor of a site's branch is declared: one row, beside the formula that reads it.

:mod:`salad_compile.definition.branch_tensors` puts the rows together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from salad_compile.definition.spec import AttentionSpec

BranchTensors: TypeAlias = "Mapping[str, Tensor]"
"""Name -> tensor of what one site's settings call for, see :func:`salad_compile.definition.branch_tensors.rows`.

Parameters may have any floating dtype: they are cast to the activations' where they are used, so fp32 masters under
16-bit activations work without autocast.
"""


class BranchSite(NamedTuple):
    """What shapes and initial values of a site's tensors depend on.

    Attributes:
        gate_width: C, the width of the input of the query projection.
        heads: H.
        width: D, H times the head_dim of the values.
        permille: key blocks kept per thousand at the start.
    """

    gate_width: int
    heads: int
    width: int
    permille: int


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in this dtype. Asking a tensor for the dtype that it has takes as long as a small operation; proxies ask."""
    return x if isinstance(x, Tensor) and x.dtype == dtype else x.to(dtype)


def always(spec: AttentionSpec) -> bool:
    """Whatever the settings."""
    return True


def zeros(tensor: Tensor, site: BranchSite) -> None:
    """Initial value 0."""
    tensor.zero_()


def ones(tensor: Tensor, site: BranchSite) -> None:
    """Initial value 1."""
    tensor.fill_(1)


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a branch.

    Attributes:
        name: in the branch, in graphs and in saved files.
        shape: of a site with these settings.
        when: whether settings call for it.
        initialise: writes the initial value, in place.
        dtype: of a buffer, which is saved and not trained. None: a parameter, in the dtype that the branch has.
        cost: the column of :class:`salad_compile.conversion.cost.SiteCost` that counts a multiply-add for each element
            and token; None where nothing like a product reads it.
        by_head: whether sparse attention reads it, one entry (of the first dimension) for each head.
    """

    name: str
    shape: Callable[[BranchSite, AttentionSpec], tuple[int, ...]]
    when: Callable[[AttentionSpec], bool] = always
    initialise: Callable[[Tensor, BranchSite], None] = zeros
    dtype: torch.dtype | None = None
    cost: str | None = None
    by_head: bool = False

    def initial(self, site: BranchSite, spec: AttentionSpec, device: torch.device) -> Tensor:
        """A buffer with its initial value."""
        tensor = torch.empty(self.shape(site, spec), dtype=self.dtype, device=device)
        self.initialise(tensor, site)
        return tensor
