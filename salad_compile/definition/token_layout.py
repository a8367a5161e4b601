"""Where video and text lie among the tokens of an attention call, and in which order the blocks take them.

Like the definition that uses it, this runs on tensors and on `fx.Proxy` objects alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from salad_compile.grid.orders import joint_order

__all__ = ["Reordering", "Segments", "reordering", "reordering_in_place", "segments"]


class Segments(NamedTuple):
    """Where video and text lie among the tokens that the operators see, for one call.

    Attributes:
        sink_begin, sink_end: the text: as keys always attended to, as queries dense. Empty where there is none.
        video_begin, video_end: the video.
    """

    sink_begin: int
    sink_end: int
    video_begin: int
    video_end: int


def segments(text: str, tokens: int, video: int) -> Segments:
    """Where the text lies (specification 4.4).

    Args:
        text: "none", "before" or "after" the video. tokens, video: lengths of the whole sequence and of the video.
    """
    if text == "none":
        return Segments(0, 0, 0, tokens)
    if text == "before":
        return Segments(0, tokens - video, tokens - video, tokens)
    return Segments(video, tokens, 0, video)


class Reordering(NamedTuple):
    """A permutation of all tokens of a call: int32 (S,) and its inverse. The video's tokens come first."""

    order: Tensor
    inverse: Tensor


def reordering(order: Tensor, text: str, tokens: int) -> Reordering:
    """The order of a whole sequence from that of its video's tokens: the text stays apart, behind them.

    Args:
        order: int32 (2, V), the order of the video's tokens and its inverse.
        text, tokens: see :func:`segments`.
    """
    if text == "none":
        return Reordering(order[0], order[1])
    count = tokens - order.shape[1]
    if text == "after":
        return Reordering(joint_order(order[0], count, False), joint_order(order[1], count, False))
    # native [text, video]: the text's tokens stand at positions V .. S - 1 of the order
    at = torch.arange(order.shape[1], tokens, dtype=torch.int32, device=order.device)
    return Reordering(joint_order(order[0], count, True), torch.cat((at, order[1])))


def reordering_in_place(order: Tensor, text: str, tokens: int) -> Reordering:
    """Like :func:`reordering`, with the text left where it is."""
    if text != "before":
        return reordering(order, text, tokens)
    count = tokens - order.shape[1]
    at = torch.arange(count, dtype=torch.int32, device=order.device)
    return Reordering(torch.cat((at, order[0] + count)), torch.cat((at, order[1] + count)))
