"""Wan under the names of its first release, in two ways of writing attention: that of the release, and ComfyUI's.

The model itself is the one of `examples/clips_to_video/original_wan.py`, at one small size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.clips_to_video import original_wan
from examples.clips_to_video.original_wan import Attention

DIM, HEADS, HEAD_DIM = 24, 2, 12
SIZES = original_wan.Sizes(HEADS, HEAD_DIM, channels=4, text_dim=16, freq_dim=32, ffn_dim=48, layers=2)


class NodeAttention(Attention):
    """Heads still folded when a function of the program's is called, and rotation by 2 x 2 matrices."""

    def forward(self, x: Tensor, context: Tensor, angles: Tensor | None) -> Tensor:
        batch = x.shape[0]
        query = self.norm_q(self.q(x)).view(batch, -1, HEADS, HEAD_DIM)
        key = self.norm_k(self.k(context)).view(batch, -1, HEADS, HEAD_DIM)
        value = self.v(context)
        if angles is not None:
            query, key = (rotate_by_matrices(t, angles) for t in (query, key))
        return self.o(choose_attention(query.view(batch, -1, DIM), key.view(batch, -1, DIM), value, heads=HEADS))


def rotate_by_matrices(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)).float()
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (matrices[..., 0] * pairs[..., 0] + matrices[..., 1] * pairs[..., 1]).flatten(-2).type_as(x)


def choose_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """(B, S, heads x head_dim) throughout."""
    parts = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


class WanModel(original_wan.WanModel):
    """The release's, at this size."""

    def __init__(self) -> None:
        super().__init__(SIZES)


class NodeWanModel(WanModel):
    """As in ComfyUI: one tensor of videos, and a dictionary of options."""

    attention = NodeAttention

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, context: Tensor, transformer_options: dict[str, Any] | None = None
    ) -> Tensor:
        return self.run(x, timestep, context)
