"""Compile-time settings of the Gluon kernels: everything of a call that decides which kernel is built; no length."""

from __future__ import annotations

from dataclasses import dataclass

KEY_BLOCK = 64
QUERY_BLOCKS = (64, 128)
HEAD_DIMS = (64, 128)
GROUP_ROWS = 64  # query rows of one group of four warps: the height of one wgmma
POOLS_WIDTH = 128  # rows of numbers of pools are padded to a multiple of the widest step
BOX = 64  # rows and columns of the boxes that the bulk copy engine writes: 64 bf16 fill its 128-byte swizzle


@dataclass(frozen=True)
class Tiles:
    """Two groups of four warps multiply, and a warp for each ring of buffers loads.

    Query blocks of 128 rows: the two groups take a half each and share a ring. Query blocks of 64 rows: each group has
    a tile, a list and a ring of its own.
    """

    head_dim: int
    query_block: int
    masked: bool
    pooled: bool  # means of what a list leaves out join its softmax: further steps, after those of the list
    entries: int  # key blocks in one step
    stages: int  # steps on their way

    @property
    def groups(self) -> int:
        """Groups of warps that share a list and a ring."""
        return self.query_block // GROUP_ROWS

    @property
    def rings(self) -> int:
        """Rings of buffers, each with a loading warp."""
        return 2 // self.groups

    @property
    def columns(self) -> int:
        """Boxes side by side in one row of a tile."""
        return self.head_dim // BOX

    @property
    def step(self) -> int:
        """Keys in one step."""
        return self.entries * KEY_BLOCK

    @property
    def stage_boxes(self) -> int:
        """Boxes that the keys, or the values, of a step fill."""
        return self.entries * self.columns

    @property
    def step_bytes(self) -> int:
        """Bytes of the keys, or the values, of a step."""
        return self.step * self.head_dim * 2

    @property
    def query_bytes(self) -> int:
        """Bytes of the query rows of a tile."""
        return self.query_block * self.head_dim * 2


@dataclass(frozen=True)
class Settings(Tiles):
    """One build of the forward. A stage holds the keys of a step and the values of the step before."""

    fixed: bool  # the row maximum of the first step stays the reference; else the online softmax
    repair: bool  # only the tiles that a launch with `fixed` has put on the list
    query_slots: int  # tiles of query rows on their way
    in_place: bool  # the output leaves through the query's buffer, which then comes free later
    consumer_registers: int = 240
    loader_registers: int = 24


@dataclass(frozen=True)
class QueryGradientSettings(Tiles):
    """One build of the gradient of queries. A stage holds the keys and the values of a step."""

    ahead: bool  # the product of a step is issued with the scores of the next
    consumer_registers: int = 240
    loader_registers: int = 24


@dataclass(frozen=True)
class KeyGradientSettings:
    """One build of the gradients of keys and values: two key blocks at a time, for each a group of four warps."""

    head_dim: int
    query_block: int
    masked: bool
    stages: int  # steps of 64 query rows on their way
    consumer_registers: int = 240
    loader_registers: int = 24

    @property
    def columns(self) -> int:
        """Boxes side by side in one row of a tile."""
        return self.head_dim // BOX

    @property
    def tile_bytes(self) -> int:
        """Bytes of 64 rows."""
        return BOX * self.head_dim * 2


def settings_of(
    head_dim: int, query_block: int, *, masked: bool, pooled: bool = False, repair: bool = False
) -> Settings:
    """The build for a call. A mask takes the online softmax: the first blocks of a list may be masked altogether."""
    fixed = not (masked or repair)
    if query_block == GROUP_ROWS and head_dim == 128:  # two steps of two blocks do not fit, for each group
        return Settings(head_dim, query_block, masked, pooled, 1, 3, fixed, repair, query_slots=1, in_place=True)
    if masked and pooled:  # steps of two blocks do not fit into the registers
        return Settings(head_dim, query_block, masked, pooled, 1, 4, fixed, repair, query_slots=1, in_place=False)
    return Settings(head_dim, query_block, masked, pooled, 2, 2, fixed, repair, query_slots=2, in_place=False)


def query_gradient_settings(
    head_dim: int, query_block: int, *, masked: bool, pooled: bool = False
) -> QueryGradientSettings:
    """The build for a call."""
    stages = 4 if query_block == 2 * GROUP_ROWS else 2
    return QueryGradientSettings(head_dim, query_block, masked, pooled, 1, stages, ahead=stages > 2)


def key_gradient_settings(head_dim: int, query_block: int, *, masked: bool) -> KeyGradientSettings:
    """The build for a call."""
    return KeyGradientSettings(head_dim, query_block, masked, stages=2)
