"""Checks that settings of every kind share; each error names what is valid, and the nearest of it."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar

from salad_compile.errors import ConfigError, did_you_mean

Settings = TypeVar("Settings")

# What files hold (schema.py): a setting beyond these could be written and not be read again.
LARGEST_SIZE = 2**31 - 1
LARGEST_COUNT = 2**53

_HALF = re.compile("[\ud800-\udfff]")


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is an integer, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: object, least: int = 0, most: int = LARGEST_COUNT) -> TypeGuard[int]:
    """Whether it is an integer from `least` to `most`, and not a bool."""
    return is_int(value) and least <= value <= most


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an integer or a float, finite also as a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_text(value: object) -> TypeGuard[str]:
    """Whether it is text that a file can hold: not half of a sign, as in JSON that was cut off in the middle of one."""
    return isinstance(value, str) and not _HALF.search(value)


def check_choice(name: str, value: object, valid: tuple[Any, ...]) -> None:
    """Raises ConfigError unless `value` is one of `valid`, naming the nearest."""
    if type(value) is type(valid[0]) and value in valid:  # 128.0 equals 128, and is no block size
        return
    hint = did_you_mean(value, valid) if isinstance(value, str) and isinstance(valid[0], str) else ""
    raise ConfigError(f"{name} must be one of {', '.join(map(repr, valid))}, got {value!r}.{hint}")


def require_mapping(given: object, what: str) -> None:
    """Raises ConfigError unless it is a dictionary."""
    require(isinstance(given, Mapping), f"{what} are a dictionary from names to values, got {given!r:.80}.")


def check_names(cls: type, given: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError for a name that the dataclass `cls` does not have, naming the nearest valid one."""
    require_mapping(given, f"{what}s")
    valid = [field.name for field in dataclasses.fields(cls) if field.init]
    for name in given:
        if name not in valid:  # looking for the nearest takes longer than all other checks
            hint = did_you_mean(name, valid) if isinstance(name, str) else ""
            raise ConfigError(f"unknown {what} {name!r}.{hint} Valid: {', '.join(valid)}.")


def checked_names(what: str) -> Callable[[type[Settings]], type[Settings]]:
    """A decorator of dataclasses: keywords that the constructor does not have raise ConfigError, as `check_names` does.

    Args:
        what: what a keyword is, for the message.
    """

    def decorate(cls: type[Settings]) -> type[Settings]:
        made: Callable[..., None] = cls.__init__

        @functools.wraps(made)
        def construct(self: Settings, *values: Any, **named: Any) -> None:
            check_names(cls, named, what)
            made(self, *values, **named)

        cls.__init__ = construct  # type: ignore[method-assign, assignment]
        return cls

    return decorate
