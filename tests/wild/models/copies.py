"""Copies and subclasses of classes of diffusers, built and fed as our own zoo builds and feeds the originals."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from tests.models.expectations import GAPS
from tests.models.registry import ALL_CASES
from tests.wild.case import Wild


def made(module: str, name: str, config: dict[str, Any]) -> Callable[[], nn.Module]:
    """Builds a class of a module, with this configuration."""

    def make() -> nn.Module:
        built: nn.Module = getattr(importlib.import_module(module), name)(**config)
        return built

    return make


def copy_of(case: str, build: Callable[[], nn.Module], **changes: Any) -> Wild:
    """The entry of a class that takes what the class of a case of the zoo takes, and has its sites."""
    known = ALL_CASES[case]
    entry = Wild(
        build,
        lambda: known.inputs(0),
        known.sites,
        blocks=known.repeated_blocks,
        output=known.output,
        fullgraph=known.fullgraph,
        vanish=GAPS.get(case, ()),
    )
    return dataclasses.replace(entry, **changes)
