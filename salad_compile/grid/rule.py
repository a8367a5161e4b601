"""How the grid is read from the arguments of a call: by a rule that was found, or as the user says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from salad_compile.common.checks import check_choice, check_names
from salad_compile.errors import ConfigError, GridMismatchError
from salad_compile.grid.sizes import HINT, Grid, check_grid, three_sizes

GridSource: TypeAlias = "GridRule | Sequence[int] | Callable[[Mapping[str, Any]], Sequence[int]]"
"""What gives the grid: a rule, the user's (T, H, W), or the user's function of forward's arguments by name."""

Kind: TypeAlias = Literal["arguments", "latent", "sizes", "fixed"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class GridRule:
    """How to read the grid from the arguments of the root model's forward.

    Attributes:
        kind: "arguments": three integers; "latent": the shape of a 5-D tensor, or of the first of a list of 4-D ones
            without a batch axis; "sizes": the last three integers of one argument, such as (T, H, W);
            "fixed": always the same.
        names: the arguments that are read: three, one or none.
        axes: of a latent, the axes of the 5-D tensor that are T, H and W.
        patch: of a latent or of sizes, the patch size (t, h, w). A patch at the border may be incomplete.
        size: of a fixed grid, (T, H, W).

    Raises:
        ConfigError: the fields do not fit the kind.
    """

    kind: Kind
    names: tuple[str, ...] = ()
    axes: Grid | None = None
    patch: Grid | None = None
    size: Grid | None = None

    def __post_init__(self) -> None:
        needed = {
            "arguments": (3, ()),
            "latent": (1, ("axes", "patch")),
            "sizes": (1, ("patch",)),
            "fixed": (0, ("size",)),
        }
        check_choice("kind of a grid rule", self.kind, KINDS)
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
                object.__setattr__(self, field, three_sizes(value, field))
        if self.axes is not None and (len(set(self.axes)) < 3 or max(self.axes) > 4):
            raise ConfigError(f"axes are three of the axes 1 to 4 of a 5-D tensor, got {self.axes}.")

    @classmethod
    def fixed(cls, size: Sequence[int]) -> GridRule:
        """The user's (T, H, W). Raises ConfigError when it is something else."""
        return cls("fixed", size=three_sizes(size, "grid"))

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
        if self.axes is None and self.patch is not None:
            sizes = sizes_of(values[0])
            if sizes is None:
                raise GridMismatchError(self._unreadable(self.names[0], "three sizes", values[0]))
            return _patches(sizes, self.patch)
        if self.axes is None or self.patch is None:
            frames, rows, width = (self._integer(name, value) for name, value in zip(self.names, values, strict=True))
            return (frames, rows, width)
        shape = latent_shape(values[0])
        if shape is None:
            raise GridMismatchError(self._unreadable(self.names[0], "a 5-D tensor", values[0]))
        return _patches([shape[axis] for axis in self.axes], self.patch)

    def _integer(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise GridMismatchError(self._unreadable(name, "an integer", value))
        return value  # type: ignore[return-value]

    def _unreadable(self, name: str, wanted: str, value: Any) -> str:
        seen = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        return f"the token grid is read from argument {name!r}, {wanted} when it was found; now it is {seen}. {HINT}"

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"fixed at {self.size}"
        if self.kind == "arguments":
            return f"arguments {', '.join(self.names)}"
        if self.kind == "sizes":
            return f"the sizes in {self.names[0]} in patches of {self.patch}"
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


def latent_shape(value: Any) -> Sequence[int] | None:
    """The shape of 5-D latents; a list of videos without a batch axis counts as a batch of its first."""
    if isinstance(value, Tensor):
        return value.shape if value.dim() == 5 else None
    first = value[0] if isinstance(value, tuple | list) and len(value) > 0 else None
    return (1, *first.shape) if isinstance(first, Tensor) and first.dim() == 4 else None


def sizes_of(value: Any) -> Sequence[int] | None:
    """The last three of three to five integers, or None if this is something else."""
    if not isinstance(value, tuple | list) or not 3 <= len(value) <= 5:
        return None
    integers = all(isinstance(size, int | torch.SymInt) and not isinstance(size, bool) for size in value)
    return value[-3:] if integers else None


def _patches(sizes: Sequence[int], patch: Grid) -> Grid:
    """How many patches there are along each axis, incomplete ones at the border among them."""
    frames, rows, width = ((size + edge - 1) // edge for size, edge in zip(sizes, patch, strict=True))
    return (frames, rows, width)


def read_grid(
    source: GridSource,
    named_inputs: Mapping[str, Any],
    video_tokens: int | None = None,
) -> Grid:
    """The grid of one call, from a rule or from what the user passed as `grid=`; checked by :func:`check_grid`."""
    if isinstance(source, GridRule):
        return check_grid(source.grid(named_inputs), video_tokens)
    return check_grid(source(named_inputs) if callable(source) else source, video_tokens)
