"""The entries of all packages, by the full name of the class."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping

from tests.wild.case import Wild
from tests.wild.rule import PACKAGES


@functools.cache
def _tables() -> Mapping[str, tuple[Mapping[str, Wild], Mapping[str, str], Mapping[str, str]]]:
    found = {}
    for package in PACKAGES:
        if importlib.util.find_spec(f"tests.wild.models.{package}") is None:
            found[package] = ({}, {}, {})
            continue
        table = importlib.import_module(f"tests.wild.models.{package}")
        found[package] = (table.ENTRIES, table.WITHOUT_ENTRY, getattr(table, "CANNOT_BE_IMPORTED", {}))
    return found


def names() -> list[str]:
    """Full names of the classes that have an entry, those with a second configuration as `name:which` too."""
    return [name for entries, _, _ in _tables().values() for name in entries]


def case(name: str) -> Wild:
    """The entry of a class."""
    return _tables()[name.partition(".")[0]][0][name]


def without_entry() -> dict[str, str]:
    """Classes that the rule finds and that are none or cannot be tried here, with the reason."""
    return {name: reason for _, without, absent in _tables().values() for name, reason in {**without, **absent}.items()}


def not_tried() -> dict[str, str]:
    """Of those, the video DiTs: they cannot be imported here, or have no tiny configuration yet."""
    reasons = without_entry()
    absent = {name for _, _, absent in _tables().values() for name in absent}
    return {name: reason for name, reason in reasons.items() if name in absent or reason.startswith("not tried yet")}
