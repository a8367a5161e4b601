"""The export formats, one file each, and the registry that knows them by name.

A new format is a new file: a subclass of `ExportFormat`, and `register_format` on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from salad_compile.errors import ConfigError, did_you_mean
from salad_compile.exchange.export_format import ExportFormat
from salad_compile.exchange.formats.comfyui import ComfyUI
from salad_compile.exchange.formats.diffusers import Diffusers
from salad_compile.exchange.formats.merged import Merged
from salad_compile.exchange.formats.peft import Peft
from salad_compile.exchange.formats.salad import Salad

Format = TypeVar("Format", bound=type[ExportFormat])

# in the order in which they are written and reported
FORMATS: dict[str, ExportFormat] = {}


def register_format(cls: Format) -> Format:
    """Make a format known to `export` and to the command line, as a decorator.

    Raises:
        ConfigError: another format has its name or its place.
    """
    for known in FORMATS.values():
        if cls.name == known.name or cls.place == known.place:
            raise ConfigError(
                f"the format {cls.name!r} at {cls.place!r} collides with {known.name!r} at {known.place!r}."
            )
    FORMATS[cls.name] = cls()
    return cls


def choose_formats(names: str | Iterable[str] | None) -> list[ExportFormat]:
    """The formats of these names, in the order of the registry; None: all.

    Raises:
        ConfigError: no name, or an unknown one.
    """
    if names is None:
        return list(FORMATS.values())
    if not isinstance(names, Iterable):
        raise ConfigError(f"formats are names of {', '.join(FORMATS)}, got {names!r:.80}.")
    given = (names,) if isinstance(names, str) else tuple(names)
    for name in given:
        if name not in FORMATS:
            raise ConfigError(f"unknown format {name!r}: {', '.join(FORMATS)}.{did_you_mean(str(name), FORMATS)}")
    if not given:
        raise ConfigError(f"no format to export: choose from {', '.join(FORMATS)}.")
    return [known for name, known in FORMATS.items() if name in given]


for _built_in in (Salad, Diffusers, ComfyUI, Peft, Merged):
    register_format(_built_in)
