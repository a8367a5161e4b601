"""What an entry of a table says of a foreign class, and what its models are built and fed with."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

GRID = (2, 7, 11)
"""Frames, height and width of the video in tokens: 154, no multiple of a block."""
TEXT = 17


def first_tensor(output: Any) -> Tensor:
    """The video of what a forward returned: the first tensor in its tuples, lists, dictionaries and dataclasses."""
    return next(tensors(output))


def tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in tuples, lists, dictionaries and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)
    elif hasattr(output, "__dict__"):
        yield from tensors(vars(output))


@dataclass(frozen=True)
class Wild:
    """One foreign class: how a tiny one is built, what it is fed with, and what must be found in it.

    sites: owners of exactly the calls of self-attention over the video, in execution order; empty where `refused` says
        why none can be converted.
    grid: of the video tokens; None where the forward cannot tell, with `flat` saying why in words of the plan's reason.
    around: entered around every forward: a package's own forward context.
    breaks_inside: the graph breaks inside the sites, which run uncompiled as SALAD.
    known: check -> why the product fails it today. Such a check must fail: when it passes, the entry is taken out.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    sites: tuple[str, ...] = ()
    refused: str = ""
    grid: tuple[int, int, int] | None = GRID
    flat: str = ""
    blocks: tuple[str, ...] = ()
    output: Callable[[Any], Tensor] = first_tensor
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    fullgraph: bool = True
    breaks_inside: bool = False
    bound: float = 1e-5
    vanish: tuple[str, ...] = ()
    known: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def numbered(pattern: str, count: int = 2) -> tuple[str, ...]:
    """`blocks.{}.attn` -> `blocks.0.attn`, `blocks.1.attn`."""
    return tuple(pattern.format(i) for i in range(count))


def build(name: str, case: Wild) -> nn.Module:
    """A new model with every weight redrawn, in fp32 and eval mode, the same for the same name.

    Matrices get variance 1 / fan-in, scales of norms lie around 1, all else around 0: nothing that a library leaves at
    zero or uninitialised stays so.
    """
    seed = zlib.crc32(name.encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.build()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.is_floating_point():
                    parameter.copy_(_values(parameter_name, parameter))
    return model.float().eval().requires_grad_(True)


def _values(name: str, parameter: Tensor) -> Tensor:
    noise = torch.randn(parameter.shape)
    if name.rpartition(".")[2] != "weight":
        return 0.2 * noise
    return 1 + 0.1 * noise if parameter.ndim == 1 else noise / math.sqrt(max(parameter[0].numel(), 1))


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
