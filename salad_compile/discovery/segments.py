"""Which tokens of an attention call are video and which are text: read from the concatenations of one forward.

A joint sequence is a concatenation of streams: of two projected ones (dual stream), or of what one projection reads
(single stream). A stream is video when it was computed from a video input of the model without passing through
attention: along its residual path. Identity, not names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from salad_compile.discovery.probe import Call, Frame, Probe, Projection
from salad_compile.discovery.token_ranges import Cat


@dataclass(frozen=True)
class Layout:
    """How the queries of a call divide.

    Attributes:
        text: "none", "before" or "after" the video, or "prefix": before the video, among keys and values only.
        text_tokens: how many there are. reason: why the call cannot be converted, or the empty string.
        streams: for each of query, key and value the projections of (video, text); text is None in a single stream.
        argument: the argument of a running module that has as many tokens as there is text, by module name.
    """

    text: str = "none"
    text_tokens: int = 0
    reason: str = ""
    streams: tuple[tuple[Projection, Projection | None], ...] = ()
    arguments: Mapping[str, str] | None = None


def video_inputs(inputs: Mapping[str, Any]) -> set[str]:
    """The inputs that hold the video: those with more than three dimensions; of packed ones that with most tokens."""
    tensors = {
        name: value
        for name, given in inputs.items()
        for value in (given if isinstance(given, (list, tuple)) else [given])
        if isinstance(value, Tensor) and value.ndim >= 3 and value.is_floating_point()
    }
    grids = {name for name, tensor in tensors.items() if tensor.ndim > 3}
    if grids or not tensors:
        return grids
    most = max(tensor.shape[1] for tensor in tensors.values())
    return {name for name, tensor in tensors.items() if tensor.shape[1] == most}


def layout_of(call: Call, probe: Probe, video: set[str]) -> Layout:
    """How the tokens of a self, joint or mixed call divide into video and text."""
    tokens = call.shapes[0][2]
    counts = {len({projection.name for projection in made}) for made in call.made_by}
    if counts == {1}:
        return _single_stream(call, probe, video, tokens)
    if len(call.made_by[0]) == 1 and all(len(made) == 2 for made in call.made_by[1:]):
        return _prefix(call, probe)
    if counts == {2}:
        return _dual_stream(call, probe, video, tokens)
    return Layout(reason="query, key or value are made by several projections")


def _single_stream(call: Call, probe: Probe, video: set[str], tokens: int) -> Layout:
    made = tuple((group[0], None) for group in call.made_by)
    gate_input = made[0][0].gate_input
    read = probe.read_from((gate_input.grad_fn, gate_input.output_nr))
    if read and not read & video:
        return Layout(reason=f"no video: it reads {', '.join(map(repr, sorted(read)))}", streams=made)
    for cat in probe.cats_before(gate_input.grad_fn, through_projections=True):
        if cat.dim == -2 and sum(cat.sizes) == tokens and len(cat.sizes) > 1:
            kinds = _runs(cat, probe, video)
            return _name_inputs(kinds, call, made)
    return Layout(streams=made)


def _runs(cat: Cat, probe: Probe, video: set[str]) -> list[tuple[bool, int]]:
    """(is it video, tokens) of each run of parts of one kind."""
    runs: list[tuple[bool, int]] = []
    for size, edge in zip(cat.sizes, cat.edges, strict=True):
        read = probe.read_from(edge)
        kind = bool(read & video) or not read
        if runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + size)
        else:
            runs.append((kind, size))
    return runs


def _name_inputs(
    runs: Sequence[tuple[bool, int]], call: Call, streams: tuple[tuple[Projection, Projection | None], ...]
) -> Layout:
    kinds = tuple(kind for kind, _ in runs)
    if kinds == (True,):
        return Layout(streams=streams)
    if kinds not in ((True, False), (False, True)):
        return Layout(reason="its text does not lie on one side of the video", streams=streams)
    text = "after" if kinds[0] else "before"
    count = runs[1][1] if kinds[0] else runs[0][1]
    return Layout(text, count, "", streams, _arguments(call.stack, count))


def _arguments(stack: Sequence[Frame], tokens: int) -> dict[str, str]:
    """Module name -> its argument with (B, tokens, C), where just one has that many tokens."""
    found = {}
    for frame in stack:
        fitting = [name for name, shape in frame.arguments.items() if len(shape) == 3 and shape[1] == tokens]
        if len(fitting) == 1:
            found[frame.name] = fitting[0]
    return found


def _dual_stream(call: Call, probe: Probe, video: set[str], tokens: int) -> Layout:
    streams: list[tuple[Projection, Projection | None]] = []
    sides = set()
    sizes = set()
    for operand, made in zip(
        (call.arguments.query, call.arguments.key, call.arguments.value), call.made_by, strict=True
    ):
        split = _split(operand, made, probe)
        if split is None:
            return Layout(
                reason="two projections make its query, key or value, but not one for each part of the tokens"
            )
        (first, second), lengths = split
        kinds = [bool(probe.read_from((p.gate_input.grad_fn, p.gate_input.output_nr)) & video) for p in (first, second)]
        if kinds[0] == kinds[1]:
            return Layout(reason="joint attention over two streams, of which not just one is video")
        sides.add(kinds[0])
        sizes.add(lengths)
        streams.append((first, second) if kinds[0] else (second, first))
    if len(sides) != 1 or len(sizes) != 1 or sum(next(iter(sizes))) != tokens:
        return Layout(reason="query, key and value concatenate their streams differently")
    video_first = sides.pop()
    lengths = sizes.pop()
    return Layout("after" if video_first else "before", lengths[1 if video_first else 0], "", tuple(streams))


def _prefix(call: Call, probe: Probe) -> Layout:
    """Keys and values of other tokens before those of the queries."""
    query = call.made_by[0][0]
    tokens, keys = call.shapes[0][2], call.shapes[1][2]
    streams: list[tuple[Projection, Projection | None]] = [(query, None)]
    for operand, made in zip((call.arguments.key, call.arguments.value), call.made_by[1:], strict=True):
        split = _split(operand, made, probe)
        if split is None or split[1] != (keys - tokens, tokens):
            return Layout(reason="key and value come from other tokens than the query")
        streams.append((split[0][1], None))
    return Layout("prefix", keys - tokens, "", tuple(streams))


def _split(
    operand: Tensor, made: Sequence[Projection], probe: Probe
) -> tuple[tuple[Projection, Projection], tuple[int, int]] | None:
    """The two projections of a concatenated operand in the order of the tokens, and their lengths."""
    for cat in probe.cats_before(operand.grad_fn, through_projections=False):
        if len(cat.sizes) == 2 and cat.dim in (-2, -3):
            parts = [probe.made_by(node) for node, _ in cat.edges]
            if all(len(part) == 1 for part in parts) and {p.name for part in parts for p in part} == {
                p.name for p in made
            }:
                return (parts[0][0], parts[1][0]), (cat.sizes[0], cat.sizes[1])
    return None
