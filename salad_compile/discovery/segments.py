"""Which tokens of an attention call are video and which are text: read from the concatenations of one forward.

A joint sequence is a concatenation of streams: of two projected ones (dual stream), or of what one projection reads
(single stream). A stream is video when it was computed from a video input of the model without passing through
attention: along its residual path. Identity, not names.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salad_compile.discovery.probe import Call, Frame, Probe, Projection


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
    """The inputs that hold the video: those with more than three dimensions; of packed ones that with most tokens.

    Where names tell videos from other streams (`video_latents`, `audio_latents`), they decide.
    """
    tensors = {
        name: value
        for name, given in inputs.items()
        for value in (given if isinstance(given, (list, tuple)) else [given])
        if isinstance(value, Tensor) and value.ndim >= 3 and value.is_floating_point()
    }
    named = {name for name in tensors if "video" in name.lower()}
    if named and any("audio" in name.lower() for name in tensors):
        return named
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
        return _single_stream(call, probe, video)
    if len(call.made_by[0]) == 1 and all(len(made) == 2 for made in call.made_by[1:]):
        return _prefix(call, probe)
    if counts == {2}:
        return _dual_stream(call, probe, video, tokens)
    return Layout(reason="query, key or value are made by several projections")


def _single_stream(call: Call, probe: Probe, video: set[str]) -> Layout:
    made = tuple((group[0], None) for group in call.made_by)
    projection = made[0][0]
    read = probe.labels.names_of(projection.labels)
    if read and not read & video:
        return Layout(reason=f"no video: it reads {', '.join(map(repr, sorted(read)))}", streams=made)
    if not read and video:
        return Layout(reason="none of the model's inputs is seen to reach its tokens", streams=made)
    if not video or isinstance(call.rows, str):
        return Layout(streams=made)
    rows = call.rows - projection.first_row
    own = (rows >= 0) & (rows < projection.labels.numel())
    labels = torch.where(own, projection.labels[rows.clamp(0, projection.labels.numel() - 1)], torch.tensor(0))
    if (labels[:1] != labels).any():
        return Layout(reason="its samples divide into video and text in different ways", streams=made)
    tokens = labels[0].tolist()
    kinds = {}
    for label in set(tokens):
        possible, certain = (bool(names & video) for names in _names(probe, torch.tensor(label)))
        if possible != certain:
            return Layout(reason=_not_known(probe), streams=made)
        kinds[label] = certain
    runs = [(is_video, list(run)) for is_video, run in itertools.groupby(tokens, key=kinds.__getitem__)]
    if [is_video for is_video, _ in runs] not in ([True], [True, False], [False, True]):
        return Layout(reason=_scattered(runs, probe), streams=made)
    return _name_inputs([(is_video, len(run)) for is_video, run in runs], call, made)


def _names(probe: Probe, labels: Tensor) -> tuple[set[str], set[str]]:
    """The inputs from which tokens may come, and those from which they come for certain."""
    return probe.labels.names_of(labels), probe.labels.names_of(labels, certain=True)


def _not_known(probe: Probe) -> str:
    reason = probe.labels.reason or "an operation that torch does not show"
    return f"which of its tokens are text is not known: {reason}"


def _scattered(runs: Sequence[tuple[bool, Sequence[int]]], probe: Probe) -> str:
    """That what is no video lies on several sides of it, and what there is in the order of the tokens."""
    parts = []
    for is_video, labels in runs[:_MOST_RUNS]:
        names = probe.labels.names_of(torch.tensor(list(set(labels))))
        origin = f"from {' and '.join(map(repr, sorted(names)))}" if names else "from none of the inputs"
        parts.append(f"{len(labels)} {'of the video' if is_video else 'others'} {origin}")
    parts += ["..."] if len(runs) > _MOST_RUNS else []
    return f"its other tokens (text, registers, padding) do not lie on one side of the video: {', '.join(parts)}"


_MOST_RUNS = 4


def _name_inputs(
    runs: Sequence[tuple[bool, int]], call: Call, streams: tuple[tuple[Projection, Projection | None], ...]
) -> Layout:
    kinds = tuple(kind for kind, _ in runs)
    if kinds == (True,):
        return Layout(streams=streams)
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
    for operand, rows, made in zip(
        (call.arguments.query, call.arguments.key, call.arguments.value),
        (call.rows, call.key_rows, call.value_rows),
        call.made_by,
        strict=True,
    ):
        split = _split(operand, rows, made, probe)
        if split is None:
            return Layout(
                reason="two projections make its query, key or value, but not one for each part of the tokens"
            )
        (first, second), lengths = split
        kinds = [bool(probe.labels.names_of(p.labels) & video) for p in (first, second)]
        if kinds != [bool(_names(probe, p.labels)[1] & video) for p in (first, second)]:
            return Layout(reason=_not_known(probe))
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
    operands = zip((call.arguments.key, call.arguments.value), (call.key_rows, call.value_rows), strict=True)
    for (operand, rows), made in zip(operands, call.made_by[1:], strict=True):
        split = _split(operand, rows, made, probe)
        if split is None or split[1] != (keys - tokens, tokens):
            return Layout(reason="key and value come from other tokens than the query")
        streams.append((split[0][1], None))
    return Layout("prefix", keys - tokens, "", tuple(streams))


def _split(
    operand: Tensor, rows: Tensor | str, made: Sequence[Projection], probe: Probe
) -> tuple[tuple[Projection, Projection], tuple[int, int]] | None:
    """The two projections of a concatenated operand in the order of the tokens, and their lengths."""
    if isinstance(rows, Tensor):
        return _split_rows(rows, made)
    for cat in probe.cats_before(operand.grad_fn, through_projections=False):
        if len(cat.sizes) == 2 and cat.dim in (-2, -3):
            parts = [probe.made_by(node) for node, _ in cat.edges]
            if all(len(part) == 1 for part in parts) and {p.name for part in parts for p in part} == {
                p.name for p in made
            }:
                return (parts[0][0], parts[1][0]), (cat.sizes[0], cat.sizes[1])
    return None


def _split_rows(
    rows: Tensor, made: Sequence[Projection]
) -> tuple[tuple[Projection, Projection], tuple[int, int]] | None:
    """The same, from which row of which projection each token is, (B, S)."""
    found = torch.full_like(rows, -1)
    for at, projection in enumerate(made):
        found = torch.where(projection.owns(rows), at, found)
    if (found[:1] != found).any():
        return None
    runs = [(at, len(list(run))) for at, run in itertools.groupby(found[0].tolist())]
    if len(runs) != 2 or -1 in (runs[0][0], runs[1][0]):
        return None
    return (made[runs[0][0]], made[runs[1][0]]), (runs[0][1], runs[1][1])
