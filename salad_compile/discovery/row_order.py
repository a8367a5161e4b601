"""Which row of the query projection's input belongs to which token of an attention call, and what cannot be told."""

from __future__ import annotations

import itertools
import math
from typing import Any

from salad_compile.discovery.probe import Call, Probe
from salad_compile.discovery.segments import Layout
from salad_compile.position.gate_rows import FOREIGN_TOKENS, OTHER_TOKENS, find_axes


def gate_rows(call: Call, layout: Layout, probe: Probe) -> tuple[str, str]:
    """The order of the axes of the query projection's input, and why its rows are not the call's tokens.

    Each "" where there is none.
    """
    if layout.reason or not layout.streams or len(call.shapes[0]) != 4:  # of other ranks the call itself speaks
        return "", ""
    projection, text = layout.streams[0]
    gate_input = projection.gate_input
    leading = tuple(gate_input.shape[:-1])
    batch, _, tokens, _ = call.shapes[0]
    expected = tokens - layout.text_tokens if text is not None else tokens
    samples = leading[0] if len(leading) > 1 else 1
    one_by_one = batch == 1 and samples > 1 and math.prod(leading) == samples * expected  # a call for each sample
    if math.prod(leading) != batch * expected and not one_by_one:
        return "", f"the query projection sees {leading} tokens, the attention ({batch}, {tokens})"
    if isinstance(call.rows, str):
        return "", f"which of its tokens is which row of its query projection is not known: {call.rows}"
    rows = call.rows - projection.first_row
    if text is not None:
        rows = rows[:, layout.text_tokens :] if layout.text == "before" else rows[:, :expected]
    if one_by_one:
        earlier = itertools.takewhile(lambda other: other is not call, probe.calls)
        rows = rows - expected * sum(nodes_of(other) == nodes_of(call) for other in earlier)
        leading = (1, expected)
    axes = find_axes(rows, leading)
    if axes is None:
        return "", FOREIGN_TOKENS if bool((rows < 0).any()) else OTHER_TOKENS
    return axes, ""


def nodes_of(call: Call) -> list[Any]:
    """What identifies the runs of projections that made a call's query."""
    return [projection.node for projection in call.made_by[0]]
