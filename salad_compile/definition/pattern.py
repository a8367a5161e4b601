"""What a sparse pattern declares. Each pattern is one file of :mod:`salad_compile.definition.patterns`.

The methods that get tensors run on tensors and on `fx.Proxy` objects alike, so they branch on settings and never on
shapes or values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from salad_compile.definition.operands import Operands
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.tensors import BranchTensors, TensorRow
from salad_compile.definition.token_layout import Arrangement, Segments, arrange_all
from salad_compile.grid.orders import OrderOf, tile_order


class SelectedBlocks(NamedTuple):
    """The key blocks that every query block attends to.

    Attributes:
        lut: int32 (B, H, query blocks, K), ids of key blocks, ascending and unique.
        count: int32 (B, H, query blocks), how many entries of a row count; ALL_BLOCKS (-1) for all key blocks there
            are, whatever the row says.
        key_means: (B, H, key blocks, D), what `salad::pool_blocks` gives for the keys, if the pattern needs it.
    """

    lut: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    key_means: Tensor | None = None


class BlockCall(NamedTuple):
    """A call whose tokens are in the order of its blocks.

    Attributes:
        query, key, value: (B, H, S, head_dim).
        where: where video and text lie among the tokens.
        key_mask: bool (B, S), True where a key is valid, or None.
        branch: the site's tensors; `permille` where the density is data.
        scale: factor of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    where: Segments
    key_mask: Tensor | None
    branch: BranchTensors
    scale: float


class SiteFacts(NamedTuple):
    """What decides whether a pattern suits a site, before anything is converted."""

    name: str
    on_grid: bool
    mask: tuple[int, ...] | None
    video_tokens: int
    window: int | None


class CallSize(NamedTuple):
    """The size of one attention call, all heads: what its cost depends on."""

    batch: int
    tokens: int
    video_tokens: int
    query_width: int


class Pattern(ABC):
    """Which key blocks every query block attends to, and all that follows from it.

    Attributes:
        name: what a configuration calls it.
        needs_grid: whether the video's token grid has to be known.
        takes_mask: whether it works with key padding.
        tensors: the tensors that it brings to a site's branch.
        head_choice: name of the one of `tensors`, bool (H,), that says which of two ways each head takes;
            :func:`salad_compile.calibrate_heads` sets it by measurement. None: the heads have no choice.
        crosses_processes: whether heads can be computed on different processes, each with all tokens.
        order: makes the order of the video's tokens that a site is given, from the grid.
    """

    name: ClassVar[str]
    needs_grid: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = True
    tensors: ClassVar[tuple[TensorRow, ...]] = ()
    head_choice: ClassVar[str | None] = None
    crosses_processes: ClassVar[bool] = True
    order: ClassVar[OrderOf] = staticmethod(tile_order)

    # --- what it computes ---------------------------------------------------------------------------------------------

    def arrange(self, given: Operands, spec: AttentionSpec) -> Arrangement:
        """How tokens are moved before blocks are made of them. Here: the video in its order, the text behind it."""
        order = None if spec.token_order == "flat" else given.order
        return arrange_all(order, given.side, given.tokens, given.video)

    @abstractmethod
    def select(self, call: BlockCall, spec: AttentionSpec) -> SelectedBlocks:
        """The key blocks of every query block; no gradient flows through the choice."""

    # --- which sites it suits -----------------------------------------------------------------------------------------

    def needs_conversion(self) -> str:
        """Why it cannot run without a conversion, or the empty string."""
        if self.needs_grid:
            return "it needs the token grid, which conversion finds"
        return "it has tensors of its own, which conversion makes" if self.tensors else ""

    def misfit(self, site: SiteFacts) -> str:
        """Why it does not suit a site, and what to do about it; or the empty string."""
        name = site.name or "the model"
        if self.needs_grid and not site.on_grid:
            return (
                f'pattern "{self.name}" needs the token grid of the video, which is not known for {name!r}: pass '
                f'grid=(T, H, W), or convert with pattern "topk" (overrides={{{site.name!r}: {{"pattern": "topk"}}}} '
                "for this site alone)."
            )
        if not self.takes_mask and site.mask is not None:
            return (
                f'pattern "{self.name}" takes no mask, and {name!r} has one of shape {site.mask}: convert with pattern '
                '"topk".'
            )
        return ""

    # --- what can be measured and told of it --------------------------------------------------------------------------

    def follows_sparsity(self, spec: AttentionSpec) -> bool:
        """Whether the sparsity decides how much is computed."""
        return True

    def head_labels(self, branch: BranchTensors) -> tuple[str, ...]:
        """What distinguishes each head, for pictures; nothing where the heads are alike."""
        return ()

    def selection_flops(self, size: CallSize, spec: AttentionSpec) -> int:
        """FLOPs of :meth:`select`."""
        return 0

    @abstractmethod
    def computed_pairs(self, size: CallSize, spec: AttentionSpec, permille: int) -> int:
        """Query-key pairs that one head of one sample computes, at a density of `permille` per thousand."""
