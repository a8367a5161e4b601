"""The end of each attempt of Dynamo at a frame under our backend, also where no graph came of it and nobody asked us.

Dynamo gives a whole frame up where it cannot go on behind a break (in the arguments of a call, in a `with` block), and
makes no graph of one that does nothing but call a disabled function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch.nn as nn

Listener = Callable[[list[nn.Module]], None]


class _Kept(list[Any]):
    """Callbacks that `torch._dynamo.reset()` takes away, but ours: no backend is asked before the next frame."""

    def clear(self) -> None:
        self[:] = [callback for callback in self if isinstance(callback, _End)]


class _End:
    def __init__(self, backend: Callable[..., Any], listener: Listener) -> None:
        self.backend, self.listener = backend, listener

    def __call__(self, *_: Any) -> None:
        frame = _frame_of(self.backend)
        if frame is not None:
            self.listener([value for value in frame.f_locals.values() if isinstance(value, nn.Module)])


def when_frames_end(backend: Callable[..., Any], listener: Listener) -> None:
    """Call `listener` with the modules among the arguments of each frame that Dynamo has tried for `backend`."""
    # Private. The callbacks of compilations. Seen in torch 2.11 and 2.13;
    # tests/salad_compile/backend/test_disabled_attention.py fails when they move.
    from torch._dynamo.callback import callback_handler

    callback_handler.end_callbacks = _Kept([*callback_handler.end_callbacks, _End(backend, listener)])


def _frame_of(backend: Callable[..., Any]) -> Any:
    """The frame that Dynamo works at, if it does so for `backend`.

    Private, as above: the local variables of what converts a frame, and how wrappers of backends keep what they wrap.
    """
    caller: FrameType | None = sys._getframe()
    while caller is not None:
        if caller.f_globals.get("__name__") == "torch._dynamo.convert_frame" and caller.f_code.co_name == "__call__":
            asked = caller.f_locals.get("self")
            while hasattr(asked, "_torchdynamo_orig_backend"):
                asked = asked._torchdynamo_orig_backend  # type: ignore[union-attr]
            asked = getattr(asked, "compiler_fn", asked)
            return caller.f_locals.get("frame") if asked is backend else None
        caller = caller.f_back
    return None
