"""One attention call of a model's forward, and whether it can be converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from salad_compile.calls.kinds import CallKind
from salad_compile.sites.record import SiteRecord


@dataclass(frozen=True)
class AttentionSite:
    """One attention call of a model's forward.

    Attributes:
        name: the module whose forward contains both the projections and the call ("" is the model itself).
        kind: "self", "cross", "joint" (video and text concatenated), "mixed" (key and value see more than the query) or
            "unresolved" (some of query, key, value come from no Linear).
        query, key, value: names of the projections, the video's first; several for two streams, equal for a fused one.
        out: the output projection. text_out: that of the text stream.
        batch, heads, key_heads, query_tokens, key_tokens, head_dim, value_dim: sizes in the example forward.
        text: where the text lies, "none", "before", "after" or "prefix" (keys only). text_tokens: how many.
        text_argument: the owner's argument that has as many tokens. on_grid: whether the video's tokens are the grid's.
        mask: shape of the attention mask, or None. mask_kind: "", "keys", "padding" (a square one), "square",
            "unread" (square, on fake tensors) or "other".
        causal: whether the call is causal.
        call_index: the call's number within one forward of `name`. call: its kind, if the eager twin may rely on it.
        invocations: how often the example forward reached it.
        eligible: whether `convert` converts it. reason: if not, why.
        channels: role -> first channel and end, of projections that serve more than attention.
        gate_axes: in which order the leading axes of the query projection's input are samples and tokens, "" as they
            are: see position/gate_rows.py.
        position_fault: for which operand its position encoding cannot be replayed, and why, if that was asked.
    """

    name: str
    kind: str
    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    out: str | None
    text_out: str | None
    batch: int
    heads: int
    key_heads: int
    query_tokens: int
    key_tokens: int
    head_dim: int
    value_dim: int
    text: str
    text_tokens: int
    text_argument: str | None
    on_grid: bool
    mask: tuple[int, ...] | None
    mask_kind: str
    causal: bool
    call_index: int
    invocations: int
    eligible: bool
    reason: str
    position_fault: tuple[str, str] | None = None
    call: CallKind = ""
    channels: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)
    gate_axes: str = ""

    @property
    def video_tokens(self) -> int:
        """Tokens that are not text."""
        return self.query_tokens if self.text == "prefix" else self.query_tokens - self.text_tokens

    def record(self) -> SiteRecord:
        """What conversion keeps of an eligible site."""
        dual = self.text in ("before", "after") and len(self.query) == 2
        return SiteRecord(
            owner=self.name,
            query=self.query[0],
            key=self.key[0],
            value=self.value[0],
            out=self.out,
            text_query=self.query[1] if dual else None,
            text_key=self.key[1] if dual else None,
            text_value=self.value[1] if dual else None,
            text_out=self.text_out if dual else None,
            heads=self.heads,
            key_heads=self.key_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            batch=self.batch,
            tokens=self.query_tokens,
            text=self.text,
            text_tokens=self.text_tokens,
            text_argument=self.text_argument,
            on_grid=self.on_grid,
            square_mask=self.mask_kind == "padding",
            call_index=self.call_index,
            call=self.call,
            rotated_first=self.position_fault is not None,
            channels=dict(self.channels),
            gate_axes=self.gate_axes,
        )
