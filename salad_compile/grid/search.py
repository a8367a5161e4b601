"""How a grid rule is found: from the arguments of one example call and the number of video tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from salad_compile.grid.rule import GridRule, latent_shape, sizes_of
from salad_compile.grid.sizes import HINT, Grid, show

# Patches to try where the model's configuration names none, or one that does not fit; the usual ones first.
_SPATIAL_PATCHES = (2, 1, 4, 8, 16)
_TEMPORAL_PATCHES = (1, 2, 4)
# (T, H, W) in a latent: (B, C, T, H, W), then (B, T, C, H, W) as in CogVideoX, then (B, T, H, W, C) as in Kandinsky.
_LATENT_AXES = ((2, 3, 4), (1, 3, 4), (1, 2, 3))
# Words of argument names that stand for an edge of the grid.
_FRAME_WORDS = frozenset({"t", "f", "frame", "frames", "time", "temporal", "depth"})
_HEIGHT_WORDS = frozenset({"h", "height", "y", "rows"})
_WIDTH_WORDS = frozenset({"w", "width", "x", "columns", "cols"})
_OTHER_STREAMS = frozenset({"audio", "text", "image", "mask", "pose", "control"})


class GridFinding(NamedTuple):
    """What :func:`find_grid_rule` found: a rule, or None; and in words how, or why not."""

    rule: GridRule | None
    reason: str


@dataclass(frozen=True)
class _Candidate:
    """A rule that might be meant, and what it gives on the example call."""

    rule: GridRule
    grid: Grid
    configured: bool
    """The patch is the configuration's, or there is none to choose."""
    whole: bool
    """Every axis is a multiple of its patch."""

    def agrees_with(self, grids: Iterable[tuple[int, ...]]) -> bool:
        """Whether one of these (T, H, W) or (H, W) is this grid. Convolutions of frames do not join frames."""
        frames_apart = self.rule.patch is None or self.rule.patch[0] == 1
        return any(self.grid == grid or (self.grid[1:] == grid and frames_apart) for grid in grids)


def find_grid_rule(
    named_inputs: Mapping[str, Any],
    video_tokens: int,
    *,
    patch_size: int | Sequence[int] | None = None,
    patch_size_t: int | None = None,
    conv_grids: Iterable[Sequence[int]] = (),
    channel_axes: Mapping[str, int] = MappingProxyType({}),
) -> GridFinding:
    """Find out from one call how a model's arguments show the token grid.

    A rule must give `video_tokens` tokens, with the configured patch or with a grid that a patch convolution computed.
    Of several, prefer those with the configured patch, then those that a convolution confirms, then patches of one
    frame, then patches without a remainder. What is left must agree on the grid; then named integers come before
    shapes, arguments in their order, and channels before frames. So a clip with as many frames as channels counts as
    (B, C, T, H, W): the caller that applies a rule must compare the number of tokens in every call.

    Args:
        named_inputs: forward's arguments by name, in the order of its signature, as one example call has them.
        video_tokens: video tokens of an attention site in that call.
        patch_size: what the model's configuration says: p for (1, p, p), (h, w) or (t, h, w). Anything else is
            ignored.
        patch_size_t: the temporal patch, where the configuration has it apart (CogVideoX 1.5).
        channel_axes: of 5-D arguments, the axis that was seen to be the channels: never one of the grid's.
        conv_grids: output sizes (T, H, W) or (H, W) of patch convolutions in that call. Other lengths are ignored.
    """
    patch = _configured_patch(patch_size, patch_size_t)
    seen = [tuple(int(edge) for edge in grid) for grid in conv_grids if len(grid) in (2, 3)]
    candidates = [
        *_argument_candidates(named_inputs),
        *_size_candidates(named_inputs, patch),
        *_latent_candidates(named_inputs, patch, channel_axes),
    ]
    right = [candidate for candidate in candidates if math.prod(candidate.grid) == video_tokens]
    # a patch size that nothing but the product speaks for would give another product at the next resolution
    fitting = [candidate for candidate in right if candidate.configured or candidate.agrees_with(seen)]
    if not fitting:
        return GridFinding(None, _why_nothing_fits(right, candidates, video_tokens, seen))
    preferences: tuple[Callable[[_Candidate], bool], ...] = (
        lambda candidate: candidate.configured,
        lambda candidate: candidate.agrees_with(seen),
        lambda candidate: candidate.rule.patch is None or candidate.rule.patch[0] == 1,
        lambda candidate: candidate.whole,
    )
    for preferred in preferences:
        fitting = [candidate for candidate in fitting if preferred(candidate)] or fitting
    grids = {candidate.grid: candidate.rule for candidate in reversed(fitting)}
    if len(grids) > 1:
        listed = "; ".join(f"{show(grid)} ({rule})" for grid, rule in sorted(grids.items()))
        return GridFinding(None, f"{video_tokens} video tokens could be any of several grids: {listed}. {HINT}")
    return GridFinding(fitting[0].rule, f"{show(fitting[0].grid)} from {fitting[0].rule}")


def _argument_candidates(named_inputs: Mapping[str, Any]) -> Iterator[_Candidate]:
    """Three integer arguments named like the edges of a grid; the plainest names first."""
    words = {
        name: set(re.split(r"[_\d]+", name.lower()))
        for name, value in named_inputs.items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
    edges = [
        sorted(
            (name for name, own in words.items() if own & meant and not own & _OTHER_STREAMS),
            key=lambda n: len(words[n]),
        )
        for meant in (_FRAME_WORDS, _HEIGHT_WORDS, _WIDTH_WORDS)
    ]
    for t in edges[0]:
        for h in edges[1]:
            for w in edges[2]:
                grid = (named_inputs[t], named_inputs[h], named_inputs[w])
                if len({t, h, w}) == 3 and min(grid) > 0:
                    yield _Candidate(GridRule("arguments", (t, h, w)), grid, configured=True, whole=True)


def _size_candidates(named_inputs: Mapping[str, Any], configured: Grid | None) -> Iterator[_Candidate]:
    """Arguments that hold three sizes: of the grid, or of what becomes patches."""
    for name, value in named_inputs.items():
        sizes = sizes_of(value)
        if sizes is None or min(sizes) < 1:
            continue
        for patch in dict.fromkeys(((1, 1, 1), configured or (1, 1, 1))):
            rule = GridRule("sizes", (name,), patch=patch)
            whole = all(size % edge == 0 for size, edge in zip(sizes, patch, strict=True))
            yield _Candidate(rule, rule.grid(named_inputs), configured=True, whole=whole)


def _latent_candidates(
    named_inputs: Mapping[str, Any], configured: Grid | None, channel_axes: Mapping[str, int]
) -> Iterator[_Candidate]:
    patches = [(t, p, p) for t in _TEMPORAL_PATCHES for p in _SPATIAL_PATCHES]
    if configured is not None:
        patches = [configured, *(patch for patch in patches if patch != configured)]
    for name, value in named_inputs.items():
        shape = latent_shape(value)
        if shape is None or 0 in shape:
            continue
        for axes in _LATENT_AXES:
            if channel_axes.get(name) in axes:
                continue
            for patch in patches:
                rule = GridRule("latent", (name,), axes, patch)
                whole = all(shape[axis] % edge == 0 for axis, edge in zip(axes, patch, strict=True))
                yield _Candidate(rule, rule.grid(named_inputs), patch == configured, whole)


def _configured_patch(patch_size: Any, patch_size_t: Any) -> Grid | None:
    """(t, h, w), or None where the configuration does not say it in a way that is known."""
    edges = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if not isinstance(edges, tuple | list) or len(edges) not in (2, 3):
        return None
    t, h, w = (1, *edges)[-3:]
    t = t if patch_size_t is None else patch_size_t
    return (t, h, w) if all(isinstance(edge, int) and edge > 0 for edge in (t, h, w)) else None


def _why_nothing_fits(
    right: Sequence[_Candidate], candidates: Sequence[_Candidate], video_tokens: int, seen: Sequence[tuple[int, ...]]
) -> str:
    if not candidates:
        return (
            "no argument of forward shows the grid: none is a 5-D tensor or holds three sizes, and no "
            "three are integers with names like "
            f"num_frames, height and width. {HINT}"
        )
    convolved = f" Patch convolutions put out {', '.join(map(show, seen))}." if seen else ""
    if right:
        return (
            f"{video_tokens} video tokens would be {show(right[0].grid)} from {right[0].rule}, but neither a "
            f"configured patch_size nor a patch convolution confirms that.{convolved} {HINT}"
        )
    tried = [candidate for candidate in candidates if candidate.configured] or candidates
    listed = "; ".join(f"{show(candidate.grid)} from {candidate.rule}" for candidate in tried[:4])
    return f"no argument shows a grid of {video_tokens} video tokens; seen: {listed}.{convolved} {HINT}"
