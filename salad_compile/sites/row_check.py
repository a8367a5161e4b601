"""In an uncompiled forward: that the rows of the gate's input are the tokens of the call, once for each shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from salad_compile.definition.spec import AttentionSpec
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

    def start(self, x: Tensor, out: Tensor) -> None:
        """The query projection has returned `out` for `x`."""
        if x.shape not in self.site.checked_rows or self.tracker is not None:
            self.tracker = self.tracker or of_tensors(WeakIdKeyDictionary())
            self.first, self.leading = self.tracker.add_source(out), tuple(out.shape[:-1])

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
        return gate_fault(rows, self.first, self.leading, sample, self.site.decoded_spec())

    def remember(self, x: Tensor) -> None:
        """This shape of the projection's input was right."""
        if self.tracker is not None:
            self.site.checked_rows.add(x.shape)
            self.tracker = None


def gate_fault(rows: Tensor | str, first: int, leading: Sequence[int], sample: int | None, spec: AttentionSpec) -> str:
    """Why the gates of a call would belong to other tokens than its own, or the empty string.

    Args:
        rows: of :meth:`RowTracker.rows`: int64 (B, S), which row each token is, or why that is not known.
        first: the number of the query projection's first row. leading: sizes of the axes of its output but C.
        sample: see :meth:`RowCheck.fault`. spec: what the site computes.
    """
    if isinstance(rows, str):
        return f"which of its tokens is which row of its query projection is not known: {rows}"
    rows = rows - first
    tokens = torch.Size(leading).numel() // (rows.shape[0] if sample is None else leading[0])
    if not spec.gates_every_query:  # the others are text, of another projection
        rows = rows[:, -tokens:] if spec.text == "before" else rows[:, :tokens]
    if sample is not None:
        rows, leading = rows - sample * tokens, (1, tokens)
    return row_fault(rows, leading, spec.gate_axes)
