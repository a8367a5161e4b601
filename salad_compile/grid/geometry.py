"""The token grid (T, H, W) of a video: where it is read from, and the orders of its tokens (specification 4.1).

A token order is an int32 permutation of the native positions (t * H + y) * W + x. Blocks of attention are runs of
consecutive tokens in it, so a good order keeps runs of 64 and 128 tokens compact. :func:`locality` measures that:
the mean squared distance to the run's centre. A cube of 4 x 4 x 4 has 3.75, two such cubes in a row have 7.75.

:func:`tile_order` walks along columns of 4 frames x 4 rows x all of the width, slice after slice, there and back. A run
may begin anywhere in a column and is compact. Cubes one after another are not: behind the first border cube that is not
full, every run is torn between two cubes. Means over runs of 64, as `test_geometry.py::test_locality_table` measures
them:

| grid      | native | cubes 4x4x4 | the same, there and back | columns 4x4 |
|-----------|--------|-------------|--------------------------|-------------|
| 21x30x52  | 226.05 | 29.97       | 5.04                     | 4.24        |
| 21x45x80  | 505.95 | 5.32        | 5.25                     | 4.01        |
| 13x30x45  | 169.15 | 38.77       | 7.51                     | 4.23        |
| 21x60x104 | 765.12 | 12.47       | 4.60                     | 3.95        |
| 5x16x16   | 22.50  | 7.50        | 7.50                     | 4.17        |
| 31x16x24  | 47.91  | 5.09        | 4.04                     | 3.83        |
| 23x29x53  | 233.78 | 40.83       | 6.72                     | 4.16        |

The mean over these grids is 4.09 for runs of 64 and 7.81 for runs of 128. Columns of 5 x 4, 4 x 5 and 5 x 5 have 4.35,
4.61 and 4.97 for 64 and are better for 128 (7.12, 7.04 and 6.75). Blocks of keys have 64 tokens, hence 4 x 4. That is
our choice, of a distance that counts a frame as much as a row. In the experiment of docs/evidence.md this order closes
68.0 % of the gap that sparsity opens, and the native order 56.5 %.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from salad_compile.config import check_names
from salad_compile.errors import ConfigError, GridMismatchError

__all__ = [
    "Grid",
    "GridFinding",
    "GridRule",
    "GridSource",
    "cached_order",
    "checked_grid",
    "find_grid_rule",
    "joint_order",
    "locality",
    "order_and_inverse",
    "read_grid",
    "temporal_order",
    "tile_order",
]

Grid = tuple[int, int, int]
"""(T, H, W), each an int, or a SymInt where sizes are symbolic."""

GridSource: TypeAlias = "GridRule | Sequence[int] | Callable[[Mapping[str, Any]], Sequence[int]]"
"""What says the grid: a rule, the user's (T, H, W), or the user's function of forward's arguments by name."""

OrderOf: TypeAlias = "Callable[..., Tensor]"
"""Makes an order of a grid's tokens: `make(grid, device=...)`."""

TILE = (4, 4)
KINDS = ("arguments", "latent", "fixed")
CACHED_ORDERS = 8

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

_MEND = "Pass grid=(T, H, W), the number of tokens along time, height and width, or a function of forward's arguments."


# ---------------------------------------------------------------- orders


def tile_order(grid: Grid, tile: tuple[int, int] = TILE, *, device: torch.device | str | int | None = None) -> Tensor:
    """The order that walks along columns of the grid, there and back, slice after slice.

    A column is `tile` = (frames, rows) thick and as long as the width; frames and rows are shared out evenly among
    columns of about that thickness. A clip with fewer frames than that gets more rows per column. The next column is a
    neighbour, and begins where the last one ended. A run of 64 tokens is a cube of 4 x 4 x 4 where nothing is in the
    way. Any grid will do. Traces with symbolic sizes.

    Args:
        grid: (T, H, W), each 1 or more (unchecked, see :func:`checked_grid`).
        device: where to put the order; None is torch's default device.

    Returns:
        int32 (T * H * W,): order[i] is the native position of the i-th token.
    """
    frames, rows, width = grid
    native = torch.arange(frames * rows * width, dtype=torch.int64, device=device)
    t, y, x = native // (rows * width), native // width % rows, native % width
    thick, high = tile
    high = high * (2 * thick - min(frames, thick)) // thick
    slabs, columns = _parts(frames, thick), _parts(rows, high)
    slab, column = t * slabs // frames, y * columns // rows
    # The digits of where a token's slice is. A digit runs backwards wherever the digits before it make an odd number.
    column = slab * columns + _there_and_back(column, columns, slab)
    place = column * width + _there_and_back(x, width, column)
    return torch.argsort(place * (frames * rows * width) + native).to(torch.int32)


def _parts(size: int, edge: int) -> int:
    """How many parts of about `edge` there are in `size`: rounded, and at least one."""
    return max((2 * size + edge) // (2 * edge), 1)


def _there_and_back(digit: Tensor, count: int, before: Tensor) -> Tensor:
    return torch.where(before % 2 == 1, count - 1 - digit, digit)


def temporal_order(grid: Grid, *, device: torch.device | str | int | None = None) -> Tensor:
    """All frames of a place one after another: token (t, y, x) is number (y * W + x) * T + t (specification 4.1).

    Returns:
        int32 (T * H * W,), like :func:`tile_order`. Traces with symbolic sizes.
    """
    frames, rows, width = grid
    position = torch.arange(frames * rows * width, dtype=torch.int64, device=device)
    return (position % frames * (rows * width) + position // frames).to(torch.int32)


def order_and_inverse(make: OrderOf, grid: Grid, *, device: torch.device | str | int | None = None) -> Tensor:
    """int32 (2, T * H * W): the order, and below it the inverse permutation. Traces with symbolic sizes.

    Args:
        make: :func:`tile_order` or :func:`temporal_order`.
    """
    order = make(grid, device=device)
    return torch.stack((order, torch.argsort(order).to(torch.int32)))


def cached_order(make: OrderOf, grid: Grid, device: torch.device | str | int) -> Tensor:
    """:func:`order_and_inverse`, computed once per grid and device. Do not write into the result.

    The cache is for real tensors in uncompiled code. While something compiles, under any mode that makes other tensors
    (`FakeTensorMode`), with symbolic sizes and while a CUDA graph is captured it is neither read nor written.
    """
    if torch.compiler.is_compiling() or not all(type(edge) is int for edge in grid):
        return order_and_inverse(make, grid, device=device)
    # What tensors are like here, and the index of a plain "cuda".
    sample = torch.empty(0, device=device)
    if type(sample) is not Tensor or (sample.is_cuda and torch.cuda.is_current_stream_capturing()):
        return order_and_inverse(make, grid, device=device)
    return _stored_order(make, tuple(grid), sample.device)


@lru_cache(maxsize=CACHED_ORDERS)
def _stored_order(make: OrderOf, grid: Grid, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd refuses tensors that were made in inference mode
        return order_and_inverse(make, grid, device=device)


def joint_order(order: Tensor, text_tokens: int, text_first: bool) -> Tensor:
    """The order of a joint sequence: the video's tokens in their order, then the text's.

    Args:
        order: int32 (V,), the order of the video's tokens among themselves.
        text_tokens: number of text tokens, 0 or more.
        text_first: whether the native sequence is [text, video] or [video, text].

    Returns:
        int32 (V + text_tokens,), native positions. Traces with symbolic sizes, and runs on `fx.Proxy` arguments.
    """
    begin = 0 if text_first else order.shape[0]
    text = torch.arange(begin, begin + text_tokens, dtype=torch.int32, device=order.device)
    return torch.cat((order + text_tokens if text_first else order, text))


def locality(order: Tensor | None, grid: Grid, block: int) -> float:
    """How far runs of `block` tokens spread: the mean over runs of the mean squared distance to the run's centre.

    The distance is in tokens, along time as along height and width. Smaller is more compact. The last run may be short.

    Args:
        order: (T * H * W,) of any integer dtype; None is the native order.
    """
    frames, rows, width = grid
    tokens = frames * rows * width
    native = torch.arange(tokens) if order is None else order.to("cpu", torch.int64)
    at = torch.stack((native // (rows * width), native // width % rows, native % width), dim=1).double()
    run = torch.arange(tokens) // block
    count = torch.bincount(run).double()
    centre = torch.zeros(len(count), 3, dtype=torch.double).index_add_(0, run, at) / count[:, None]
    distance = (at - centre[run]).square().sum(dim=1)
    return float((torch.bincount(run, weights=distance) / count).mean())


# ---------------------------------------------------------------- where the grid is read from


@dataclass(frozen=True)
class GridRule:
    """How to read the grid from the arguments of the root model's forward.

    Attributes:
        kind: "arguments": three integers; "latent": the shape of a 5-D tensor, or of the first of a list of 4-D ones
            without a batch axis; "fixed": always the same.
        names: the arguments that are read: three, one or none.
        axes: of a latent, the axes of the 5-D tensor that are T, H and W.
        patch: of a latent, the patch size (t, h, w). A patch at the border may be incomplete.
        size: of a fixed grid, (T, H, W).

    Raises:
        ConfigError: the fields do not fit the kind.
    """

    kind: str
    names: tuple[str, ...] = ()
    axes: Grid | None = None
    patch: Grid | None = None
    size: Grid | None = None

    def __post_init__(self) -> None:
        needed = {"arguments": (3, ()), "latent": (1, ("axes", "patch")), "fixed": (0, ("size",))}
        if self.kind not in needed:
            raise ConfigError(f"kind of a grid rule must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        count, fields = needed[self.kind]
        names = self.names
        if not isinstance(names, tuple | list) or len(names) != count or not all(isinstance(n, str) for n in names):
            raise ConfigError(f"a grid rule of kind {self.kind!r} has {count} argument names, got {names!r}.")
        object.__setattr__(self, "names", tuple(names))
        for field in ("axes", "patch", "size"):
            value = getattr(self, field)
            if (value is not None) != (field in fields):
                raise ConfigError(
                    f"a grid rule of kind {self.kind!r} has {fields or 'names alone'}, got {field}={value}."
                )
            if value is not None:
                object.__setattr__(self, field, _three(value, field))
        if self.axes is not None and (len(set(self.axes)) < 3 or max(self.axes) > 4):
            raise ConfigError(f"axes are three of the axes 1 to 4 of a 5-D tensor, got {self.axes}.")

    @classmethod
    def fixed(cls, size: Sequence[int]) -> GridRule:
        """The user's (T, H, W). Raises ConfigError when it is something else."""
        return cls("fixed", size=_three(size, "grid"))

    def grid(self, named_inputs: Mapping[str, Any]) -> Grid:
        """The grid of one call. Traces with symbolic sizes.

        Args:
            named_inputs: forward's arguments by name.

        Raises:
            GridMismatchError: the call lacks an argument that is read, or gives it in another form.
        """
        if self.size is not None:
            return self.size
        values = [named_inputs.get(name) for name in self.names]
        if self.axes is None or self.patch is None:
            frames, rows, width = (self._integer(name, value) for name, value in zip(self.names, values, strict=True))
            return (frames, rows, width)
        shape = _latent_shape(values[0])
        if shape is None:
            raise GridMismatchError(self._unreadable(self.names[0], "a 5-D tensor", values[0]))
        frames, rows, width = (
            (shape[axis] + patch - 1) // patch for axis, patch in zip(self.axes, self.patch, strict=True)
        )
        return (frames, rows, width)

    def _integer(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise GridMismatchError(self._unreadable(name, "an integer", value))
        return value  # type: ignore[return-value]

    def _unreadable(self, name: str, wanted: str, value: Any) -> str:
        seen = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        return f"the token grid is read from argument {name!r}, {wanted} when it was found; now it is {seen}. {_MEND}"

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"fixed at {self.size}"
        if self.kind == "arguments":
            return f"arguments {', '.join(self.names)}"
        return f"axes {self.axes} of {self.names[0]} in patches of {self.patch}"

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold, without the fields that the kind does not have."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value not in ((), None)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GridRule:
        """Raises ConfigError for an unknown key or a wrong value."""
        check_names(cls, values, "key of a grid rule")
        if "kind" not in values:
            raise ConfigError(f"a grid rule has a kind, one of {', '.join(KINDS)}; got {dict(values)!r}.")
        return cls(**values)


def _latent_shape(value: Any) -> Sequence[int] | None:
    """The shape of 5-D latents; a list of videos without a batch axis counts as a batch of its first."""
    if isinstance(value, Tensor):
        return value.shape if value.dim() == 5 else None
    first = value[0] if isinstance(value, tuple | list) and len(value) > 0 else None
    return (1, *first.shape) if isinstance(first, Tensor) and first.dim() == 4 else None


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
) -> GridFinding:
    """Find out from one call how a model's arguments show the token grid.

    A rule has to give `video_tokens` tokens, with the configured patch or with a grid that a patch convolution put out.
    Of several, prefer those with the configured patch, then those that a convolution confirms, then patches of one
    frame, then patches without a remainder. What is left must agree on the grid; then named integers come before
    shapes, arguments in their order, and channels before frames. So a clip with as many frames as channels counts as
    (B, C, T, H, W): whoever applies a rule has to compare the number of tokens in every call.

    Args:
        named_inputs: forward's arguments by name, in the order of its signature, as one example call has them.
        video_tokens: video tokens of an attention site in that call.
        patch_size: what the model's configuration says: p for (1, p, p), (h, w) or (t, h, w). Anything else is
            ignored.
        patch_size_t: the temporal patch, where the configuration has it apart (CogVideoX 1.5).
        conv_grids: output sizes (T, H, W) or (H, W) of patch convolutions in that call. Other lengths are ignored.
    """
    patch = _configured_patch(patch_size, patch_size_t)
    seen = [tuple(int(edge) for edge in grid) for grid in conv_grids if len(grid) in (2, 3)]
    candidates = [*_argument_candidates(named_inputs), *_latent_candidates(named_inputs, patch)]
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
        listed = "; ".join(f"{_show(grid)} ({rule})" for grid, rule in sorted(grids.items()))
        return GridFinding(None, f"{video_tokens} video tokens could be any of several grids: {listed}. {_MEND}")
    return GridFinding(fitting[0].rule, f"{_show(fitting[0].grid)} from {fitting[0].rule}")


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


def _latent_candidates(named_inputs: Mapping[str, Any], configured: Grid | None) -> Iterator[_Candidate]:
    patches = [(t, p, p) for t in _TEMPORAL_PATCHES for p in _SPATIAL_PATCHES]
    if configured is not None:
        patches = [configured, *(patch for patch in patches if patch != configured)]
    for name, value in named_inputs.items():
        shape = _latent_shape(value)
        if shape is None or 0 in shape:
            continue
        for axes in _LATENT_AXES:
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
            "no argument of forward shows the grid: none is a 5-D tensor, and no three are integers with names like "
            f"num_frames, height and width. {_MEND}"
        )
    convolved = f" Patch convolutions put out {', '.join(map(_show, seen))}." if seen else ""
    if right:
        return (
            f"{video_tokens} video tokens would be {_show(right[0].grid)} from {right[0].rule}, but neither a "
            f"configured patch_size nor a patch convolution confirms that.{convolved} {_MEND}"
        )
    tried = [candidate for candidate in candidates if candidate.configured] or candidates
    listed = "; ".join(f"{_show(candidate.grid)} from {candidate.rule}" for candidate in tried[:4])
    return f"no argument shows a grid of {video_tokens} video tokens; seen: {listed}.{convolved} {_MEND}"


def _show(grid: Sequence[int]) -> str:
    return "x".join(map(str, grid))


# ---------------------------------------------------------------- what the user says


def checked_grid(value: Any, video_tokens: int | None = None) -> Grid:
    """`value` as a grid, if it is one and has the right number of tokens. Traces with symbolic sizes.

    Args:
        value: a tuple or list (T, H, W).
        video_tokens: how many tokens there are; None leaves that unchecked.

    Raises:
        ConfigError: not three integers of 1 or more.
        GridMismatchError: T * H * W is another number than `video_tokens`.
    """
    grid = _three(value, "grid")
    if video_tokens is not None and grid[0] * grid[1] * grid[2] != video_tokens:
        raise GridMismatchError(
            f"the grid does not match the tokens: {_show(grid)} is {grid[0] * grid[1] * grid[2]}, and attention has "
            f"{video_tokens} video tokens. The grid counts tokens, after patches are cut, not pixels or latents. "
            "A fixed grid fits one resolution only: for several, pass a function of forward's arguments as grid."
        )
    return grid


def read_grid(
    source: GridRule | Sequence[int] | Callable[[Mapping[str, Any]], Sequence[int]],
    named_inputs: Mapping[str, Any],
    video_tokens: int | None = None,
) -> Grid:
    """The grid of one call, from a rule or from what the user passed as `grid=`; checked by :func:`checked_grid`."""
    if isinstance(source, GridRule):
        return checked_grid(source.grid(named_inputs), video_tokens)
    return checked_grid(source(named_inputs) if callable(source) else source, video_tokens)


def _three(value: Any, what: str) -> Grid:
    """Three positive integers as a tuple, or a ConfigError that names `what`."""
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise ConfigError(f"{what} is three integers (T, H, W), got {value!r}.")
    for edge in value:
        if isinstance(edge, bool) or not isinstance(edge, int | torch.SymInt) or edge < 1:
            raise ConfigError(f"{what} is three integers (T, H, W) of 1 or more, got {value!r}.")
    return (value[0], value[1], value[2])
