"""Building models of configurations that others wrote: sizes that no model has end in an error, and not in hours."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

LARGEST_NUMBER = 2**31 - 1
MOST_MODULES = 2**15  # the largest video DiTs have some thousands


def first_impossible(values: Mapping[str, Any]) -> str | None:
    """`num_layers=2147483648`: the first whole number that is no size of anything in a model, or None."""
    for name, value in values.items():
        found = [value]
        for each in found:  # grows meanwhile
            if isinstance(each, (list, dict)):
                found += each.values() if isinstance(each, dict) else each
            elif isinstance(each, int) and abs(each) > LARGEST_NUMBER:
                return f"{name}={each}"[:80]
    return None


@contextlib.contextmanager
def bounded_building() -> Iterator[None]:
    """While active, a model that gets too many modules raises ValueError. Other threads must build none."""
    from torch.nn.modules.module import register_module_module_registration_hook

    numbers = itertools.count(1)

    def count(module: Any, name: str, submodule: Any) -> None:
        if next(numbers) > MOST_MODULES:
            raise ValueError(f"more than {MOST_MODULES:,} modules, which no such model has")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
