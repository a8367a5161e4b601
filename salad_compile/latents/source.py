"""The base class of readers: a list of items, from headers alone, and each item as it is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from salad_compile.common.checks import is_number, is_text
from salad_compile.common.tensor_files import is_finite
from salad_compile.errors import LatentItemError
from salad_compile.latents.item import LatentItem, Shape
from salad_compile.latents.statistics import LatentStatistics

Found = TypeVar("Found")


@dataclass(frozen=True)
class Entry:
    """An item before it is read. One with a `problem` is never read, and may have no shape.

    text_length: tokens of its text, where headers say it.
    """

    name: str
    shape: Shape | None = None
    problem: str | None = None
    text_length: int | None = None


@dataclass(frozen=True)
class Problem:
    """Why an item cannot be used."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class LatentSource(ABC):
    """A reader of one format. Opening it reads headers only; it can be pickled and forked.

    Attributes:
        layout: name of the format.
        normalized: whether the format stores normalised latents.
        statistics: what normalises them, where the format says so or is used with one VAE only, else None. Not used for
            latents with another number of channels.
        guesses_statistics: nothing in the files says them, and other VAEs are used with this format too.
        extras_normalized: whether latents among the extras are stored normalised, although the latents are not.
        left_out: what the files hold and the items do not, by name.
        entries: all items, in an order that depends on nothing but names.
    """

    layout: ClassVar[str]
    normalized: bool
    statistics: LatentStatistics | None
    guesses_statistics: bool = False
    extras_normalized: bool = False
    left_out: tuple[str, ...] = ()
    entries: list[Entry]

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Whether this looks like the format, from names alone."""

    def read(self, index: int) -> LatentItem:
        """Item `index` as stored: not normalised by this, text without padding.

        Raises:
            LatentItemError: the item is damaged.
        """
        try:
            return self.load(index)
        except Exception as error:  # whatever damaged files make their libraries raise
            raise item_error(self.entries[index].name, _reason(error)) from error

    @abstractmethod
    def load(self, index: int) -> LatentItem:
        """:meth:`read`, which names the item in what this raises, whatever that is."""


def attempt(look: Callable[[], Found]) -> tuple[Found | None, str]:
    """What `look` finds in files, and the empty string; or None, and why it finds nothing."""
    try:
        return look(), ""
    except Exception as error:  # whatever damaged files make their libraries raise
        return None, _reason(error)


def entry_of(name: str, look: Callable[[], Entry]) -> Entry:
    """The entry that `look` makes of files, or one whose problem is why it does not."""
    entry, problem = attempt(look)
    return entry or Entry(name, problem=problem)


def _reason(error: Exception) -> str:
    """In one line. What readers say themselves are ValueErrors; others need their kind: a KeyError is a name alone."""
    said = str(error).partition("\n")[0]
    return said if said and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {said}"


def item_error(name: str, reason: str) -> LatentItemError:
    return LatentItemError(f"{name}: {reason}")


def check_item(item: LatentItem, shape: Shape) -> LatentItem:
    """The item with a float32 latent of `shape` and a float32 or bfloat16 text, or an error.

    Raises:
        LatentItemError: another shape, not floating point, no text, NaN or infinity; or what no index could hold.
    """
    require_kinds(item)
    latent, text = item.latent, item.text
    if tuple(latent.shape) != shape:
        raise item_error(item.name, f"the latent has shape {tuple(latent.shape)}, its header said {shape}")
    if text.ndim != 2 or not text.shape[0]:
        raise item_error(item.name, f"the text has shape {tuple(text.shape)}, it needs (length, width) and one token")
    for what, tensor in (("latent", latent), ("text", text)):
        if not tensor.is_floating_point():
            raise item_error(item.name, f"the {what} is {tensor.dtype}, it must be floating point")
        if not is_finite(tensor.float()):  # of float64, too, what float32 holds
            raise item_error(item.name, f"the {what} holds NaN or infinity")
    for name, tensor in item.extras.items():
        if not is_finite(tensor):
            raise item_error(item.name, f"its {name} holds NaN or infinity")
    text = text if text.dtype == torch.bfloat16 else text.float()
    return replace(item, latent=latent.float(), text=text, fps=item.fps or None)


def require_kinds(item: object) -> None:
    """Raises LatentItemError: one item that JSON cannot hold would make the index of all items unreadable."""
    if not isinstance(item, LatentItem):
        raise LatentItemError(f"{item!r:.80} is no LatentItem.")
    if not is_text(item.name):
        raise LatentItemError(f"{item.name!r} is no name of an item, which is text.")
    if not is_text(item.caption):
        raise item_error(item.name, f"its caption is {item.caption!r:.80}, and no text; without one it is ''")
    if item.fps is not None and not (is_number(item.fps) and item.fps >= 0):
        raise item_error(item.name, f"its fps is {item.fps!r:.80}: it is a number, or None where nothing says it")
    for name, tensor in {"latent": item.latent, "text": item.text, **item.extras}.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or not is_text(name):
            kind = "a tensor without values" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise item_error(item.name, f"its {name!r} is {kind}, and no tensor with values")


def as_latent_shape(sizes: Sequence[int] | None) -> Shape | None:
    """(C, T, H, W); (C, H, W) of an image becomes (C, 1, H, W); None for anything else."""
    shape = tuple(int(size) for size in sizes or ())
    if len(shape) == 3:
        shape = (shape[0], 1, *shape[1:])
    if len(shape) != 4 or min(shape) < 1:
        return None
    return shape[0], shape[1], shape[2], shape[3]


def folders_beside(root: Path, read: Sequence[str]) -> list[str]:
    """The folders of a cache that are not read, as `reference_latents/`: conditions that no item gets."""
    return sorted(
        f"{each.name}/" for each in root.iterdir() if each.is_dir() and each.name not in read and each.name[0] != "."
    )


def strip_padding(text: Tensor) -> Tensor:
    """(L, D) without the rows of zeros at its end."""
    filled = (text != 0).any(dim=1).nonzero()
    return text[: int(filled[-1]) + 1] if len(filled) else text[:0]


def unique_names(names: Sequence[str], places: Sequence[str]) -> list[str]:
    """The names; one that occurs twice, or is empty, gets the place where it was found."""
    count = Counter(names)
    return [
        name if name and count[name] == 1 else f"{name} ({place})" if name else place
        for name, place in zip(names, places, strict=True)
    ]
