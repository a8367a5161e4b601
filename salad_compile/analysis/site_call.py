"""One attention call of a converted site, and what can be computed of it.

While :func:`observe` is active, the eager twin hands each site's call over before it computes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from salad_compile.definition import patterns
from salad_compile.definition.attention import salad_of
from salad_compile.definition.compensation import TAIL_WEIGHT
from salad_compile.definition.linear_branch import update_of
from salad_compile.definition.operands import Operands
from salad_compile.definition.pattern import Pattern
from salad_compile.definition.spec import AttentionSpec, density_permille
from salad_compile.definition.tensors import BranchTensors
from salad_compile.definition.token_layout import segments
from salad_compile.errors import PatternError
from salad_compile.grid.orders import cached_order
from salad_compile.kernels.layout import ALL_BLOCKS, block_count
from salad_compile.kernels.measure import capture_selections
from salad_compile.sites import observers

if TYPE_CHECKING:
    from salad_compile.sites.branch import SaladBranch


class Dense(NamedTuple):
    """Dense attention. out: (B, H, S, value head_dim). lse: (B, H, S), logarithm of the softmax denominator, fp32."""

    out: Tensor
    lse: Tensor


@dataclass(frozen=True, eq=False)
class Sparse:
    """Sparse attention: as :class:`Dense`, in the native order of the tokens, and the blocks that it computed.

    lut, count: int32 (B, H, Mq, K) and (B, H, Mq), see `salad::select_blocks`; blocks of the site's token order.
    """

    out: Tensor
    lse: Tensor
    lut: Tensor
    count: Tensor


@dataclass(frozen=True, eq=False)
class SiteCall:
    """One attention call of a converted site, and what can be computed of it; nothing of it has a gradient.

    Attributes:
        branch: of the site.
        given: query, key, value (B, H, S, head_dim) in the dtype of the call's result, each head on its own (grouped
            heads are repeated); gate; mask. Where keys have a text prefix, its queries are zeros: see :meth:`rows`.
        spec: what the site computes. scale: factor of the scores.
    """

    branch: SaladBranch
    given: Operands
    spec: AttentionSpec
    scale: float

    @property
    def video(self) -> slice:
        """Where the video lies among the S tokens."""
        where = segments(self.given.side, self.given.key.shape[2], self.given.video)
        return slice(where.video_begin, where.video_end)

    def rows(self) -> Tensor:
        """bool (B, S), the tokens that errors are measured over: the video's, without those that a mask hides.

        Text rows are dense anyway (specification 4.4) and would only dilute.
        """
        key, mask = self.given.key, self.given.key_mask
        rows = torch.zeros(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        rows[:, self.video] = True if mask is None else mask[:, self.video]
        return rows

    @torch.no_grad()
    def dense(self) -> Dense:
        """Exact softmax attention over all valid keys. Block by block: no S x S tensor is made."""
        query, key, value = self.given.query, self.given.key, self.given.value
        blocks = (self.spec.query_block, self.spec.key_block)
        shape = (*query.shape[:2], block_count(query.shape[2], blocks[0]))
        count = torch.full(shape, ALL_BLOCKS, dtype=torch.int32, device=query.device)
        unread = torch.zeros((*shape, 1), dtype=torch.int32, device=query.device)
        out, lse = torch.ops.salad.block_sparse_attention.default(
            query, key, value, unread, count, *blocks, self.scale, self.given.key_mask
        )
        return Dense(out, lse)

    @torch.no_grad()
    def sparse(
        self, sparsity: float | None = None, *, pattern: str | None = None, tensors: BranchTensors | None = None
    ) -> Sparse:
        """The sparse branch alone, O_s, as the site would compute it with other settings.

        Args:
            sparsity: in [0, 1). None: the site's, as it is set now.
            pattern: name of a sparse pattern. None: the site's.
            tensors: those that the pattern brings, by name. One that is not given is the site's, or has its initial
                value if the site has none.

        Raises:
            ConfigError: an unknown pattern. PatternError: it needs the token grid, and there is none, or takes no mask,
                and there is one.
        """
        chosen = patterns.find(pattern or self.spec.pattern)
        order = self._order(chosen)
        lacks_grid = chosen.needs_grid and order is None
        if lacks_grid or (self.given.key_mask is not None and not chosen.takes_mask):
            reason = "needs the token grid, which is not known" if lacks_grid else "takes no mask"
            raise PatternError(
                f'pattern "{chosen.name}" {reason}: look at {self.branch.record.owner!r} with another, "topk" say.'
            )
        permille = density_permille(self.branch.target_sparsity if sparsity is None else sparsity)
        spec = dataclasses.replace(
            self.spec,
            pattern=chosen.name,
            permille=permille,
            linear_branch=False,
            adjustable=False,
            text=self.given.side,
        )
        branch = {**self._tensors(chosen, spec), **(tensors or {})}
        given = self.given._replace(gate=None, mapped=None, branch=branch, order=order)
        with capture_selections() as captured:
            out = salad_of(given, spec, self.scale)
        (selected,) = captured
        lse = chosen.arrange(given, spec).move_back(selected.lse.unsqueeze(-1)).squeeze(-1)
        return Sparse(out, lse, selected.selection.lut, selected.selection.count)

    @torch.no_grad()
    def update(self) -> Tensor | None:
        """What the linear branch adds, G Proj(O_l) with all scales, (B, H, S, value head_dim); None without one."""
        return update_of(self.given, self.spec) if self.spec.linear_branch else None

    def gate(self) -> Tensor | None:
        """G, (B, V, 1), or (B, V, H) with one gate per head, for the video's tokens; None without a gate."""
        return None if self.given.gate is None else self.given.gate.detach()

    def _tensors(self, pattern: Pattern, spec: AttentionSpec) -> dict[str, Tensor]:
        """What pattern and compensation bring to a site: the site's own, or with their initial values."""
        own, site, device = self.given.branch, self.branch.branch_site(), self.given.query.device
        needed = [row for row in (*pattern.tensors, TAIL_WEIGHT) if row.when(spec)]
        return {row.name: own.get(row.name, row.initial(site, spec, device)) for row in needed}

    def _order(self, pattern: Pattern) -> Tensor | None:
        if pattern.name == self.spec.pattern:
            return self.given.order
        grid = self.branch.grid
        if grid is None or grid.size is None or not self.branch.record.on_grid:
            return None
        return cached_order(pattern.order, grid.size, self.given.key.device)


@contextlib.contextmanager
def observe(callback: Callable[[SiteCall], None]) -> Iterator[None]:
    """While active, each call of a converted site in an uncompiled forward is handed to `callback` before it runs."""
    with observers.observe(lambda *call: callback(SiteCall(*call))):
        yield
