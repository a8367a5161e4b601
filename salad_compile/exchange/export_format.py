"""The base class of export formats: name, place in an export, which models fit, and how it is written.

Modules of formats import torch inside their methods: the command line lists them without it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from salad_compile.errors import ConfigError

if TYPE_CHECKING:
    import torch.nn as nn

    from salad_compile.conversion.merge import MergedProjection
    from salad_compile.exchange.component import Component

_SIZE = re.compile(r"0*[1-9]\d*(\.\d+)?\s*[kmgt]b", re.IGNORECASE)  # as huggingface_hub reads it


@dataclass(frozen=True)
class ExportOptions:
    """Options of one export, for all formats.

    base_model: Hub id or name of the base model, None if it is not known. max_shard_size: bytes, or "5GB", of a file.
    """

    base_model: str | None = None
    max_shard_size: int | str = "5GB"

    def __post_init__(self) -> None:
        """Raises ConfigError: a size that is none."""
        size = self.max_shard_size
        whole = isinstance(size, int) and size > 0
        if not whole and not (isinstance(size, str) and _SIZE.fullmatch(size.strip())):
            raise ConfigError(f'max_shard_size is a size as in "5GB" (KB, MB, GB, TB), or bytes, got {size!r}.')


@dataclass(frozen=True)
class Written:
    """How many tensors a format wrote, and each projection whose update it merged into the weights."""

    tensors: int
    merged: tuple[MergedProjection, ...] = ()


class ExportFormat(ABC):
    """One way to write a converted model. A new one is a subclass, made known by `register_format`.

    Attributes:
        name: by which `export(formats=...)` and `--formats` ask for it.
        summary: what it holds and what reads it, in one line, for the documentation and the command line.
        place: of its file or folder in the export of one model. No two formats share one.
        needs_base: whether `Component.base_state` is needed; gathering it takes time and memory.
        holds_base: whether it holds the weights of the base too, so that the export is a model and not an adapter.
        library: the name by which the Hub knows the library that reads it, None if there is none.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    place: ClassVar[str]
    needs_base: ClassVar[bool] = False
    holds_base: ClassVar[bool] = False
    library: ClassVar[str | None] = None

    @abstractmethod
    def require(self, model: nn.Module) -> None:
        """Check that this format can hold the model, before anything is gathered or written.

        Raises:
            ExportError, MergeError: why it cannot.
        """

    @abstractmethod
    def write(self, component: Component, path: Path, options: ExportOptions) -> Written:
        """Write the component to `path`, which is `place` in a new directory; directories above it are made here."""

    def loading(self, component: str, cls: str, folder: str) -> str | None:
        """The line of Python in the model card that loads what was written, or None.

        Args:
            component: "" or the pipeline's name of the model. cls: the model's class. folder: the set of this model.
        """
        return None
