"""A work-around for wrong gradients out of Inductor's C++ code generator, for the graphs that this backend lowers.

Inductor fuses a row-wise reduction with the pointwise work around it by sharing the outer loop, and keeps the row
between them in a local buffer of one row. When that outer loop is vectorised, which happens when an input is stored
channels first, as the output of a patch convolution is, all lanes write into that one row and the last one wins:
silently wrong values. Seen in torch 2.13 on a CPU with AVX-512; a dense model can meet it too (the test has nine lines
that do). Our graphs meet it in the backward of the norm before a converted projection.

So the fusion is switched off while Inductor schedules our graphs. There is no option for it: the method below is
private, seen in torch 2.11 and 2.13; tests/salad_compile/backend/test_cpu_fusion.py fails when it goes away, and says
when the bug is mended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

# The caches of Inductor and AOTAutograd do not know of the work-around: without a key of their own, our graphs could be
# served code that was generated without it.
_CACHE_TAG = "salad_compile: no outer loop fusion"


@contextlib.contextmanager
def no_outer_loop_fusion() -> Iterator[None]:
    """While active, Inductor's C++ scheduler fuses no loops of different depth. Compilation holds a lock."""
    from torch._inductor.codegen.cpp import CppScheduling

    original = CppScheduling.can_fuse_vertical_outer_loop
    CppScheduling.can_fuse_vertical_outer_loop = lambda self, node1, node2: False  # type: ignore[method-assign]
    try:
        with own_cache_keys():
            yield
    finally:
        CppScheduling.can_fuse_vertical_outer_loop = original  # type: ignore[method-assign]


@contextlib.contextmanager
def own_cache_keys() -> Iterator[None]:
    """While active, compiled code is cached apart from what was generated without the work-around. Nests."""
    tag = torch.compiler.config.cache_key_tag
    tag = tag if tag.endswith(_CACHE_TAG) else f"{tag}{_CACHE_TAG}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        yield


def inner_compile(*args: Any, **kwargs: Any) -> Any:
    """Inductor's `compile_fx_inner` under the work-around; backward graphs may be compiled long after the forward's."""
    from torch._inductor.compile_fx import compile_fx_inner

    compile_inner: Callable[..., Any] = compile_fx_inner
    with no_outer_loop_fusion():
        return compile_inner(*args, **kwargs)
