"""Which models stand for the others in checks that compile: the rest of the zoo runs them with `--all-cases`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pytest

from tests.models.expectations import DENSE
from tests.models.registry import ALL_CASES
from tests.models.zoo import Case

CONVERTED: Mapping[str, Case] = {name: case for name, case in ALL_CASES.items() if name not in DENSE}

# Ways in which a model can be built that matter to per-block compilation and activation checkpointing: attention
# modules and inline attention, one stream, joint streams on either side, two streams, masks, grouped heads, a call for
# each sample, graphs that break.
KINDS = frozenset(
    {
        "handwritten_fused",
        "handwritten_inline",
        "handwritten_multihead",
        "Wan",
        "Latte",
        "CogVideoX",
        "HunyuanVideo",
        "EasyAnimate",
        "Mochi",
        "Cosmos3Omni",
        "WanAnimate2",
    }
)
# One for each way of rotating: in place, complex numbers, views, matrices, halves, a part of the tokens, two streams.
ROTATIONS = frozenset(
    {
        "Wan",
        "AnyFlow",
        "LTX2Video",
        "Kandinsky5",
        "ConsisID",
        "HunyuanVideo",
        "MotifVideo",
        "Mochi",
        "Cosmos3Omni",
        "handwritten_rearrange",
    }
)
# Compiled block by block. Wan's blocks go through Inductor; those of the other two are compiled in CHECKPOINTS.
PER_BLOCK = (KINDS | ROTATIONS) - {"Wan", "handwritten_multihead", "WanAnimate2"}
# Compiled whole. What is in RESOLUTIONS or CHECKPOINTS is compiled whole there.
WHOLE = frozenset({"LTX2Video", "handwritten_rearrange"})
# One stream, a multi-head module, a joint stream, graphs that break. A checkpoint takes the block as it is: two
# streams, masks, prefixes and a call for each sample are inside it, and PER_BLOCK compiles it.
CHECKPOINTS = frozenset({"Wan", "handwritten_multihead", "CogVideoX", "WanAnimate2"})
# Text in one stream. `test_eight_more_resolutions_recompile_nothing` has a plain model.
RESOLUTIONS = frozenset({"CogVideoX"})

Parametrise = Callable[[Callable[..., Any]], Callable[..., Any]]


def every_case(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run the test for every case that is converted."""
    return by_default(CONVERTED)(test)


def by_default(names: Collection[str]) -> Parametrise:
    """Run the test for the cases of these names, and with `--all-cases` for every case that is converted."""
    unknown = set(names) - set(CONVERTED)
    assert not unknown, f"no such cases: {sorted(unknown)}"
    cases = [pytest.param(case, id=name, marks=marks_of(name, names)) for name, case in CONVERTED.items()]
    return pytest.mark.parametrize("case", cases)


def marks_of(name: str, names: Collection[str]) -> tuple[pytest.MarkDecorator, ...]:
    """None, or that only `--all-cases` runs it."""
    return () if name in names else (pytest.mark.all_cases,)
