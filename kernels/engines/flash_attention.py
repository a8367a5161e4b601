"""The engine "flash": block-sparse attention by the package flash-attn-4, for the block sizes that it takes."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import warnings
from typing import Any

import torch

from .call import Call
from .engine import GateCall, implementation

HOPPER, BLACKWELL = 9, 10  # major compute capabilities
PACKAGE = "flash-attn-4"
SEEN = "4.0.0b36"  # the version whose interface this is written for
_INSTALL = f"pip install '{PACKAGE}>={SEEN}' (extra `flash`)"
_LISTS = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx", "block_size")
_DTYPES = (torch.bfloat16, torch.float16)
# Tiles of its kernels: a query block is a multiple of one (of two on Blackwell, which takes two at a time); a key block
# is one tile on Hopper, where it may be narrower, and a multiple of one on Blackwell.
_QUERY_BLOCKS = {HOPPER: (64, 128, 256), BLACKWELL: (256,)}
_KEY_BLOCKS = {HOPPER: (64, 128), BLACKWELL: (128, 256)}


class FlashAttentionEngine:
    """Forward alone: the backward runs on the usual engine, from the same out and lse.

    It stands behind our own kernels and serves what is asked for by name. Nobody of this project has run it on
    Blackwell: there it says so, every time a process uses it first.
    """

    name = "flash"
    operators = frozenset({"block_sparse_attention"})

    def supports(self, call: Call) -> str | None:
        """See `Engine`."""
        if call.device.type != "cuda":
            return f"the tensors are on {call.device}, and it needs a GPU"
        major, minor = call.arch
        if (major, minor) != (9, 0) and major != BLACKWELL:
            return f"it is for compute capabilities 9.0 and 10.x, and {call.device} has {major}.{minor}"
        if call.dtype not in _DTYPES:
            return f"it takes bfloat16 and float16, and not {call.dtype}"
        for dim in (call.head_dim, call.value_dim):
            if dim is None or dim % 8 or not 8 <= dim <= 128:
                return f"it takes head_dims from 8 to 128 in steps of 8, and not {call.head_dim} and {call.value_dim}"
        if call.masked:
            return "it takes no key mask"
        queries, keys = _QUERY_BLOCKS[major], _KEY_BLOCKS[major]
        if call.query_block not in queries or call.key_block not in keys:
            return (
                f"it takes query blocks of {_either(queries)} tokens and key blocks of {_either(keys)}, and not "
                f"{call.query_block} and {call.key_block}"
            )
        if major == BLACKWELL and call.requested != self.name:
            return f"on Blackwell it was never run by us, so it has to be asked for: use_engine({self.name!r})"
        return why_missing()

    def run(self, call: Call, *arguments: Any) -> Any:
        """See `Engine`."""
        if call.arch[0] == BLACKWELL:
            _warn_never_run()
        return implementation(call.operator, self.name)(*arguments)

    def gate_calls(self, arch: int) -> tuple[GateCall, ...]:
        """It ships no kernel: the package compiles its own."""
        return ()


def _either(sizes: tuple[int, ...]) -> str:
    return " or ".join(map(str, sizes))


@functools.cache
def why_missing() -> str | None:
    """Why the package cannot be used, None if it can. Imports it: seconds, and never before a call needs it."""
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {PACKAGE} is not installed: {_INSTALL}"
    try:
        interface()
    except Exception as error:  # what a package raises at import is its own affair: its libraries, its device
        return f"{PACKAGE} {version} is installed and does not load: {type(error).__name__}: {error}"[:400]
    return None


@functools.cache
def interface() -> tuple[Any, Any]:
    """Its function for attention, and its tuple for lists of blocks.

    Raises:
        ImportError: it is missing, or has no such function or tuple (seen with 4.0.0b36).
    """
    attention = importlib.import_module("flash_attn.cute.interface").flash_attn_func
    lists = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    known = inspect.signature(attention).parameters
    missing = [name for name in ("softmax_scale", "block_sparse_tensors", "return_lse") if name not in known]
    missing += [name for name in _LISTS if name not in getattr(lists, "_fields", ())]
    if missing:
        raise ImportError(f"its interface is not that of {SEEN}: no {', '.join(missing)}")
    return attention, lists


@functools.cache
def _warn_never_run() -> None:
    warnings.warn(
        "the engine 'flash' was asked for on Blackwell: the authors of salad_compile never ran it there. Compare its "
        "result with use_engine('triton') before you rely on it.",
        stacklevel=2,
    )
