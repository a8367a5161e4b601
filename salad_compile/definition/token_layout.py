"""Where video and text lie among the tokens of an attention call, and in which order the blocks take them.

Like the definition that uses it, this runs on tensors and on `fx.Proxy` objects alike.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from salad_compile.grid.orders import joint_order
from salad_compile.kernels.direct import call_operator, is_direct


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


_MOST_REORDERINGS = 16  # of one order: lengths of text
_reorderings: MutableMapping[Tensor, dict[tuple[str, int, int], Reordering]] = WeakIdKeyDictionary()


def reordering(order: Tensor, text: str, tokens: int) -> Reordering:
    """The order of a whole sequence from that of its video's tokens: the text stays apart, behind them.

    Args:
        order: int32 (2, V), the order of the video's tokens and its inverse.
        text, tokens: see :func:`segments`.
    """
    if not is_direct((order,)) or order.is_inference():
        return _reordering(order, text, tokens)
    # one object for each order, so that it is made, and its contents are checked, once
    made = _reorderings.setdefault(order, {})
    key = (text, tokens, order._version)
    if key not in made:
        if len(made) >= _MOST_REORDERINGS:
            made.clear()
        with torch.inference_mode(False):  # autograd refuses tensors that were made in inference mode
            made[key] = _reordering(order, text, tokens)
    return made[key]


def _reordering(order: Tensor, text: str, tokens: int) -> Reordering:
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


class Arrangement(NamedTuple):
    """How the tokens of a call are moved before blocks are made of them, and back.

    Attributes:
        moved: the order they are moved into, or None if they stay.
        heads: bool (H, 1, 1), which heads are moved; None for all of them.
        where: video and text among the moved tokens.
    """

    moved: Reordering | None
    heads: Tensor | None
    where: Segments

    def move(self, tensor: Tensor) -> Tensor:
        """(B, H, S, any), native -> moved."""
        return self._taken(tensor, inverse=False)

    def move_back(self, tensor: Tensor) -> Tensor:
        """(B, H, S, any), moved -> native."""
        return self._taken(tensor, inverse=True)

    def _taken(self, tensor: Tensor, inverse: bool) -> Tensor:
        if self.moved is None:
            return tensor
        order, back = reversed(self.moved) if inverse else self.moved
        taken: Tensor = call_operator(torch.ops.salad.take_rows.default, tensor, order, back)
        return taken if self.heads is None else torch.where(self.heads, taken, tensor)


def arrange_all(order: Tensor | None, text: str, tokens: int, video: int) -> Arrangement:
    """All heads alike: the video in its order, the text behind it; or all as it is where there is no order.

    Args:
        order: int32 (2, V), see :func:`reordering`, or None.
        text, tokens, video: see :func:`segments`.
    """
    if order is None:
        return Arrangement(None, None, segments(text, tokens, video))
    where = segments("none" if text == "none" else "after", tokens, video)
    return Arrangement(reordering(order, text, tokens), None, where)


def arrange_heads(heads: Tensor, order: Tensor, text: str, tokens: int, video: int) -> Arrangement:
    """Some heads: the video in its order, the text where it is. The other heads: all as it is.

    Args:
        heads: bool (H,), those whose tokens are moved.
        order, text, tokens, video: see :func:`arrange_all`.
    """
    moved = reordering_in_place(order, text, tokens)
    return Arrangement(moved, heads[:, None, None], segments(text, tokens, video))
