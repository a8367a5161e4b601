"""What one attention site computes, without its parameters. Loads no torch: a configuration is checked against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_args

# Types, so that type checkers and editors know the choices.
Gate: TypeAlias = Literal["token", "head", "none"]
Scaling: TypeAlias = Literal["v1", "v2"]
TokenOrder: TypeAlias = Literal["tiles", "flat"]
Compensation: TypeAlias = Literal["none", "tail"]
# What the kernels have (tests/salad_compile/definition/test_spec.py compares): importing them would load torch.
FeatureMap: TypeAlias = Literal["relu", "elu", "softmax"]

GATES: tuple[Gate, ...] = get_args(Gate)
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
TOKEN_ORDERS: tuple[TokenOrder, ...] = get_args(TokenOrder)
COMPENSATIONS: tuple[Compensation, ...] = get_args(Compensation)
FEATURE_MAPS: tuple[FeatureMap, ...] = get_args(FeatureMap)
BLOCK_SIZES = (16, 32, 64, 128, 256)


def density_permille(sparsity: float) -> int:
    """Blocks to keep per thousand. Integer, because in floating point (1 - 0.9) * 10 is below 1 (specification 4.2)."""
    return round(1000 * (1 - sparsity))


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention site computes, without its parameters: the part of the configuration that a graph depends on.

    It travels through traced graphs as one short string, so that sites with equal settings share one compiled graph.

    Those up to `pool` are the user's; the others describe the site.

    Attributes:
        pattern: name of the sparse pattern, see :mod:`salad_compile.definition.patterns`.
        permille: key blocks kept per thousand; where `adjustable`, a tensor says how many, and this is the most.
        window: see :class:`salad_compile.SaladConfig`; 0 derives it from permille.
        compensation: what stands for the blocks that are left out. pool: tokens for which one mean stands.
        text: where the text of a joint sequence lies, "none", "before" or "after" the video, or "prefix": before the
            video, among keys and values only.
        single: whether video and text come through one projection.
        heads_per_key: query heads that share one key and value head.
        square_mask: whether a (B, 1, S, S) mask was seen to be key padding.
        process_group: the processes that share the tokens (kernels/exchange), or the empty string.
        gate_axes: the order in which the leading axes of the query projection's input are samples and tokens, such as
            "1 0" where tokens come first; empty: as they are.
    """

    pattern: str
    permille: int
    query_block: int
    key_block: int
    feature_map: str
    token_order: str = "flat"
    linear_branch: bool = True
    rope_placement: str = "rotate-then-map"
    gate: str = GATES[0]
    scaling: str = SCALINGS[0]
    adjustable: bool = False
    window: int = 0
    compensation: str = COMPENSATIONS[0]
    pool: int = 0
    text: str = "none"
    single: bool = False
    heads_per_key: int = 1
    square_mask: bool = False
    process_group: str = ""
    gate_axes: str = ""

    @property
    def maps_before_position(self) -> bool:
        """Whether query and key are needed as they are before the position encoding."""
        return self.linear_branch and self.rope_placement == "map-then-rotate"

    @property
    def gates_every_query(self) -> bool:
        """Whether the query projection's input has a row for each query of the call, and not for the video's alone."""
        return self.text in ("none", "prefix") or self.single

    @property
    def gate_order(self) -> list[int]:
        """`gate_axes` as numbers; none: as they are."""
        return [int(axis) for axis in self.gate_axes.split()]

    def encode(self) -> str:
        """One line of text, which :meth:`decode` reads."""
        return "|".join(str(getattr(self, field.name)) for field in dataclasses.fields(self))

    @classmethod
    @lru_cache(maxsize=256)
    def decode(cls, text: str) -> AttentionSpec:
        """Inverse of :meth:`encode`."""
        fields = dataclasses.fields(cls)
        return cls(*(_PARSERS.get(f.name, str)(value) for f, value in zip(fields, text.split("|"), strict=True)))


def _parse_bool(text: str) -> bool:
    return text == "True"


# How a field is read that is not text.
_PARSERS: dict[str, Callable[[str], Any]] = {
    "permille": int,
    "query_block": int,
    "key_block": int,
    "linear_branch": _parse_bool,
    "adjustable": _parse_bool,
    "window": int,
    "pool": int,
    "single": _parse_bool,
    "heads_per_key": int,
    "square_mask": _parse_bool,
}
