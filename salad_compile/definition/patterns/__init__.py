"""The sparse patterns: each file of this folder declares one, under the name of the file.

A pattern says which key blocks every query block attends to, and everything that follows from it: see
:class:`salad_compile.definition.pattern.Pattern`. To add one, add a file here whose `PATTERN` is an instance, or call
:func:`register` from code of your own before a configuration names it.

Importing this package loads no pattern and no torch, so that a configuration can be checked without.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from salad_compile.common.checks import check_choice, require

if TYPE_CHECKING:
    from salad_compile.definition.pattern import Pattern

_loaded: dict[str, Pattern] = {}


def names() -> tuple[str, ...]:
    """Every pattern that is known, loaded or not."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(dict.fromkeys([*files, *_loaded]))


def find(name: str) -> Pattern:
    """The pattern of this name.

    Raises:
        ConfigError: there is none; the message lists those that there are, and the nearest.
    """
    if name not in _loaded:
        check_choice("pattern", name, names())
        register(importlib.import_module(f"{__name__}.{name}").PATTERN)
    return _loaded[name]


def register(pattern: Pattern) -> None:
    """Make a pattern known under its name.

    Raises:
        ConfigError: another pattern has this name already.
    """
    known = _loaded.setdefault(pattern.name, pattern)
    require(known is pattern, f"there are two patterns called {pattern.name!r}: {known} and {pattern}.")
