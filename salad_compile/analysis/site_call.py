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

from salad_compile.config import AttentionSpec, density_permille
from salad_compile.definition.attention import Operands, salad_of, update_of
from salad_compile.definition.branch_tensors import BranchTensors
from salad_compile.definition.token_layout import reordering, reordering_in_place, segments
from salad_compile.errors import PatternError
from salad_compile.grid.orders import cached_order, temporal_order, tile_order
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
        self, sparsity: float | None = None, *, pattern: str | None = None, temporal_heads: Tensor | None = None
    ) -> Sparse:
        """The sparse branch alone, O_s, as the site would compute it with other settings.

        Args:
            sparsity: in [0, 1). None: the site's, as it is set now.
            pattern: "topk" or "stswa". None: the site's.
            temporal_heads: bool (H,), with "stswa" the heads whose window runs through time. None: the site's, or the
                odd heads if it has none.

        Raises:
            PatternError: "stswa" without a token grid or with a mask.
        """
        given, pattern = self.given, pattern or self.spec.pattern
        order = self._order(pattern)
        if pattern == "stswa":
            if order is None or given.key_mask is not None:
                raise PatternError(
                    f'pattern "stswa" needs the token grid and takes no mask: look at {self.branch.record.owner!r} '
                    'with "topk".'
                )
            temporal_heads = given.branch.temporal_heads if temporal_heads is None else temporal_heads
            if temporal_heads is None:
                temporal_heads = torch.arange(given.query.shape[1], device=given.query.device) % 2 == 1
        permille = density_permille(self.branch.target_sparsity if sparsity is None else sparsity)
        spec = dataclasses.replace(
            self.spec, pattern=pattern, permille=permille, linear_branch=False, adjustable=False, text=self.given.side
        )
        tensors = BranchTensors(temporal_heads=temporal_heads)
        with capture_selections() as captured:
            out = salad_of(given._replace(gate=None, mapped=None, branch=tensors, order=order), spec, self.scale)
        (selected,) = captured
        lse = self._in_native_order(selected.lse, spec, order, temporal_heads)
        return Sparse(out, lse, selected.lut, selected.count)

    @torch.no_grad()
    def update(self) -> Tensor | None:
        """What the linear branch adds, G Proj(O_l) with all scales, (B, H, S, value head_dim); None without one."""
        return update_of(self.given, self.spec) if self.spec.linear_branch else None

    def gate(self) -> Tensor | None:
        """G, (B, V, 1), or (B, V, H) with one gate per head, for the video's tokens; None without a gate."""
        return None if self.given.gate is None else self.given.gate.detach()

    def _order(self, pattern: str) -> Tensor | None:
        grid = self.branch.grid
        if pattern == self.spec.pattern or grid is None or grid.size is None or not self.branch.record.on_grid:
            return self.given.order if pattern == self.spec.pattern else None
        return cached_order(temporal_order if pattern == "stswa" else tile_order, grid.size, self.given.key.device)

    def _in_native_order(
        self, lse: Tensor, spec: AttentionSpec, order: Tensor | None, temporal_heads: Tensor | None
    ) -> Tensor:
        """Sparse attention ran with its tokens moved: into one order, or (windows) with some heads in another."""
        side, tokens = self.given.side, lse.shape[2]
        if spec.pattern == "stswa":
            assert order is not None
            assert temporal_heads is not None
            back = lse.index_select(2, reordering_in_place(order, side, tokens).inverse)
            return torch.where(temporal_heads[:, None], back, lse)
        if spec.token_order == "flat" or order is None:
            return lse
        return lse.index_select(2, reordering(order, side, tokens).inverse)


@contextlib.contextmanager
def observe(callback: Callable[[SiteCall], None]) -> Iterator[None]:
    """While active, each call of a converted site in an uncompiled forward is handed to `callback` before it runs."""
    with observers.observe(lambda *call: callback(SiteCall(*call))):
        yield
