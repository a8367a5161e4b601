"""Where a converted site lives and what it looks like: what a saved file knows of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from salad_compile.calls.kinds import CallKind

# What a projection of a site can be; a text stream has its own.
ROLES = ("query", "key", "value", "out", "text_query", "text_key", "text_value", "text_out")


@dataclass(frozen=True)
class SiteRecord:
    """Where a converted site lives and what shape it has; stored in saved files, so that loading needs no inputs.

    Module names are relative to the converted model. A fused projection is named once for each role that it serves.
    query, key, value and out are the video's projections, text_query and so on those of a text stream of its own. The
    other fields are those of :class:`salad_compile.discovery.attention_site.AttentionSite`.
    """

    owner: str
    query: str
    key: str
    value: str
    out: str | None
    heads: int
    head_dim: int
    value_dim: int
    batch: int
    tokens: int
    call_index: int
    text_query: str | None = None
    text_key: str | None = None
    text_value: str | None = None
    text_out: str | None = None
    key_heads: int | None = None
    text: str = "none"
    text_tokens: int = 0
    text_argument: str | None = None
    on_grid: bool = False
    square_mask: bool = False
    dropped: bool = False  # its linear branch, after fine-tuning: see dropping.py
    call: CallKind = ""  # of its attention call; files of earlier versions do not tell
    # role -> first channel and end, of projections that serve more than this attention; files of before have none
    channels: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)
    rotated_first: bool = False  # its position encoding cannot be replayed, and "auto" takes the other placement
    gate_axes: str = ""  # of the query projection's input: see position/gate_rows.py

    @property
    def width(self) -> int:
        """D, the width of the concatenated heads."""
        return self.heads * self.value_dim

    @property
    def groups(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // (self.key_heads or self.heads)

    def head_widths(self) -> dict[str, int]:
        """Role -> channels that the attention call reads of it."""
        keys = self.heads // self.groups
        widths = {"query": self.heads * self.head_dim, "key": keys * self.head_dim, "value": keys * self.value_dim}
        return {**widths, **{f"text_{role}": width for role, width in widths.items()}}

    def projections(self) -> dict[str, str]:
        """Role -> module name, those of the video (query, key, value, out) first, without those that are not there."""
        roles = {role: getattr(self, role) for role in ROLES}
        return {role: name for role, name in roles.items() if name is not None}

    def shared_roles(self) -> dict[str, tuple[str, ...]]:
        """First role of each distinct projection -> all its roles, as {"query": ("query", "key", "value")}."""
        groups: dict[str, tuple[str, ...]] = {}
        for name in dict.fromkeys(self.projections().values()):
            roles = tuple(role for role, other in self.projections().items() if other == name)
            groups[roles[0]] = roles
        return groups

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiteRecord:
        """Inverse of :meth:`to_dict`."""
        channels = {role: (int(first), int(end)) for role, (first, end) in values.get("channels", {}).items()}
        return cls(**{**values, "channels": channels})
