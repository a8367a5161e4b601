"""Names that a package imports from its modules on first use, so that importing the package stays light."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package.

    Packages call it out of sight of type checkers, which take any name for there where a module has `__getattr__`.
    `dir` and completion show the public names alone.

    Args:
        package: its `__name__`. homes: module of the package -> the names that it has. modules: its public modules.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in home_of:
            return getattr(importlib.import_module(f".{home_of[name]}", package), name)
        if name in modules:
            return importlib.import_module(f".{name}", package)
        # with these two a traceback ends in "Did you mean: 'convert'?"
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])

    def names() -> list[str]:
        return sorted([*home_of, *modules])

    return get, names, sorted(home_of)
