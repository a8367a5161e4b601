"""In an uncompiled forward: that the rows of the gate's input are the tokens of the call, once for each shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from salad_compile.position.gate_rows import row_fault
from salad_compile.position.rows import RowTracker, of_tensors

if TYPE_CHECKING:
    from salad_compile.calls.adapters import AttentionArguments
    from salad_compile.sites.site import Site


class RowCheck:
    """What happens between a site's query projection and its attention call, in one forward.

    Args:
        site: whose shapes that were seen to be right are remembered.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tracker: RowTracker | None = None
        self.first = 0
        self.leading: Sequence[int] = ()

    def start(self, x: Tensor, out: Tensor) -> Tensor:
        """The query projection has returned `out` for `x`. Returns `out`."""
        if x.shape in self.site.checked_rows and self.tracker is None:
            return out
        self.tracker = self.tracker or of_tensors(WeakIdKeyDictionary())
        self.first, self.leading = self.tracker.add_source(out), tuple(out.shape[:-1])
        return out

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An operation of the model ran."""
        if self.tracker is not None:
            self.tracker.note(func, args, kwargs, out)

    def fault(self, call: AttentionArguments, sample: int | None) -> str:
        """Why the gates would belong to other tokens than the call's, or the empty string.

        Args:
            sample: which sample this call is about, in models that attend to one after another.
        """
        if self.tracker is None:
            return ""
        rows = self.tracker.rows(call.query, call.heads_first)
        if isinstance(rows, str):
            return f"which of its tokens is which row of its query projection is not known: {rows}"
        return checked_rows(rows - self.first, self.leading, sample, self.site.record.gate_axes, self._video_side())

    def remember(self, x: Tensor) -> None:
        """This shape of the projection's input was right."""
        if self.tracker is not None:
            self.site.checked_rows.add(x.shape)
            self.tracker = None

    def _video_side(self) -> str:
        spec = self.site.decoded_spec()
        return "" if spec.single else {"before": "last", "after": "first"}.get(spec.text, "")


def checked_rows(rows: Tensor, leading: Sequence[int], sample: int | None, axes: str, video: str) -> str:
    """Why rows are not those of the gate's input, or the empty string.

    Args:
        rows: int64 (B, S), which row of the projection each token is. leading: sizes of the axes of its output but C.
        sample: see :meth:`RowCheck.fault`. axes: see position/gate_rows.py.
        video: which of the tokens are the projection's: "first", "last" or all ("").
    """
    count = torch.Size(leading).numel()
    video_tokens = count // (rows.shape[0] if sample is None else leading[0])
    if video:
        rows = rows[:, -video_tokens:] if video == "last" else rows[:, :video_tokens]
    if sample is not None:
        rows, leading = rows - sample * video_tokens, (1, video_tokens)
    return row_fault(rows, leading, axes)
